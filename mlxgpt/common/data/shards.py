"""Tokens on disk: checksummed shards with an index, and nanoGPT's flat .bin; read by position, never mapped or held.

A shard is little-endian uint16 or uint32 without a header, which is what nanoGPT writes, in a folder beside index.json:

    {"format": 1, "dtype": "uint16", "vocab_size": ..., "eos_id": ..., "begins_with": [ids before each document],
     "tokenizer": {"kind", "digest"}, "source": {...},
     "splits": {"train": {"documents", "tokens", "bytes", "shards": [{"file", "tokens", "sha256"}, ...], "unigram",
                          "cuts": [[token at which the training part of a document ends, tokens of the other part]]},
                "val": {..., "longest": {"document", "tokens"}}},
     "sha256": of all the above}
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.files import sync

FORMAT = 1
SHARD = 1 << 26
"""Tokens of a full shard."""
_BLOCK = 1 << 22  # bytes read at once
_OPEN = 64  # files held open at once; macOS allows a process 256


class ShardWriter:
    """Appends tokens to the shards of one split in ``folder``, hashing them on the way."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard: int = SHARD) -> None:
        self._folder, self._name, self._dtype, self._shard = folder, name, dtype, shard
        self._file: Any = None
        self._hash = hashlib.sha256()
        self._held = 0
        self.shards: list[dict[str, Any]] = []
        self.tokens = 0

    def write(self, ids: np.ndarray) -> None:
        """Appends ``ids``; a shard that is full is finished and the next one begun."""
        start = 0
        while start < len(ids):
            if self._file is None:
                self._file = open(self._folder / f"{self._name}-{len(self.shards):05}.bin", "wb")  # noqa: SIM115
            part = ids[start : start + self._shard - self._held].astype(self._dtype)
            self._file.write(part.data)
            self._hash.update(part.data)
            self._held += len(part)
            start += len(part)
            if self._held == self._shard:
                self.finish()
        self.tokens += len(ids)

    def finish(self) -> None:
        """Makes the open shard durable and notes its checksum."""
        if self._file is None:
            return
        self._file.close()
        file = f"{self._name}-{len(self.shards):05}.bin"
        sync(self._folder / file)
        self.shards.append({"file": file, "tokens": self._held, "sha256": self._hash.hexdigest()})
        self._file, self._hash, self._held = None, hashlib.sha256(), 0

    def abandon(self) -> None:
        """Closes the open shard as it is."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: what the buffer holds is given up with the folder
                self._file.close()
            self._file = None


def _sealed(index: dict[str, Any]) -> str:
    body = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """index.json with its own checksum, on disk when this returns."""
    path = folder / "index.json"
    path.write_text(json.dumps(index | {"sha256": _sealed(index)}, indent=1), encoding="utf-8")
    sync(path)


def is_shards(folder: Path) -> bool:
    """Whether ``folder`` holds prepared shards."""
    return (folder / "index.json").is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of prepared shards.

    Raises:
        UserError: it is damaged, of another format, or not an index of shards.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found, version = index["sha256"], index["format"]
        splits = index["splits"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not an index of shards: truncated or written by another program") from None
    if version != FORMAT:
        raise UserError(f"{path}: format {version!r}: this version reads format {FORMAT}")
    if found != _sealed(index):
        raise UserError(
            f"{path}: sha256 {_sealed(index)[:16]}...: expected {str(found)[:16]}...: the index was changed"
        )
    if not {"train", "val"} <= set(splits):
        raise UserError(f"{path}: splits {', '.join(splits)}: expected train and val")
    return index


@dataclass(frozen=True)
class Part:
    """``count`` tokens of a file from token ``start``."""

    path: Path
    start: int
    count: int


class Tokens:
    """A sequence of tokens over files, read by position: memory does not grow with its length."""

    def __init__(self, parts: list[Part], dtype: np.dtype) -> None:
        self._dtype = dtype
        self._parts = [part for part in parts if part.count]
        self._ends = np.cumsum([part.count for part in self._parts], dtype=np.int64)
        self._files: dict[Path, int] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        assert step == 1
        return self.read(start, max(stop - start, 0))

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` tokens from position ``start`` as int32."""
        assert start >= 0 and start + count <= len(self)
        taken = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            part = self._parts[index]
            inside = start - (int(self._ends[index]) - part.count)
            here = min(count, part.count - inside)
            taken.append(self._pread(part, inside, here))
            start, count, index = start + here, count - here, index + 1
        return np.concatenate(taken).astype(np.int32) if taken else np.empty(0, np.int32)

    def without(self, gaps: list[tuple[int, int]]) -> "Tokens":
        """The same but for the tokens of ``gaps``: (first, end) each, in order and apart."""
        kept: list[Part] = []
        edges = [0, *(edge for gap in gaps for edge in gap), len(self)]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            while start < end:
                index = int(np.searchsorted(self._ends, start, side="right"))
                part = self._parts[index]
                inside = start - (int(self._ends[index]) - part.count)
                here = min(end - start, part.count - inside)
                kept.append(Part(part.path, part.start + inside, here))
                start += here
        return Tokens(kept, self._dtype)

    def blocks(self, size: int = 1 << 20) -> Iterator[np.ndarray]:
        """Everything, in order, ``size`` tokens at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, min(size, len(self) - start))

    def _pread(self, part: Part, inside: int, count: int) -> np.ndarray:
        if part.path not in self._files:
            if len(self._files) >= _OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[part.path] = os.open(part.path, os.O_RDONLY)
        width = self._dtype.itemsize
        data = os.pread(self._files[part.path], count * width, (part.start + inside) * width)
        if len(data) != count * width:
            raise UserError(
                f"{part.path}: {len(data)} bytes at token {part.start + inside}: expected {count * width}: truncated"
            )
        return np.frombuffer(data, self._dtype)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def hash_and_largest(path: Path, dtype: np.dtype | None = None) -> tuple[str, int]:
    """sha256 of a file of tokens (uint16 unless said) and its largest token (-1 if none): one pass, constant memory."""
    dtype = dtype or np.dtype("<u2")
    digest, largest = hashlib.sha256(), -1
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            whole = len(block) - len(block) % dtype.itemsize
            if whole:
                largest = max(largest, int(np.frombuffer(block[:whole], dtype).max()))
    return digest.hexdigest(), largest


def verify(folder: Path, index: dict[str, Any]) -> int:
    """Holds every shard against the index; the largest token.

    Raises:
        UserError: a shard is missing, has another length or another sha256.
    """
    dtype, largest = _dtype(folder, index), -1
    for split in index["splits"].values():
        for shard in split["shards"]:
            path = folder / shard["file"]
            if not path.is_file():
                raise UserError(f"{path}: missing: {folder / 'index.json'} lists it")
            expected, found = shard["tokens"] * dtype.itemsize, path.stat().st_size
            if found != expected:
                raise UserError(f"{path}: {found} bytes: expected {expected}: the shard is truncated or changed")
            digest, most = hash_and_largest(path, dtype)
            if digest != shard["sha256"]:
                raise UserError(
                    f"{path}: sha256 {digest[:16]}...: expected {shard['sha256'][:16]}...: the shard is corrupted"
                )
            largest = max(largest, most)
    return largest


def _dtype(folder: Path, index: dict[str, Any]) -> np.dtype:
    if index["dtype"] not in ("uint16", "uint32"):
        raise UserError(f"{folder / 'index.json'}: dtype {index['dtype']!r}: expected uint16 or uint32")
    return np.dtype("<u2" if index["dtype"] == "uint16" else "<u4")


def open_split(folder: Path, index: dict[str, Any], name: str) -> Tokens:
    """The tokens of split ``name`` of prepared shards."""
    shards = index["splits"][name]["shards"]
    return Tokens([Part(folder / shard["file"], 0, shard["tokens"]) for shard in shards], _dtype(folder, index))


def open_flat(path: Path, val_fraction: float) -> tuple[Tokens, Tokens, list[Path]]:
    """nanoGPT's flat uint16 files: train.bin with val.bin beside it, else one .bin cut ``val_fraction`` before its end.

    ``path`` is the folder or a .bin in it. Also returns the files.

    Raises:
        UserError: a file that is empty or of an odd number of bytes.
    """
    dtype = np.dtype("<u2")
    train = path / "train.bin" if path.is_dir() else path
    val = train.parent / "val.bin"
    files = [train, val] if train.name == "train.bin" and val.is_file() else [train]
    counts = []
    for file in files:
        size = file.stat().st_size
        if size == 0 or size % 2:
            raise UserError(
                f"{file}: {size} bytes: expected uint16 tokens, an even number of bytes: empty or truncated"
            )
        counts.append(size // 2)
    if len(files) == 2:
        return Tokens([Part(train, 0, counts[0])], dtype), Tokens([Part(val, 0, counts[1])], dtype), files
    place = int((1 - val_fraction) * counts[0])
    return Tokens([Part(train, 0, place)], dtype), Tokens([Part(train, place, counts[0] - place)], dtype), files
