"""GGUF files of llama.cpp: the weights in F32, F16, BF16 or quantized, the tokenizer and chat template in the metadata.

Vectors and learned positions are F32, as llama.cpp's converter has them. What the standard keys cannot say stands under
``mlxgpt.config`` (our config.json), and is held against the standard keys when it is read; without it they are enough.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.gguf import blocks
from convert.formats.gguf import names as gguf_names
from convert.formats.gguf import restore as gguf_restore
from convert.formats.gguf import rope as gguf_rope
from convert.formats.gguf import tokenizer as gguf_tokenizer
from convert.formats.gguf.blocks import BLOCK
from convert.formats.gguf.file import DTYPES, PIECE, Stored, Value, is_gguf, read_stored, write_gguf
from convert.formats.gguf.split import read_parts
from convert.formats.opened import Opened, Options, Tensor
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import TensorError, UserError
from mlxgpt.common.folders.model_folder import DTYPES as NAMED
from mlxgpt.common.folders.tensors import Entry
from mlxgpt.common.model import families, params

KIND = "file"
BESIDE = ".Modelfile"
_OWN, _WIDENED, _NORM = "mlxgpt.config", "mlxgpt.widened", "mlxgpt.norm."
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32} | blocks.FILE_TYPES  # general.file_type, of most matrices
_BITS = {4: "Q4_0", 8: "Q8_0"}


def recognize(path: Path) -> bool:
    """A file that starts with GGUF."""
    return path.is_file() and is_gguf(path)


def read(path: Path) -> Opened:
    """The model in a GGUF file, ours or another's.

    Raises:
        UserError: see ``read_gguf``, ``gguf_names.config_from``; a tensor is missing, unexpected or of another shape.
    """
    path = Path(path)
    where = str(path)
    values, stored, parts = read_parts(path)
    turned = {name: read_stored(stored[name]) for name in gguf_rope.TENSORS if name in stored}
    extra: dict[str, Any] = {}
    if _OWN in values:
        config, extra = gguf_names.own_config(where, values[_OWN], values.get("general.architecture"), len(stored))
        gguf_names.check_keys(where, config, values)
        notes: list[str] = []
        wanted = params.table(families.on_disk(config))
    else:
        config, notes = gguf_names.config_from(where, values, stored)
        wanted = params.table(config)
        extra = _ids(values)
    gguf_rope.check_tensors(where, config, turned)
    names = {gguf_names.name_of(config, name): name for name in wanted}
    for name in names:
        if name not in stored:
            raise TensorError(name, f"{where}: tensor {name} is missing")
    for name, one in stored.items():
        if name not in names and name not in gguf_rope.TENSORS:
            raise TensorError(name, f"{where}: unexpected tensor {name} {list(one.shape)}")
        if name in names and one.shape != wanted[names[name]].shape:
            expected = list(wanted[names[name]].shape)
            raise TensorError(name, f"{where}: {name} has shape {list(one.shape)}, expected {expected}")
    widened = _widened(where, values)
    tensors = {}
    for name, ours in names.items():
        if ours in params.table(config):
            exact = values.get(_NORM + name)
            tensors[ours] = _tensor(config, ours, name, stored[name], widened.get(name), exact)
        elif read_stored(stored[name]).any():
            raise UserError(f"{where}: {name} is not zero, but {_OWN} says so under mlxgpt")
    model = families.config_to_hf(config)
    files, left = gguf_restore.restore(values, path, config.vocab_size, gguf_names.arch_of(config), model)
    if _OWN not in values and (ends := gguf_restore.ends_of(values, files, model)) is not None:
        extra["eos_token_id"] = ends
    tensors = {name: tensors[name] for name in params.table(config)}
    return Opened(path, "gguf", config, tensors, parts, dict(files), extra, None, notes + left)


def _ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's token ids."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {ours: values.get(f"tokenizer.ggml.{key}") for ours, key in keys.items()}
    return {ours: value for ours, value in found.items() if type(value) is int}


def _widened(where: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Which vectors were float16 or bfloat16 before they became F32."""
    if _WIDENED not in values:
        return {}
    try:
        found = json.loads(values[_WIDENED])
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {_WIDENED}: not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(one, str) and one in NAMED for one in found.values()):
        raise UserError(f"{where}: {_WIDENED}: expected float16 or bfloat16 by tensor name")
    return found


def _tensor(
    config: ModelConfig, ours: str, name: str, stored: Stored, widened: str | None, exact: np.ndarray | None
) -> Tensor:
    heads = gguf_names.heads_of(config, ours)
    shifted = _shifted(config, ours)
    dtype = DTYPES.get(stored.type, np.dtype(np.float32))
    if widened and dtype == np.float32:
        dtype = NAMED[widened]
    if exact is not None and (not isinstance(exact, np.ndarray) or exact.shape != stored.shape or not shifted):
        raise UserError(f"{stored.path}: {_NORM}{name}: expected {list(stored.shape)} float32 numbers of a norm")

    def load() -> np.ndarray:
        array = read_stored(stored)
        if shifted:
            array = _unshifted(stored, name, array, exact)
        narrow = array.astype(dtype, copy=False)
        if dtype.itemsize < array.dtype.itemsize and not np.array_equal(
            narrow.astype(array.dtype), array, equal_nan=True
        ):
            raise UserError(f"{stored.path}: {name} does not fit {dtype}, as {_WIDENED} says")
        return gguf_names.rearranged(narrow, heads, back=True)

    as_is = heads is None and not shifted and stored.type in DTYPES and dtype == DTYPES[stored.type]
    entry = Entry(stored.path, stored.type, stored.shape, stored.start, stored.stop) if as_is else None
    return Tensor(stored.shape, dtype, load, entry)


def _shifted(config: ModelConfig, name: str) -> bool:
    """Whether the file has 1 + w in place of w: norms of gemma."""
    return config.norm == "rms1" and ("ln_" in name or "_norm." in name)


def _unshifted(stored: Stored, name: str, array: np.ndarray, exact: np.ndarray | None) -> np.ndarray:
    if exact is None:
        return array.astype(np.float32) - np.float32(1)
    weight = exact.astype(np.float32)
    if not np.array_equal(np.float32(1) + weight, array.astype(np.float32), equal_nan=True):
        raise UserError(f"{stored.path}: {name} is not 1 + {_NORM}{name}")
    return weight


def write(opened: Opened, place: Path, options: Options) -> list[str]:
    """One file with all of the model; what llama.cpp would compute otherwise is returned as notes.

    Raises:
        UserError: settings that GGUF does not have, or a weight that is not finite or does not fit its type.
    """
    config = opened.config
    gguf_names.arch_of(config)  # there is one
    quantized = _quantized_type(options)
    if options.dtype is not None and options.dtype not in NAMED:
        raise UserError(f"dtype {options.dtype!r}: expected one of {', '.join(NAMED)}")
    notes = gguf_names.deviations(config)
    wanted = params.table(families.on_disk(config))
    names = {gguf_names.name_of(config, name): name for name in wanted}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, ours in names.items():
        tensors[name] = _type(opened, ours, wanted[ours].shape, options, quantized), wanted[ours].shape
    kept = [name for name, (_, shape) in tensors.items() if quantized and len(shape) > 1 and shape[-1] % BLOCK]
    if kept:
        notes.append(
            f"{len(kept)} matrices have rows that 32 does not divide and are not quantized: {', '.join(kept[:3])}"
        )
    if opened.moments:
        notes.append("GGUF has no place for AdamW's moments: they are left behind")
    turned = gguf_rope.tensors(config)
    tensors |= {name: ("F32", array.shape) for name, array in turned.items()}
    metadata, left = _metadata(opened, options, tensors, names)

    def pieces(name: str) -> Iterator[np.ndarray]:
        kind, shape = tensors[name]
        if name in turned:
            yield turned[name].view(np.uint8)
        elif names[name] not in opened.tensors:
            yield np.zeros(int(np.prod(shape)) * DTYPES[kind].itemsize, np.uint8)
        else:
            yield from _pieces(config, opened, names[name], kind, options.allow_nan)

    digest = write_gguf(place, metadata, tensors, pieces, options.hash)
    if digest:
        options.digests[place.name] = digest
    return notes + left


def beside(opened: Opened, dst: Path) -> bytes | None:
    """The Modelfile for the GGUF file at ``dst``; None where it has no tokenizer, which Ollama cannot do without."""
    model = families.config_to_hf(opened.config) | opened.extra
    return gguf_tokenizer.modelfile_of(opened.companions, model, dst.name, opened.config.block_size)


def _quantized_type(options: Options) -> str | None:
    """The type that --gguf-type or --bits names; None for none.

    Raises:
        UserError: both name one, and not the same; or bits that stand for no type.
    """
    if options.bits and options.bits not in _BITS:
        raise UserError(f"gguf with {options.bits} bits: expected 4 (Q4_0), 8 (Q8_0), or none")
    by_bits = _BITS.get(options.bits)
    named = options.gguf_type.upper() if options.gguf_type else by_bits
    if named is not None and named not in blocks.FILE_TYPES:
        known = ", ".join(kind.lower() for kind in blocks.FILE_TYPES)
        raise UserError(f"--gguf-type {options.gguf_type}: expected one of {known}")
    if by_bits and named != by_bits:
        raise UserError(f"--gguf-type {options.gguf_type} with --bits {options.bits}, which is {by_bits}: expected one")
    return named


def _type(opened: Opened, name: str, shape: tuple[int, ...], options: Options, quantized: str | None) -> str:
    if len(shape) == 1 or name == "wpe.weight":
        return "F32"
    if quantized and shape[-1] % BLOCK == 0:
        return quantized
    dtype = NAMED[options.dtype] if options.dtype else opened.tensors[name].dtype
    return next((kind for kind, one in DTYPES.items() if one == dtype), "F32")


def _metadata(
    opened: Opened, options: Options, tensors: Mapping[str, tuple[str, tuple[int, ...]]], names: Mapping[str, str]
) -> tuple[dict[str, Value], list[str]]:
    config = opened.config
    matrices = [kind for kind, shape in tensors.values() if len(shape) > 1]
    most = max(_FILE_TYPES, key=matrices.count)
    arch = gguf_names.arch_of(config)
    files, notes = gguf_tokenizer.describe(
        opened.companions, config.vocab_size, families.config_to_hf(config) | opened.extra, arch
    )
    made = {
        "general.architecture": Value("str", arch),
        "general.type": Value("str", "model"),
        "general.name": Value("str", gguf_tokenizer.loadable_name(opened.path.stem or config.family, files)),
        "general.file_type": Value("u32", _FILE_TYPES[most]),
        "general.quantization_version": Value("u32", 2),
    }
    made |= gguf_names.metadata(config)
    made |= files
    values = families.config_to_hf(config)
    made[_OWN] = Value(
        "str", json.dumps(values | {key: opened.extra[key] for key in opened.extra if key not in values})
    )
    small = {name: tensor for name, ours in names.items() if (tensor := opened.tensors.get(ours))}
    widened = {
        name: next(spelled for spelled, dtype in NAMED.items() if dtype == tensor.dtype)
        for name, tensor in small.items()
        if tensors[name][0] == "F32" and tensor.dtype in (NAMED["float16"], NAMED["bfloat16"])
    }
    if widened and options.dtype is None:
        made[_WIDENED] = Value("str", json.dumps(widened))
    for name, tensor in small.items():
        if _shifted(config, names[name]):
            weight = tensor.read().astype(np.float32)
            if not np.array_equal((weight + np.float32(1)) - np.float32(1), weight, equal_nan=True):
                made[_NORM + name] = Value("f32[]", weight)
    return made, notes


def _pieces(config: ModelConfig, opened: Opened, ours: str, kind: str, allow_nan: bool) -> Iterator[np.ndarray]:
    """A tensor's bytes as ``kind``, some rows at a time."""
    array = gguf_names.rearranged(opened.tensors[ours].read(), gguf_names.heads_of(config, ours))
    rows = max(PIECE // max(array[0].size, 1), 1)
    for at in range(0, len(array), rows):
        piece = array[at : at + rows]
        if not np.isfinite(piece).all() and not allow_nan:
            raise UserError(
                f"{opened.path}: {ours} has values that are not finite (NaN or Inf); --allow-nan keeps them"
            )
        if _shifted(config, ours):
            piece = piece.astype(np.float32) + np.float32(1)
        if kind in blocks.FILE_TYPES:
            made = blocks.quantize(np.ascontiguousarray(piece, dtype=np.float32), kind)
            fits = blocks.scales_fit(made, kind)
        else:
            with np.errstate(over="ignore"):
                cast = np.ascontiguousarray(piece, dtype=DTYPES[kind])
            fits = piece.dtype.itemsize <= cast.dtype.itemsize or np.isfinite(cast).all()
            made = cast.reshape(-1).view(np.uint8)
        if not fits and not allow_nan:
            raise UserError(f"{opened.path}: {ours}: values do not fit {kind}: expected BF16 or F32")
        yield made
