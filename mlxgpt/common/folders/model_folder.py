"""Read and write a Hugging Face model folder in numpy: config.json, safetensors, tokenizer files.

What is written loads in transformers and mlx-lm as it is; what they wrote is read strictly: every tensor that the
config asks for, in its shape, finite, and nothing else.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import RunError, TensorError, UserError
from mlxgpt.common.files import read_json, write_json
from mlxgpt.common.folders import head, mlx_lm_folder, quantized
from mlxgpt.common.folders.tensors import FLOATS, Stored, read_tensors, same_bytes, write_tensors
from mlxgpt.common.folders.weight_files import INDEX, SINGLE, find_tensors
from mlxgpt.common.model import families, params, text_part
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.tokenizers.ends import as_list, as_value, union
from mlxgpt.common.tokenizers.padding import own_padding, with_padding
from mlxgpt.common.tokenizers.protocol import Tokenizer

__all__ = ["find_tensors", "read_config", "read_params", "read_stored", "read_tensors", "write_model", "write_tensors"]

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def read_config(folder: Path | str) -> ModelConfig:
    """The model that a folder holds. The head is tied as config.json says, and untied where it is another tensor.

    An untied head equal to the embedding stays untied where config.json says so.

    Raises:
        UserError: config.json is missing or asks for what is not supported; or the weights are damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}, expected a model folder")
    values = read_values(folder)
    config = families.config_from_hf(quantized.plain_values(folder, values), str(folder / "config.json"))
    return settle(folder, values, config, read_entries(folder, values, config))


def read_values(folder: Path) -> Mapping[str, Any]:
    """config.json of a folder, or what it says of the text part of a model of several."""
    return text_part.of(read_json(folder / "config.json"))


def notes(folder: Path) -> list[str]:
    """A line on what of a folder is no part of its model."""
    values = read_values(folder)
    return [f"{folder}: {values.note}"] if isinstance(values, text_part.TextPart) else []


def read_entries(folder: Path, values: Mapping[str, Any], config: ModelConfig) -> dict[str, Stored]:
    """Where the tensors of a folder with this config.json lie, by the names in its files; fp8 with its scales is one.

    Raises:
        UserError: see ``find_tensors`` and ``quantized.resolve``.
    """
    entries: dict[str, Stored] = text_part.kept(values, find_tensors(folder))
    return entries if mlx_lm_folder.is_own(config, values, entries) else quantized.resolve(folder, values, entries)


def settle(place: Path, values: Mapping[str, Any], config: ModelConfig, entries: Mapping[str, Stored]) -> ModelConfig:
    """``config``, tied if the tensors at ``place``, a folder or file, and config.json say so, see ``head.is_tied``.

    Raises:
        TensorError: config.json unties the head, and there is none.
    """
    if mlx_lm_folder.is_own(config, values, entries):
        return mlx_lm_folder.with_head(place, values, config, mlx_lm_folder.plain_names(place, config, entries))
    if config.labels or "tied" in families.family_of(config).fixed:
        return config
    entries = _by_name(place, config, entries)
    name, table = (families.to_foreign(config, each)[0] for each in ("lm_head.weight", "wte.weight"))

    def is_copy() -> bool:
        return table in entries and same_bytes(entries[name], entries[table])

    return dataclasses.replace(config, tied=head.is_tied(place, values, config, name, entries, is_copy))


def _by_name(folder: Path, config: ModelConfig, entries: Mapping[str, Stored]) -> dict[str, Stored]:
    """``entries`` without prefixes and buffers."""
    made: dict[str, Stored] = {}
    for name, entry in entries.items():
        plain = families.strip(config, name)
        if plain is None:
            continue
        if plain in made:
            raise UserError(f"{folder}: {plain} is there twice, with and without a prefix")
        made[plain] = entry
    return made


def locate(folder: Path, config: ModelConfig, entries: Mapping[str, Stored]) -> dict[str, tuple[str, Stored, bool]]:
    """Our name -> (its name without a prefix, where it lies, whether as [in, out]) for all the files hold.

    ``entries`` are the folder's tensors by the names in its files, see ``quantized.resolve``. Biases that config.json
    calls zero are there too.

    Raises:
        UserError: a tensor is missing, unexpected, there twice, or of another shape or dtype; a tied head differs.
    """
    expected = families.from_foreign(config)
    given, entries = entries, _by_name(folder, config, entries)
    if config.tied and families.to_foreign(config, "lm_head.weight")[0] in entries:
        _check_tied(folder, config, entries)
    for name in expected:
        if name not in entries:
            raise TensorError(name, head.missing(folder, name, given, config))
    for name in entries:
        if name not in expected:
            shape, first = list(entries[name].shape), name.split(".")[0] + "."
            alike = sum(each.startswith(first) for each in entries) * (not any(e.startswith(first) for e in expected))
            more = f"; {alike} such tensors begin with {first!r}" if alike > 1 else ""
            said = f"unexpected tensor {name} {shape}, for which config.json has no place{more}"
            raise TensorError(name, f"{folder}: {said}")
    shapes = {name: param.shape for name, param in params.table(families.on_disk(config)).items()}
    for foreign, (name, transposed) in expected.items():
        entry, shape = entries[foreign], shapes[name][::-1] if transposed else shapes[name]
        if entry.shape != shape:
            found = f"{foreign} has shape {list(entry.shape)}, expected {list(shape)} by config.json"
            raise TensorError(foreign, f"{entry.path}: {found}")
        if entry.dtype not in FLOATS:
            raise UserError(f"{entry.path}: {foreign} has dtype {entry.dtype}, expected one of {', '.join(FLOATS)}")
    return {name: (foreign, entries[foreign], transposed) for foreign, (name, transposed) in expected.items()}


def read_params(folder: Path | str, config: ModelConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The parameters of ``params.table(config)``, by our names and in our layout, as ``dtype``; None = as stored.

    Float32, float16 and bfloat16 are read; widening is exact. One tensor at a time is converted. Matrices that mlx-lm
    quantized and those of fp8 are dequantized.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or dtype, or not finite; a bias that config.json
            calls zero is not; or the files are damaged.
    """
    made = read_stored(folder, config, dtype=dtype)
    return {name: _widened(each, dtype) if isinstance(each, Quantized) else each for name, each in made.items()}


def _widened(matrix: Quantized, dtype: Any) -> np.ndarray:
    return matrix.dequantize().astype(dtype or np.float32, copy=False)


def read_stored(
    folder: Path | str, config: ModelConfig, names: Collection[str] | None = None, dtype: Any = np.float32
) -> dict[str, np.ndarray] | dict[str, np.ndarray | Quantized]:
    """``read_params``, but what mlx-lm quantized in affine mode stays as it is; of ``names`` only, if given."""
    folder = Path(folder)
    values = read_values(folder)
    entries = read_entries(folder, values, config)
    if mlx_lm_folder.is_own(config, values, entries):
        return _read_mlx_lm(folder, config, values, entries, names, dtype)
    located = locate(folder, config, entries)
    wanted, made = params.table(config), {}
    for name, (foreign, entry, transposed) in located.items():
        if names is not None and name not in names:
            continue
        array = entry.read()
        bad = np.count_nonzero(~np.isfinite(array))
        if bad:
            raise UserError(f"{entry.path}: {foreign} has {bad} values that are not finite (NaN or Inf)")
        if name not in wanted:
            if array.any():
                raise UserError(f"{entry.path}: {foreign} is not zero, but config.json says so under mlxgpt")
            continue
        made[name] = np.ascontiguousarray(array.T if transposed else array, dtype=dtype)
    return {name: made[name] for name in wanted if names is None or name in made}


def _read_mlx_lm(
    folder: Path,
    config: ModelConfig,
    values: Mapping[str, Any],
    entries: Mapping[str, Stored],
    names: Collection[str] | None,
    dtype: Any,
) -> dict[str, np.ndarray | Quantized]:
    """The parameters of a folder with mlx-lm's names, some of them quantized as config.json says."""
    made: dict[str, np.ndarray | Quantized] = {}
    plain = mlx_lm_folder.plain_names(folder, config, entries)
    for name, where in mlx_lm_folder.locate(folder, config, plain, values.get("quantization")).items():
        if names is not None and name not in names:
            continue
        each = where.read()
        floats = (each.scales, each.biases) if isinstance(each, Quantized) else (each,)
        bad = sum(int(np.count_nonzero(~np.isfinite(array))) for array in floats)
        if bad:
            raise UserError(f"{folder}: {name} has {bad} values that are not finite (NaN or Inf)")
        made[name] = each if isinstance(each, Quantized) else np.ascontiguousarray(each, dtype=dtype)
    return made


def _check_tied(folder: Path, config: ModelConfig, entries: dict[str, Stored]) -> None:
    """Drops a head that is the embedding's copy from ``entries``, and refuses another."""
    name = families.to_foreign(config, "lm_head.weight")[0]
    own, table = entries.pop(name), entries.get(families.to_foreign(config, "wte.weight")[0])
    if table is not None and not same_bytes(own, table):
        said = "differs from the embedding, expected an equal or no head for a tied model"
        raise TensorError(name, f"{folder}: {name} {said}")


def write_model(
    folder: Path | str,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    dtype: str = "float32",
    extra: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard: int = 5 * 10**9,
    ends: Sequence[int] = (),
) -> None:
    """Writes config.json, generation_config.json, the weights and the tokenizer's files into ``folder``.

    ``weights`` are exactly ``params.table(config)``, in any float type; ``extra`` goes into config.json as it is;
    shards hold at most ``max_shard`` bytes, or one tensor. ``ends``: what ends a generated text; default: what does for
    ``tokenizer``. A classifier's tokenizer gets a token that pads, and the embedding a row for it.

    Raises:
        UserError: the family cannot hold the model, the folder holds one already, or a value does not fit ``dtype``.
        RunError: a weight is not finite.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    padded = with_padding(tokenizer) if tokenizer and config.labels else None
    if padded:
        tokenizer, config = padded, dataclasses.replace(config, vocab_size=max(config.vocab_size, padded.n_vocab))
        weights = cast(Mapping[str, np.ndarray], params.resize_vocab(weights, config.vocab_size))
    values = families.config_to_hf(config)
    held = [path.name for path in folder.glob("model*.safetensors*")] + [
        name for name in ("config.json",) if (folder / name).exists()
    ]
    if held:
        raise UserError(f"{folder}: holds a model already ({held[0]}), expected a new or empty folder")
    _check_given(config, weights, DTYPES[dtype])
    # where a key is absent transformers has ids of its own, and a padding id's embedding would not train there
    eos = tokenizer.eos_id if tokenizer else None
    ids = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": own_padding(padded) if padded else None}
    values |= {"dtype": dtype, "torch_dtype": dtype} | ids | dict(extra or {})

    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        tokenizer.save(folder)
    _write_weights(folder, config, weights, DTYPES[dtype], max_shard)
    tokens = {key: values[key] for key in ids if values[key] is not None}
    said = as_list(values["eos_token_id"], folder / "config.json")
    if every := union(ends, said, sorted(tokenizer.ends) if tokenizer and said else ()):
        tokens["eos_token_id"] = as_value(every)
    write_json(folder / "generation_config.json", {"_from_model_config": True} | tokens)
    write_json(folder / "config.json", values)


def _check_given(config: ModelConfig, weights: Mapping[str, np.ndarray], dtype: np.dtype) -> None:
    """Before a byte is written: every tensor in its shape, finite, and finite as ``dtype``."""
    wanted = params.table(config)
    assert set(weights) == set(wanted), f"not the model's parameters: {sorted(set(weights) ^ set(wanted))}"
    for name, param in wanted.items():
        assert weights[name].shape == param.shape, f"{name}: {weights[name].shape}, expected {param.shape}"
        largest = np.maximum(weights[name].max(), -weights[name].min())  # NaN if one is
        if not np.isfinite(largest):
            raise RunError(f"{name} has values that are not finite (NaN or Inf); nothing was written")
        with np.errstate(over="ignore"):
            if not np.isfinite(largest.astype(dtype)):
                raise UserError(f"{name}: {largest:.3g} does not fit {dtype}: expected bfloat16 or float32")


def _write_weights(
    folder: Path, config: ModelConfig, weights: Mapping[str, np.ndarray], dtype: np.dtype, max_shard: int
) -> None:
    """One file, or shards and their index; one tensor at a time is transposed and cast."""
    shapes = {name: param.shape for name, param in params.table(families.on_disk(config)).items()}
    names = families.from_foreign(config)

    def stored(shard: list[str]) -> dict[str, np.ndarray]:
        """Views of the weights as the file has them; a bias that only the format asks for is zeros."""
        made = {}
        for foreign in shard:
            name, transposed = names[foreign]
            array = weights[name] if name in weights else np.zeros(shapes[name], dtype)
            made[foreign] = array.T if transposed else array
        return made

    sizes = {foreign: int(np.prod(shapes[name])) * dtype.itemsize for foreign, (name, _) in names.items()}
    files = shards(sizes, max_shard)
    for file, shard in files.items():
        write_tensors(folder / file, stored(shard), dtype=dtype)
    if len(files) == 1:
        return
    weight_map = {name: file for file, shard in files.items() for name in shard}
    total = sum(sizes.values())
    metadata = {"total_parameters": total // dtype.itemsize, "total_size": total}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def shards(sizes: Mapping[str, int], max_shard: int) -> dict[str, list[str]]:
    """File name -> the tensors in it, for tensors of these sizes in this order; one file where ``max_shard`` allows."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > max_shard:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}
