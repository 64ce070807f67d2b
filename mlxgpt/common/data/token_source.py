"""Batches of tokens as pure functions of (seed, step), from shards of any size, and windows for evaluation.

B rows, T = block_size tokens a row; targets are tokens shifted by one. ``random``: B windows with replacement, as
nanoGPT draws them. ``epoch``: the split is cut into non-overlapping windows and every one is seen once an epoch, in an
order that a keyed permutation gives window by window, so nothing grows with the corpus.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import DataConfig, TrainConfig
from mlxgpt.common.data import prepare, shards
from mlxgpt.common.data import split as splitting
from mlxgpt.common.data.shards import Tokens
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.load import KINDS, has_tokenizer, load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

_STEP = 64  # widths of batches of short texts are multiples of it


class TokenSource:
    """batch.Source over the tokens of two splits."""

    def __init__(
        self,
        train: Tokens,
        val: Tokens,
        block_size: int,
        train_config: TrainConfig,
        sampling: str = "random",
        digest: dict[str, str] | None = None,
        vocab_size: int = 0,
        largest: int = -1,
        folder: Path = Path("."),
        val_bytes: int = 0,
        separator: int | None = None,
        begins_with: list[int] | None = None,
        held_out: dict[str, Any] | None = None,
    ) -> None:
        self._train, self._val, self._block = train, val, block_size
        self._rows, self._seed, self._sampling = train_config.batch_size, train_config.seed, sampling
        self._eval_batches = train_config.eval_batches
        self.digest = digest or {}
        self.vocab_size = vocab_size
        """Rows that the embedding needs: the tokenizer's size, or one more than the largest token."""
        self.largest = largest
        """The largest token in the data."""
        self.folder = folder
        """Where the shards or flat files lie."""
        self.n_train_tokens, self.n_val_tokens = len(train), len(val)
        self.val_bytes = val_bytes
        """UTF-8 bytes that the validation tokens stand for; 0 where nobody counted them."""
        self.separator = separator
        """The token that stands between documents; None where there are none to tell apart."""
        self.begins_with = begins_with
        """What was put before each document; None where nobody knows, as of a flat .bin."""
        self.held_out = held_out or {}
        """What ``split.describe`` says of the validation text; empty where nobody counted."""
        for name, count in (("validation", len(val)), ("training", len(train))):
            if count < block_size + 1:
                raise UserError(
                    f"{name} split: {count} tokens: expected at least model.block_size + 1 = {block_size + 1}: "
                    "a longer corpus, another data.val_fraction or a smaller block"
                )
        self._windows = (len(train) - 1) // block_size

    def compare_beginnings(self, tokenizer: Tokenizer, name: str, say: Callable[[str], None]) -> None:
        """Says where documents begin otherwise in the data than ``tokenizer``, called ``name``, has it."""
        found, wanted = self.begins_with, beginning.opening(tokenizer)
        if found is not None and found != wanted:
            before, after = (beginning.shown(tokenizer, ids) for ids in (found, wanted))
            say(
                f"data: documents in {self.folder} begin with {before}, where {name} has {after}: "
                "mlxgpt data prepare makes them anew"
            )

    def as_trained(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer of a model trained on this: where it begins texts with nothing, the separator begins them."""
        separated = self.separator is not None and self.separator == tokenizer.eos_id
        return beginning.with_separator(tokenizer) if separated and not self.begins_with else tokenizer

    @property
    def statistics(self) -> dict[str, Any]:
        """What a run's environment.json says of its data; ``val_bytes`` is 0 where nobody counted them."""
        counts = {"train_tokens": len(self._train), "val_tokens": len(self._val), "val_bytes": self.val_bytes}
        return {**counts, **({"held_out": self.held_out} if self.held_out else {})}

    def text(self, split: str, count: int) -> np.ndarray:
        """The first ``count`` tokens of split ``train`` or ``val`` as they follow each other, int32."""
        tokens = self._train if split == "train" else self._val
        return tokens.read(0, min(count, len(tokens)))

    def batch(self, step: int) -> Batch:
        """The global batch of ``step`` (from 1): a pure function of (seed, step)."""
        if self._sampling == "random":
            high = len(self._train) - self._block
            starts = rng.integers(self._seed, "batch", step, count=self._rows, high=high)
        else:
            starts = self._epoch_windows(step) * self._block
        rows = np.stack([self._train.read(int(start), self._block + 1) for start in starts])
        return Batch(
            tokens=rows[:, :-1],
            targets=rows[:, 1:],
            weights=np.ones((self._rows, self._block), np.float32),
            row_ids=tuple(f"train token {start}" for start in starts),
        )

    def _epoch_windows(self, step: int) -> np.ndarray:
        """The windows of ``step``'s rows: row r of all rows so far is place r % windows of epoch r // windows."""
        rows = np.arange((step - 1) * self._rows, step * self._rows, dtype=np.int64)
        epochs, places = rows // self._windows, rows % self._windows
        return np.array(
            [permuted(self._seed, int(e), int(p), self._windows) for e, p in zip(epochs, places, strict=True)]
        )

    def validation(self) -> Iterator[Batch]:
        """The validation batches, the same each time: every token once, or ``eval_batches`` evenly spaced batches.

        All have the same shape; what pads the last one has weight 0.
        """
        size = self._rows * self._block
        total = -(-(len(self._val) - 1) // size)
        chosen: Sequence[int] = range(total)
        if 0 < self._eval_batches < total:
            chosen = [i * total // self._eval_batches for i in range(self._eval_batches)]
        for index in chosen:
            start = index * size
            count = min(size, len(self._val) - 1 - start)
            yield _filled(self._val.read(start, count + 1), self._rows, self._block, f"val token {start}")


def _filled(tokens: np.ndarray, rows: int, block: int, where: str) -> Batch:
    """A batch of consecutive windows from a run of tokens, the rest padded with token 0 and weight 0."""
    count = len(tokens) - 1

    def fill(array: np.ndarray) -> np.ndarray:
        return np.pad(array, (0, rows * block - count)).reshape(rows, block)

    return Batch(
        tokens=fill(tokens[:-1]),
        targets=fill(tokens[1:]),
        weights=fill(np.ones(count, np.float32)),
        row_ids=tuple(f"{where} + {row * block}" for row in range(rows)),
    )


def permuted(seed: int, epoch: int, place: int, count: int) -> int:
    """The window at ``place`` of an epoch's order of ``count`` windows, in constant memory.

    A Feistel network of six rounds over the smallest even number of bits that holds ``count``, walked until the result
    is below it (Black and Rogaway, 2002): a permutation of range(count). The round keys are Philox words.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = rng.philox(seed, "epoch", epoch).random_raw(6).tolist()
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 40 & mask)
        place = left << half | right
        if place < count:
            return place


def windows(
    tokens: np.ndarray | Tokens,
    block_size: int,
    batch_size: int,
    stride: int | None = None,
    starts: Sequence[int] = (0,),
    context: int = 1,
) -> Iterator[Batch]:
    """Batches in which every token of a text but its first ``context`` is a target exactly once.

    Windows of ``block_size`` advance by ``stride`` (default: block_size, no overlap). Where they overlap, what an
    earlier window scored has weight 0 and is context. A text begins at each of ``starts``, and no window holds two.
    Padding has weight and position 0; batches of one text have the same shape, those of several are as wide as they
    need.

    Raises:
        UserError: fewer than two tokens, or a stride outside 1 to block_size.
    """
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UserError(f"stride {stride}: expected 1 to the block of {block_size}")
    if len(tokens) < 2:
        raise UserError(f"text of {len(tokens)} tokens: expected at least 2, to predict one from another")
    rows = _windows(starts, len(tokens), block_size, stride, context)
    while held := list(itertools.islice(rows, batch_size)):
        width = max(end - start for start, end, _ in held)
        width = block_size if len(starts) == 1 else min(block_size, -(-width // _STEP) * _STEP)
        arrays = np.zeros((4, batch_size, width), np.int64)
        for row, (start, end, scored) in enumerate(held):
            arrays[0, row, : end - start] = tokens[start:end]
            arrays[1, row, : end - start] = tokens[start + 1 : end + 1]
            arrays[2, row, scored - start : end - start] = 1
            arrays[3, row, : end - start] = np.arange(end - start)
        ints = arrays.astype(np.int32)
        yield Batch(ints[0], ints[1], arrays[2].astype(np.float32), positions=ints[3])


def _windows(
    starts: Sequence[int], length: int, block_size: int, stride: int, context: int
) -> Iterator[tuple[int, int, int]]:
    """(first token, end, first token whose successor is scored) of every window of every text."""
    for first, following in zip(starts, [*starts[1:], length], strict=True):
        targets = following - first - 1
        count = 1 + max(0, -(-(targets - block_size) // stride)) if targets >= context else 0
        for index in range(count):
            start = index * stride
            scored = max(context - 1, start - stride + block_size if index else 0)
            end = min(start + block_size, targets)
            if scored < end:
                yield first + start, first + end, first + scored


def open_data(
    data: DataConfig,
    model_block_size: int,
    train: TrainConfig,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> tuple[TokenSource, Tokenizer | None]:
    """The source of a recipe's batches and its tokenizer; prepares shards, or reuses those in the cache.

    The tokenizer begins texts as the model learns it: where it put nothing there, with the separator of documents.
    The tokenizer is None for a flat .bin without one. ``out`` is the run's folder: where shards that ``data export``
    packed were unpacked into it (as ``data/``), they are the source.

    Raises:
        UserError: anything wrong with the source, the tokenizer, the shards or the splits' lengths.
    """
    path = Path(data.source).expanduser() if isinstance(data.source, str) else None  # of several files: none is shards
    carried = _carried(Path(out) / "data") if out is not None else None
    if carried is not None:
        path = carried
        say(f"data: {path}, which the run carries")
    if path and is_flat(path):
        return _open_flat(path, data, model_block_size, train, say)
    folder = path if path and shards.is_shards(path) else prepare.cached(data, say)
    index = shards.read_index(folder)
    try:
        largest = shards.verify(folder, index)
    except UserError as error:
        raise UserError(f"{error}" + ("" if folder == path else f" (remove {folder} to have it made again)")) from None
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.digest != index["tokenizer"]["digest"]:
        raise UserError(
            f"{folder / 'tokenizer'}: sha256 {tokenizer.digest[:16]}...: not the tokenizer that index.json names"
        )
    if folder == path and data.tokenizer not in KINDS and load_tokenizer(data.tokenizer).digest != tokenizer.digest:
        raise UserError(f"data.tokenizer = {data.tokenizer}: the shards in {path} were made with another tokenizer")
    if largest >= tokenizer.n_vocab:
        raise UserError(f"{folder}: token {largest}: expected ids below the tokenizer's {tokenizer.n_vocab}")
    digest = {s["file"]: s["sha256"] for split in index["splits"].values() for s in split["shards"]}
    held_out = splitting.describe(index)
    source = TokenSource(
        splitting.without_gap(shards.open_split(folder, index, "train"), index, model_block_size),
        shards.open_split(folder, index, "val"),
        model_block_size,
        train,
        data.sampling,
        digest | {"tokenizer": tokenizer.digest},
        tokenizer.n_vocab,
        largest,
        folder,
        index["splits"]["val"]["bytes"],
        index["eos_id"] if index["splits"]["train"]["documents"] > 1 else None,
        index.get("begins_with", []),
        held_out,
    )
    counts = f"{source.n_train_tokens:,} tokens to train, {source.n_val_tokens:,} to validate"
    say(f"data: {index['source']['name']}: {counts}, {tokenizer.kind} of {tokenizer.n_vocab:,}")
    for line in splitting.told(held_out, f"{model_block_size:,} tokens"):
        say(line)
    source.compare_beginnings(tokenizer, "their tokenizer", say)
    return source, source.as_trained(tokenizer)


def is_flat(path: Path) -> bool:
    """Whether a path is a flat .bin, or nanoGPT's folder of them."""
    return path.suffix == ".bin" or ((path / "train.bin").is_file() and not shards.is_shards(path))


def _separator(tokens: Tokens, tokenizer: Tokenizer | None) -> int | None:
    """The end-of-text token where it occurs among ``tokens``."""
    eos = tokenizer.eos_id if tokenizer else None
    return eos if eos is not None and any((block == eos).any() for block in tokens.blocks()) else None


def _carried(folder: Path) -> Path | None:
    """What ``data export`` packed and somebody unpacked into ``folder``: shards, or a flat .bin."""
    bins = [folder / "train.bin", *sorted(folder.glob("*.bin"))]
    return folder if shards.is_shards(folder) else next((path for path in bins if path.is_file()), None)


def _open_flat(
    path: Path, data: DataConfig, block_size: int, train: TrainConfig, say: Callable[[str], None]
) -> tuple[TokenSource, Tokenizer | None]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    first, second, files = shards.open_flat(path, data.val_fraction)
    beside = files[0].parent / "tokenizer"
    if has_tokenizer(beside):
        tokenizer = load_tokenizer(beside)
    else:
        tokenizer = None if data.tokenizer in KINDS else load_tokenizer(data.tokenizer)
    digest, largest = {}, -1
    for file in files:
        digest[file.name], most = shards.hash_and_largest(file)
        largest = max(largest, most)
    if tokenizer is not None and largest >= tokenizer.n_vocab:
        raise UserError(f"{path}: token {largest}: expected ids below the tokenizer's {tokenizer.n_vocab}")
    if tokenizer is None:
        meta = files[0].parent / "meta.pkl"
        cure = f"data.tokenizer={meta} is read" if meta.exists() else "data.tokenizer names one"
        say(f"data: a .bin has no tokenizer: samples print ids unless {cure}")
    if len(files) == 1:
        say(f"data: {files[0]}: no val.bin beside it: its last {data.val_fraction:.0%} validate")
    if tokenizer is not None:
        digest["tokenizer"] = tokenizer.digest
    size = largest + 1 if tokenizer is None else tokenizer.n_vocab
    source = TokenSource(
        first, second, block_size, train, data.sampling, digest, size, largest, files[0].parent,
        separator=_separator(first, tokenizer),
    )  # fmt: skip
    say(f"data: {path}: {source.n_train_tokens:,} tokens to train, {source.n_val_tokens:,} to validate")
    return source, source.as_trained(tokenizer) if tokenizer else None
