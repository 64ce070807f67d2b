"""llama2.c's .bin: versions 0 and 1 (float32) in and out, version 2 (Q8_0) in.

All numbers are little-endian. Queries and keys are stored for rotation of neighboring pairs, ours for halves of a
head; the rows are reordered, nothing is computed. Version 0 also holds the rotation's cosines and sines, as the PyTorch
that exported them rounded them: how far they are from the nearest float32 stands under ``llama2c`` of config.json, so
that a file comes back byte for byte, wherever it was made.
"""

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.formats.limits import check_expressible, left_behind
from convert.formats.opened import Opened, Options, Tensor
from convert.formats.stream import Output, plain
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.tensors import Entry, read_tensor
from mlxgpt.common.model import families, params
from mlxgpt.common.tokenizers.foreign import llama2c as llama2c_tokenizer
from mlxgpt.common.tokenizers.protocol import FILES

KIND = "file"
BESIDE = ".tokenizer.bin"
_MAGIC = 0x616B3432
_SIZES = "<7i"  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len
_START = 256  # of the data after the header of versions 1 and 2
_LARGEST = 1 << 24  # of any size in a header; its product is then held against the file's
_FLOAT = np.dtype("<f4")
_TABLES = ("cos", "sin")
_OWN, _ULPS = "llama2c", "table_ulps"
# in the order of the files; {n} runs over the blocks
_MATRICES = tuple(f"h.{{n}}.{m}.weight" for m in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.c_proj"))
_MLP = ("h.{n}.mlp.c_gate.weight", "h.{n}.mlp.c_proj.weight", "h.{n}.mlp.c_fc.weight")
_ORDER = {
    0: ("wte.weight", "h.{n}.ln_1.weight", *_MATRICES, "h.{n}.ln_2.weight", *_MLP, "ln_f.weight", *_TABLES),
    1: ("h.{n}.ln_1.weight", "h.{n}.ln_2.weight", "ln_f.weight", "wte.weight", *_MATRICES, *_MLP),
}


class _Header(NamedTuple):
    """What a file says before its data."""

    version: int
    config: ModelConfig
    group_size: int = 0


def recognize(path: Path) -> bool:
    """A file with the magic number, or that begins with seven sizes as version 0 does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(_START)
    if len(start) < 28:
        return False
    if int.from_bytes(start[:4], "little") == _MAGIC:
        return True
    return _plausible(struct.unpack(_SIZES, start[:28]))


def _plausible(sizes: tuple[int, ...]) -> bool:
    dim, hidden, layers, heads, kv_heads, vocab, length = (*sizes[:5], abs(sizes[5]), sizes[6])
    if not all(0 < size <= _LARGEST for size in (dim, hidden, layers, heads, kv_heads, vocab, length)):
        return False
    return dim % heads == 0 and heads % kv_heads == 0 and layers <= 4096 and heads <= dim


def _read_header(path: Path) -> _Header:
    try:
        with open(path, "rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(start) < 28:
        raise UserError(f"{path}: {len(start)} bytes, which is less than a header")
    version, group_size, sizes = 0, 0, struct.unpack(_SIZES, start[:28])
    if int.from_bytes(start[:4], "little") != _MAGIC:
        shared = sizes[5] > 0
        sizes = (*sizes[:5], abs(sizes[5]), sizes[6])
    else:
        if len(start) < _START:
            raise UserError(f"{path}: {len(start)} bytes, which is less than a header of {_START}")
        version, sizes = struct.unpack("<i", start[4:8])[0], struct.unpack(_SIZES, start[8:36])
        if version not in (1, 2):
            raise UserError(f"{path}: version {version} of llama2.c: expected 1 or 2, or no magic number at all")
        if start[36] not in (0, 1):
            raise UserError(
                f"{path}: {start[36]} where the header says whether the head is the embedding: expected 0 or 1"
            )
        shared = start[36] == 1
        if version == 2:
            group_size = int.from_bytes(start[37:41], "little", signed=True)
        if any(start[41 if version == 2 else 37 :]):
            raise UserError(f"{path}: the rest of the header is not zero")
    if not _plausible(sizes) or (version and sizes[5] < 0):
        raise UserError(f"{path}: sizes {list(sizes)} in the header are no model's: truncated, or another format")
    try:
        config = _config(*sizes, tied=shared)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if version == 2 and (group_size < 1 or config.n_embd % group_size):
        raise UserError(f"{path}: groups of {group_size} values, expected a divisor of {config.n_embd}")
    return _Header(version, config, group_size)


def _config(
    dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, length: int, tied: bool
) -> ModelConfig:
    """The one kind of model that run.c runs."""
    sizes: dict[str, Any] = dict(n_layer=layers, n_head=heads, n_kv_head=kv_heads, n_embd=dim, n_hidden=hidden)
    sizes |= dict(vocab_size=vocab, block_size=length, tied=tied)
    return ModelConfig(family="llama", **families.FAMILIES["llama"].implied, **sizes)


def _shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Of one of the names in _ORDER."""
    c, kv, hidden = config.n_embd, config.n_kv_head * config.head_dim, config.n_hidden
    if name in _TABLES:
        return config.block_size, config.head_dim // 2
    if name in ("wte.weight", "lm_head.weight"):
        return config.vocab_size, c
    if "ln_" in name:
        return (c,)
    if name in _MATRICES:
        return (kv, c) if "k_proj" in name or "v_proj" in name else (c, c)
    return (c, hidden) if name.endswith("c_proj.weight") else (hidden, c)


def _places(header: _Header, quantized: bool | None = None) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, how many of them) in the order of the file; ``quantized``: only what is, or is not."""
    order = _ORDER[min(header.version, 1)]
    for name in (*order, *(() if header.config.tied else ("lm_head.weight",))):
        if quantized in (None, bool(header.version == 2 and "ln_" not in name)):
            yield name, _shape(header.config, name), header.config.n_layer if "{n}" in name else 1


def read(path: Path) -> Opened:
    """The model in a .bin; it has no tokenizer, and the ids that run.c begins and ends with are llama2.c's.

    Raises:
        UserError: not as long as its header says, or sizes and values that are no model's.
    """
    path = Path(path)
    header = _read_header(path)
    size, at = path.stat().st_size, 28 if header.version == 0 else _START
    expected = at
    for name, shape, count in _places(header):
        values = math.prod(shape) * count
        groups = header.group_size and "ln_" not in name
        expected += values + 4 * values // header.group_size if groups else 4 * values
    if size != expected:
        raise UserError(f"{path}: {size} bytes long, expected {expected} by its header")
    found = dict(_plain_tensors(path, header, at) if header.version < 2 else _quantized_tensors(path, header, at))
    own, notes = {}, []
    if header.version == 0:
        own = _read_tables(path, header.config, np.stack([found.pop(name).read() for name in _TABLES]))
    tensors = {name: found.pop(name) for name in params.table(header.config)}
    assert not found, f"not the model's: {sorted(found)}"
    if header.version == 2:
        notes.append(f"{path}: int8 in groups of {header.group_size}, read as the float32 that they stand for")
    ids = {"bos_token_id": 1, "eos_token_id": 2} if header.config.vocab_size > 2 else {}
    return Opened(path, "llama2c", header.config, tensors, (path,), extra=ids | own, notes=notes)


def _plain_tensors(path: Path, header: _Header, at: int) -> Iterator[tuple[str, Tensor]]:
    """Where every float32 tensor lies."""
    for name, shape, count in _places(header):
        for n in range(count):
            stop = at + 4 * math.prod(shape)
            entry = Entry(path, "F32", shape, at, stop)
            yield name.replace("{n}", str(n)), _tensor(header.config, name, shape, entry)
            at = stop


def _tensor(config: ModelConfig, name: str, shape: tuple[int, ...], entry: Entry) -> Tensor:
    heads = _heads(config, name)
    if not heads:
        return Tensor(shape, _FLOAT, lambda: read_tensor(entry), entry)
    return Tensor(shape, _FLOAT, lambda: halves(read_tensor(entry), heads))


def _heads(config: ModelConfig, name: str) -> int:
    """Of how many heads the rows are reordered; 0: none."""
    return config.n_head if "q_proj" in name else config.n_kv_head if "k_proj" in name else 0


def halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows for the rotation of halves, from rows for that of pairs."""
    return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def _pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """The reverse of ``halves``."""
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def _quantized_tensors(path: Path, header: _Header, at: int) -> Iterator[tuple[str, Tensor]]:
    """Norms in float32, then int8 matrices with a scale a group: after each matrix, or of an older file after all."""
    for name, shape, count in _places(header, quantized=False):
        for n in range(count):
            stop = at + 4 * math.prod(shape)
            entry = Entry(path, "F32", shape, at, stop)
            yield name.replace("{n}", str(n)), Tensor(shape, _FLOAT, _reads(entry), entry)
            at = stop
    parts = [
        (name.replace("{n}", str(n)), shape)
        for name, shape, count in _places(header, quantized=True)
        for n in range(count)
    ]
    sizes = [math.prod(shape) for _, shape in parts]
    after_all = _scales_after_all(path, header, at, sizes)
    scales = at + sum(sizes)
    for (name, shape), size in zip(parts, sizes, strict=True):
        groups = size // header.group_size
        if not after_all:
            scales = at + size
        whole = Entry(path, "I8", (groups, header.group_size), at, at + size)
        factors = Entry(path, "F32", (groups, 1), scales, scales + 4 * groups)
        yield name, Tensor(shape, _FLOAT, _dequantized(whole, factors, shape, _heads(header.config, name)))
        at = at + size if after_all else scales + 4 * groups
        scales += 4 * groups


def _reads(entry: Entry) -> Callable[[], np.ndarray]:
    return lambda: read_tensor(entry)


def _dequantized(whole: Entry, scales: Entry, shape: tuple[int, ...], heads: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = (read_tensor(whole).astype(np.float32) * read_tensor(scales)).reshape(shape)
        return halves(array, heads) if heads else array

    return read


def _scales_after_all(path: Path, header: _Header, at: int, sizes: list[int]) -> bool:
    """Where the embedding's scales are: what stands at the wrong place is no run of positive numbers."""
    count = sizes[0] // header.group_size
    likely = []
    for after_all, start in ((False, at + sizes[0]), (True, at + sum(sizes))):
        scales = read_tensor(Entry(path, "F32", (count,), start, start + 4 * count))
        # a scale is the largest value of its group over 127; int8 read as float32 is of any size and sign
        if np.isfinite(scales).all() and scales.min() >= 0 and scales.max() < 1e3:
            likely.append(after_all)
    if len(likely) != 1:
        raise UserError(f"{path}: no scales of the int8 values where llama2.c has them: damaged")
    return likely[0]


def _tables(config: ModelConfig) -> np.ndarray:
    """Cosines and sines, (2, block_size, head_dim / 2): the float32 nearest to those of llama2.c's float32 angles."""
    powers = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** powers
    angles = np.outer(np.arange(config.block_size, dtype=np.float32), frequencies).astype(np.float64)
    return np.stack((np.cos(angles), np.sin(angles))).astype(_FLOAT)


def _read_tables(path: Path, config: ModelConfig, found: np.ndarray) -> dict[str, Any]:
    """What config.json keeps of a version 0 file's tables, which must be of the one base that run.c knows."""
    made = _tables(config)
    if not np.allclose(found, made, rtol=0, atol=1e-4):
        raise UserError(f"{path}: its tables of cosines and sines are not those of rope_theta {config.rope_theta:g}")
    if found.tobytes() == made.tobytes():
        return {}
    ulps = found.view("<u4") - made.view("<u4")  # modulo 2**32
    return {_OWN: {_ULPS: base64.b64encode(zlib.compress(ulps.tobytes(), 9)).decode()}}


def _written_tables(opened: Opened) -> np.ndarray:
    """The tables of the .bin that the model is from; else the nearest."""
    made, own = _tables(opened.config), opened.extra.get(_OWN)
    if not isinstance(own, dict) or _ULPS not in own:
        return made
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(own[_ULPS], validate=True), made.nbytes + 1)
    except (TypeError, ValueError, zlib.error):
        unpacked = b""
    if len(unpacked) != made.nbytes:
        raise UserError(f"{opened.path}: {_OWN}.{_ULPS} of config.json: damaged, or not of {list(made.shape)} numbers")
    return (made.view("<u4") + np.frombuffer(unpacked, "<u4").reshape(made.shape)).view(_FLOAT)


def write(opened: Opened, place: Path, options: Options) -> list[str]:
    """A .bin of ``options.version`` that run.c runs; ``beside`` has the tokenizer.

    Raises:
        UserError: run.c has no such model, a dtype other than float32, or a value that is not finite.
    """
    c = opened.config
    able = _config(c.n_embd, c.n_hidden, c.n_layer, c.n_head, c.n_kv_head, c.vocab_size, c.block_size, c.tied)
    check_expressible(c, able, "llama2.c")
    if options.dtype not in (None, "float32"):
        raise UserError(f"--dtype {options.dtype}: llama2.c has float32 only")
    if options.version not in _ORDER:
        raise UserError(f"--version {options.version}: expected 0 or 1; version 2 (int8) is only read")
    header = _Header(options.version, c)
    sizes = [c.n_embd, c.n_hidden, c.n_layer, c.n_head, c.n_kv_head, c.vocab_size, c.block_size]
    if options.version == 0:
        sizes[5] = c.vocab_size if c.tied else -c.vocab_size
        start = struct.pack(_SIZES, *sizes)
    else:
        start = struct.pack("<I8iB", _MAGIC, options.version, *sizes, c.tied).ljust(_START, b"\0")
    with Output(place, options.hash) as out:
        out.write(start)
        tables = dict(zip(_TABLES, _written_tables(opened), strict=True))
        for name, _, count in _places(header):
            for n in range(count):
                if name in tables:
                    out.write(tables[name])
                    continue
                ours = name.replace("{n}", str(n))
                plain(ours, _reordered(c, ours, opened.tensors[ours]), _FLOAT, False, options).send(out)
    if out.sha256:
        options.digests[place.name] = out.sha256
    return _notes(opened)


def _reordered(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    heads = _heads(config, name)
    return Tensor(tensor.shape, tensor.dtype, lambda: _pairs(tensor.read(), heads)) if heads else tensor


def beside(opened: Opened, _: Path) -> bytes | None:
    """The tokenizer's .bin, which goes where the model does with the suffix BESIDE; None where run.c cannot have it."""
    return _tokenizer(opened)[0]


def _tokenizer(opened: Opened) -> tuple[bytes | None, list[str]]:
    """``beside``, and why there is none."""
    if not set(opened.companions) & set(FILES):
        return None, []
    try:
        return llama2c_tokenizer.write_tokenizer(opened.companions, opened.config.vocab_size), []
    except UserError as error:
        return None, [f"no {BESIDE}: {error}"]


def _notes(opened: Opened) -> list[str]:
    wide = sorted({tensor.dtype.name for tensor in opened.tensors.values()} - {"float32"})
    notes = [f"{' and '.join(wide)} widened to float32, the one dtype of llama2.c"] if wide else []
    made, why_not = _tokenizer(opened)
    kept = FILES if made else ()
    return (
        notes
        + why_not
        + list(left_behind(opened, "llama2.c", extra=("bos_token_id", "eos_token_id", _OWN), files=kept))
    )
