"""mlx-lm's folders: a Hugging Face folder with an index, or with matrices in MLX's affine quantisation.

Plain folders have the family's names, so that transformers reads them too; gpt2's matrices lie as [in, out], which
mlx-lm turns. What mlx-lm itself wrote, and all that is quantised, has the names of its modules.
"""

import dataclasses
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import hf, stream
from convert.model import Opened, Options, Tensor
from mlxgpt.common import affine, families, folder, mlx_lm_names, params
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.tensors import Entry, read_header, read_json, read_tensor

KIND = "folder"
_METADATA = {"format": "mlx"}
_KEYS = ("quantization", "quantization_config")


def recognise(path: Path) -> bool:
    """A folder whose config.json says ``quantization``, or whose safetensors say that MLX wrote them."""
    if not (path / "config.json").is_file():
        return False
    try:
        if isinstance(read_json(path / "config.json").get("quantization"), dict):
            return True
        files = sorted(path.glob("model*.safetensors"))
        return bool(files) and read_header(files[0])[1].get("format") == "mlx"
    except UserError:
        return False


def read(path: Path) -> Opened:
    """A folder of mlx-lm; quantised matrices are float32 q * scale + bias.

    Raises:
        UserError: another quantisation than affine, a quantised matrix that is not whole, or see ``hf.read``.
    """
    where = path / "config.json"
    values = read_json(where)
    config, extra = hf.read_values({key: value for key, value in values.items() if key not in _KEYS}, str(where))
    entries = folder.find_tensors(path)
    own = set(mlx_lm_names.names(config)) - set(families.from_foreign(config))
    if not own & set(entries) and not any(name.endswith(".scales") for name in entries):
        for key in _KEYS:
            if values.get(key) is not None:
                raise UserError(f"{where}: {key} is there, but no tensor is quantised")
        return hf.opened(path, "mlx-lm", folder.read_config(path), entries, extra)
    config = with_head(config, entries)
    tensors, count = _assemble(path, config, dict(entries), values.get("quantization"))
    files = tuple(sorted({entry.path for entry in entries.values()}))
    opened = Opened(path, "mlx-lm", config, tensors, files, hf.companions(path), extra)
    opened.notes = list(hf.left(path, opened))
    if count:
        opened.notes.append(f"{path}: {count} quantised matrices are read as float32 scale * q + bias, exactly")
    return opened


def with_head(config: ModelConfig, there: Container[str]) -> ModelConfig:
    """``config``, tied where these tensors of mlx-lm's modules have no head."""
    if "tied" in families.family_of(config).fixed:
        return config
    untied = dataclasses.replace(config, tied=False)
    head = next(name for name, ours in mlx_lm_names.names(untied).items() if ours == "lm_head.weight")
    return dataclasses.replace(config, tied=head not in there)


def _assemble(path: Path, config: ModelConfig, entries: dict[str, Entry], scheme: Any) -> tuple[dict[str, Tensor], int]:
    """Our tensors from those of mlx-lm's modules, and how many are quantised; ``entries`` is used up."""
    where = f"{path / 'config.json'}: quantization"
    if scheme is not None and not isinstance(scheme, dict):
        raise UserError(f"{where} = {scheme!r}: expected a table")
    shapes = {name: param.shape for name, param in params.table(families.on_disk(config)).items()}
    wanted, made, count = params.table(config), {}, 0
    for name, ours in mlx_lm_names.names(config).items():
        entry = entries.pop(name, None)
        if entry is None:
            raise UserError(f"{path}: tensor {name} is missing, which config.json asks for")
        module = name.removesuffix(".weight")
        if f"{module}.scales" in entries and name != module:
            if scheme is None:
                raise UserError(f"{where} is missing, but {module}.scales is there")
            parts = [entries.pop(f"{module}.{part}", None) for part in ("scales", "biases")]
            made[ours] = _matrix(where, module, (entry, *parts), shapes[ours], scheme)
            count += 1
            continue
        if entry.shape != shapes[ours] or entry.dtype not in ("F32", "F16", "BF16"):
            found = f"{entry.dtype} {list(entry.shape)}"
            raise UserError(f"{entry.path}: {name} is {found}, expected floats {list(shapes[ours])} by config.json")
        if ours in wanted:
            made[ours] = hf.lies(entry)
        elif read_tensor(entry).any():
            raise UserError(f"{entry.path}: {name} is not zero, but config.json says so under mlxgpt")
    if entries:
        raise UserError(f"{path}: unexpected tensor {min(entries)}, for which config.json has no place")
    return {name: made[name] for name in wanted}, count


def _matrix(
    where: str, module: str, parts: tuple[Entry | None, ...], shape: tuple[int, ...], scheme: Mapping[str, Any]
) -> Tensor:
    """A quantised matrix; its bits and groups are those of its shapes, and those that config.json says."""
    words, scales, biases = parts
    own = scheme.get(module)
    said = own if isinstance(own, dict) else scheme
    if said.get("mode", "affine") != "affine" or words is None or scales is None or biases is None:
        raise UserError(f"{where}: {module}: mode {said.get('mode')!r} is not supported: expected 'affine'")
    bits, group_size = said.get("bits"), said.get("group_size")
    if bits not in affine.BITS or type(group_size) is not int or group_size < 1 or shape[1] % group_size:
        raise UserError(
            f"{where}: {module}: {bits!r} bits and group_size {group_size!r}: expected bits and whole groups"
        )
    expected = (shape[0], shape[1] * bits // 32), (shape[0], shape[1] // group_size)
    for entry, each, dtypes in (
        (words, expected[0], ("U32",)),
        *((e, expected[1], hf.FLOATS) for e in (scales, biases)),
    ):
        if entry.shape != each or entry.dtype not in dtypes:
            found = f"{entry.dtype} {list(entry.shape)}"
            raise UserError(f"{entry.path}: {module}: found {found}, expected {' or '.join(dtypes)} {list(each)}")

    def read() -> np.ndarray:
        return affine.dequantise(read_tensor(words), read_tensor(scales), read_tensor(biases), bits, group_size)

    return Tensor(shape, np.dtype(np.float32), read)


def write(opened: Opened, place: Path, options: Options) -> list[str]:
    """A folder that mlx_lm.load reads; with ``bits`` every matrix that groups divide is quantised.

    Raises:
        UserError: bits or a group size that mlx-lm does not read, or see ``hf.write``.
    """
    config, values = opened.config, families.config_to_hf(opened.config)
    notes = hf.mlx_lm_warning(config)
    if not options.bits:
        parts = hf.plain_parts(opened, options)
        return notes + hf.write_folder(opened, place, options, parts, values, _METADATA, index=True)
    if options.bits not in (4, 8) or options.group_size not in affine.GROUP_SIZES:
        found = f"{options.bits} bits in groups of {options.group_size}"
        raise UserError(f"{found}: expected 4 or 8 bits in groups of {', '.join(map(str, affine.GROUP_SIZES))}")
    parts, whole = [], []
    for foreign, tensor, _ in hf.in_file(opened):
        name, dtype = mlx_lm_names.of(config.family, foreign), hf.stored_dtype(tensor, options)
        if len(tensor.shape) == 2 and tensor.shape[1] % options.group_size == 0:
            module = name.removesuffix(".weight")
            parts.append(stream.quantised(module, tensor, dtype, options.bits, options.group_size, options))
        else:
            whole += [name] * (len(tensor.shape) == 2)
            parts.append(stream.plain(name, tensor, dtype, False, options))
    if all(len(part.specs) == 1 for part in parts):
        raise UserError(f"{opened.path}: --group-size {options.group_size} divides the inputs of no matrix")
    if whole:
        notes.append(
            f"{len(whole)} matrices are not quantised, groups of {options.group_size} do not divide them: "
            f"{', '.join(whole[:3])}{' ...' if len(whole) > 3 else ''}"
        )
    scheme = {"group_size": options.group_size, "bits": options.bits, "mode": "affine"}
    values |= dict.fromkeys(_KEYS, scheme)
    return notes + hf.write_folder(opened, place, options, parts, values, _METADATA, index=True)
