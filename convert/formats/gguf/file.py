"""GGUF, the container: metadata of typed values, a table of tensors, and their bytes at multiples of an alignment.

    magic "GGUF", u32 version, u64 tensors, u64 values; the values (key, type, value); the table (name, dimensions with
    the innermost first, type, offset); padding; data. All little-endian; a string is a u64 length and UTF-8.

Source: the specification, docs/gguf.md of ggml. Quantized types are those of blocks.py.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from convert.formats.gguf import blocks
from convert.formats.stream import Output
from mlxgpt.common.errors import UserError

MAGIC = b"GGUF"
PIECE = 1 << 18  # values that are converted at once

# number of a value's type -> name here and numpy's; bool, string and array are read on their own
_SCALARS = {
    0: ("u8", "<u1"),
    1: ("i8", "<i1"),
    2: ("u16", "<u2"),
    3: ("i16", "<i2"),
    4: ("u32", "<u4"),
    5: ("i32", "<i4"),
    6: ("f32", "<f4"),
    7: ("bool", "<u1"),
    10: ("u64", "<u8"),
    11: ("i64", "<i8"),
    12: ("f64", "<f8"),
}
_NUMBERS = {name: (number, dtype) for number, (name, dtype) in _SCALARS.items()}
_STRING, _ARRAY = 8, 9

# the tensor types beside the quantized ones
DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_TYPES = {0: "F32", 1: "F16", 30: "BF16"}
_NUMBERS_OF = {name: number for number, name in _TYPES.items()}
_MAX_HEADER = 1 << 28  # bytes; the largest vocabularies with their merges take about 20 MB
_ALIGNMENT = 32


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: ``shape`` as numpy has it, type one of F32, F16, BF16 or of blocks.readable(); bytes
    [start, stop)."""

    path: Path
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Value:
    """Metadata to write: ``type`` is u8 to f64, bool or str, or one of them with [] behind it for an array."""

    type: str
    value: Any


def size_of(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; rows of a quantized one are whole blocks."""
    count = math.prod(shape)
    if kind in DTYPES:
        return count * DTYPES[kind].itemsize
    block = blocks.readable()[kind]
    return count // block.values * block.bytes


class _Reader:
    """The header, of which no length is believed before it is held against what is left of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.at = path, file, size, 0

    def fail(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.fail(f"truncated: {what} at byte {self.at} takes {count} bytes of a file of {self.size} bytes")
        if self.at + count > _MAX_HEADER:
            raise self.fail(f"{what}: header of more than {_MAX_HEADER} bytes, expected less")
        found = self.file.read(count)
        if len(found) != count:
            raise self.fail("truncated while it was read")
        self.at += count
        return found

    def number(self, dtype: str, what: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0].item()

    def text(self, what: str) -> str:
        found = self.take(self.number("<u8", what), what)
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what}: not UTF-8: {error.reason} at byte {self.at - len(found) + error.start}") from None

    def name(self, what: str) -> str:
        """A text that may stand in a message of one line."""
        found = self.text(what)
        if not found.isprintable():
            raise self.fail(f"{what} {found[:60]!r}: expected characters that print")
        return found

    def count(self, each: int, what: str) -> int:
        """A number of things that take at least ``each`` bytes."""
        found = self.number("<u8", what)
        if found > (self.size - self.at) // each:
            raise self.fail(f"{what}: {found} of at least {each} bytes in the {self.size - self.at} bytes that follow")
        return found

    def value(self, key: str) -> Any:
        kind = self.number("<u4", key)
        if kind == _STRING:
            return self.text(key)
        if kind in _SCALARS:
            return self._boolean(key, kind, self.number(_SCALARS[kind][1], key))
        if kind != _ARRAY:
            raise self.fail(f"{key}: value of type {kind}, expected 0 to 12")
        kind = self.number("<u4", key)
        if kind == _STRING:
            return [self.text(key) for _ in range(self.count(8, key))]
        if kind not in _SCALARS:
            raise self.fail(f"{key}: array of type {kind}: expected numbers, booleans or strings")
        dtype = np.dtype(_SCALARS[kind][1])
        found = np.frombuffer(self.take(self.count(dtype.itemsize, key) * dtype.itemsize, key), dtype)
        return [self._boolean(key, kind, one) for one in found.tolist()] if kind == 7 else found

    def _boolean(self, key: str, kind: int, value: Any) -> Any:
        if kind != 7:
            return value
        if value not in (0, 1):
            raise self.fail(f"{key} = {value}: expected a boolean, 0 or 1")
        return bool(value)


def is_gguf(path: Path) -> bool:
    """Whether the file starts as a GGUF file does."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata (arrays of numbers as numpy's, of strings and booleans as lists) and where every tensor lies.

    Raises:
        UserError: the file is missing, no GGUF of version 2 or 3, truncated, untrue of itself, or of another type.
    """
    try:
        with open(path, "rb") as file:
            return _read(_Reader(path, file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _read(reader: _Reader) -> tuple[dict[str, Any], dict[str, Stored]]:
    found = reader.take(min(4, reader.size), "magic")
    if found != MAGIC:
        raise reader.fail(f"magic {found!r}, expected {MAGIC!r}")
    version = reader.number("<u4", "version")
    if version & 0xFFFF == 0 and version:
        raise reader.fail("big-endian GGUF, expected little-endian")
    if version not in (2, 3):
        raise reader.fail(f"GGUF version {version}, expected 2 or 3")
    n_tensors = reader.count(24, "number of tensors")
    n_values = reader.count(13, "number of metadata values")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = reader.name("metadata key")
        if key in metadata:
            raise reader.fail(f"metadata key {key!r} is there twice")
        metadata[key] = reader.value(key)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 16:
        raise reader.fail(f"general.alignment = {alignment!r}: expected a power of two, 8 to 65536")
    table = _table(reader, n_tensors)
    return metadata, _placed(reader, table, alignment)


def _table(reader: _Reader, count: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    table: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = reader.name("tensor name")
        if name in table:
            raise reader.fail(f"tensor {name} is there twice")
        n_dims = reader.number("<u4", name)
        if not 1 <= n_dims <= 4:
            raise reader.fail(f"{name}: {n_dims} dimensions, expected 1 to 4")
        shape = tuple(reader.number("<u8", name) for _ in range(n_dims))[::-1]
        number = reader.number("<u4", name)
        kind = _TYPES.get(number) or blocks.named(number)
        if kind is None or (kind not in DTYPES and kind not in blocks.readable()):
            known = ", ".join([*DTYPES, *blocks.readable()])
            raise reader.fail(f"{name} is {kind or f'of type {number}'}, expected one of {known}")
        if not all(shape) or math.prod(shape) >= 1 << 63:
            raise reader.fail(f"{name}: shape {list(shape)}: expected positive numbers")
        whole = 1 if kind in DTYPES else blocks.readable()[kind].values
        if shape[-1] % whole:
            raise reader.fail(f"{name}: {kind} with rows of {shape[-1]}, expected a multiple of {whole}")
        table[name] = kind, shape, reader.number("<u8", name)
    return table


def _placed(reader: _Reader, table: Mapping[str, tuple[str, tuple[int, ...], int]], step: int) -> dict[str, Stored]:
    """Where the tensors lie: one after the other, each at the first multiple of the alignment, up to the file's end."""
    base = -(-reader.at // step) * step
    placed = {}
    for name, (kind, shape, offset) in table.items():
        size = size_of(kind, shape)
        if base + offset + size > reader.size:
            raise reader.fail(
                f"{name}: truncated: data ends at byte {base + offset + size} of a file of {reader.size} bytes"
            )
        placed[name] = Stored(reader.path, kind, shape, base + offset, base + offset + size)
    end = reader.at
    for name, stored in sorted(placed.items(), key=lambda item: item[1].start):
        expected = -(-end // step) * step
        if stored.start != expected:
            raise reader.fail(f"{name}: data starts at byte {stored.start}, expected {expected}, after the one before")
        end = stored.stop
    if reader.size > -(-end // step) * step:
        raise reader.fail(f"{reader.size} bytes long, expected {end} by its header")
    return placed


def read_stored(stored: Stored) -> np.ndarray:
    """The tensor; a quantized one as float32, a piece at a time."""
    if stored.type in DTYPES:
        return _bytes(stored, stored.start, stored.stop).view(DTYPES[stored.type]).reshape(stored.shape)
    made = np.empty(math.prod(stored.shape), np.float32)
    block = blocks.readable()[stored.type]
    for at in range(0, made.size, PIECE):
        count = min(PIECE, made.size - at) // block.values
        start = stored.start + at // block.values * block.bytes
        raw = _bytes(stored, start, start + count * block.bytes)
        made[at : at + count * block.values] = blocks.dequantize(raw, stored.type)
    return made.reshape(stored.shape)


def _bytes(stored: Stored, start: int, stop: int) -> np.ndarray:
    try:
        found = np.fromfile(stored.path, dtype=np.uint8, count=stop - start, offset=start)
    except OSError as error:
        raise UserError(f"{stored.path}: {error.strerror}") from None
    if found.size != stop - start:
        raise UserError(f"{stored.path}: truncated while it was read")
    return found


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded


def _value(value: Value) -> bytes:
    kind = value.type.removesuffix("[]")
    number = _STRING if kind == "str" else _NUMBERS[kind][0]
    if kind == value.type:
        body = _text(value.value) if kind == "str" else np.array(value.value, _NUMBERS[kind][1]).tobytes()
        return number.to_bytes(4, "little") + body
    parts = [_ARRAY.to_bytes(4, "little"), number.to_bytes(4, "little"), len(value.value).to_bytes(8, "little")]
    if kind == "str":
        parts += [_text(one) for one in value.value]
    else:
        parts.append(np.asarray(value.value, _NUMBERS[kind][1]).tobytes())
    return b"".join(parts)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    pieces: Callable[[str], Iterator[np.ndarray]],
    hashed: bool = False,
) -> str | None:
    """Writes a new file of version 3. ``tensors``: name -> type and shape; ``pieces`` gives a tensor's bytes.

    Returns its sha256, if ``hashed``.

    Raises:
        OSError: the system refuses to write.
    """
    table, offset = [], 0
    for name, (kind, shape) in tensors.items():
        dims = b"".join(size.to_bytes(8, "little") for size in shape[::-1])
        number = (_NUMBERS_OF[kind] if kind in DTYPES else blocks.number_of(kind)).to_bytes(4, "little")
        table.append(_text(name) + len(shape).to_bytes(4, "little") + dims + number + offset.to_bytes(8, "little"))
        offset += -(-size_of(kind, shape) // _ALIGNMENT) * _ALIGNMENT
    counts = len(tensors).to_bytes(8, "little") + len(metadata).to_bytes(8, "little")
    values = [_text(key) + _value(value) for key, value in metadata.items()]
    head = b"".join([MAGIC, (3).to_bytes(4, "little"), counts, *values, *table])
    with Output(path, hashed) as out:
        out.write(head + bytes(-len(head) % _ALIGNMENT))
        for name, (kind, shape) in tensors.items():
            written = 0
            for piece in pieces(name):
                out.write(piece)
                written += piece.nbytes
            assert written == size_of(kind, shape), f"{name}: {written} bytes, expected {size_of(kind, shape)}"
            out.write(bytes(-written % _ALIGNMENT))
    return out.sha256
