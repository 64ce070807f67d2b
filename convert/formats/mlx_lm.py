"""mlx-lm's folders: a Hugging Face folder with an index, or with matrices that MLX quantized.

Plain folders have the family's names, so that transformers reads them too; gpt2's matrices lie as [in, out], which
mlx-lm turns. What mlx-lm itself wrote, and all that is quantized, has the names of its modules.
"""

from pathlib import Path
from typing import Any

import numpy as np

from convert.formats import hf, stream
from convert.formats.opened import Opened, Options, Packed, Tensor
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import mlx_lm_folder, mlx_lm_names, model_folder, quantized
from mlxgpt.common.folders.tensors import DTYPES, Entry, read_header
from mlxgpt.common.model import affine, families, params
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.model.family import own_config

KIND = "folder"
_METADATA = {"format": "mlx"}


def recognize(path: Path) -> bool:
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
    """A folder of mlx-lm; quantized matrices are float32, in affine mode q * scale + bias.

    Raises:
        UserError: a quantization that mlx-lm does not have, a quantized matrix that is not whole, or see ``hf.read``.
    """
    where = path / "config.json"
    values = read_json(where)
    config, extra = hf.read_values(quantized.plain_values(path, values), str(where))
    entries = model_folder.read_entries(path, values, config)
    if not mlx_lm_folder.is_own(config, values, entries):
        return hf.open_folder(path, "mlx-lm", values, config, entries, extra)
    config = model_folder.settle(path, values, config, entries)
    plain = mlx_lm_folder.plain_names(path, config, entries)
    located = mlx_lm_folder.locate(path, config, plain, values.get("quantization"))
    shapes = {name: param.shape for name, param in params.table(config).items()}
    tensors = {
        name: _matrix(where, shapes[name]) if isinstance(where, mlx_lm_folder.Matrix) else hf.stored_tensor(where)
        for name, where in located.items()
    }
    count = sum(isinstance(where, mlx_lm_folder.Matrix) for where in located.values())
    files = tuple(sorted({entry.path for entry in entries.values()}))
    opened = Opened(path, "mlx-lm", config, tensors, files, hf.companions(path), extra)
    opened.notes = list(hf.left_in_folder(path, opened))
    if count:
        opened.notes.append(f"{path}: {count} quantized matrices are read as float32, exactly")
    return opened


def _matrix(where: mlx_lm_folder.Matrix, shape: tuple[int, ...]) -> Tensor:
    def read() -> np.ndarray:
        found = where.read()
        return found.dequantize() if isinstance(found, Quantized) else found

    parts = tuple(each for each in (where.words, where.scales, where.biases) if isinstance(each, Entry))
    if len(parts) < 3:  # no affine mode, which alone is written again as it is
        return Tensor(shape, np.dtype(np.float32), read)
    packed = Packed(where.bits, where.group_size, DTYPES[where.scales.dtype], (parts[0], parts[1], parts[2]))
    return Tensor(shape, np.dtype(np.float32), read, packed=packed)


def write(opened: Opened, place: Path, options: Options) -> list[str]:
    """A folder that mlx_lm.load reads; with ``bits`` every matrix that groups divide is quantized.

    With ``keep_bits`` it is quantized as the source is.

    Raises:
        UserError: bits or a group size that mlx-lm does not read, or see ``hf.write``.
    """
    config, values = opened.config, families.config_to_hf(opened.config)
    if families.family_of(config).own:
        raise UserError(f"cannot be written as mlx-lm: {own_config.NOTE}: expected --to hf or npz")
    notes = hf.mlx_lm_warning(config)
    if options.keep_bits:
        return notes + _write_as_packed(opened, place, options, values)
    if not options.bits:
        parts = hf.plain_parts(opened, options)
        return notes + hf.write_folder(opened, place, options, parts, values, _METADATA, index=True)
    if options.bits not in (4, 8) or options.group_size not in affine.GROUP_SIZES:
        found = f"{options.bits} bits in groups of {options.group_size}"
        raise UserError(f"{found}: expected 4 or 8 bits in groups of {', '.join(map(str, affine.GROUP_SIZES))}")
    parts, whole = [], []
    for foreign, tensor, _ in hf.in_file(opened):
        name, dtype = mlx_lm_names.name_of(config.family, foreign), hf.stored_dtype(tensor, options)
        if len(tensor.shape) == 2 and tensor.shape[1] % options.group_size == 0:
            module = name.removesuffix(".weight")
            parts.append(stream.quantized(module, tensor, dtype, options.bits, options.group_size, options))
        else:
            whole += [name] * (len(tensor.shape) == 2)
            parts.append(stream.plain(name, tensor, dtype, False, options))
    if all(len(part.specs) == 1 for part in parts):
        raise UserError(f"{opened.path}: --group-size {options.group_size} divides the inputs of no matrix")
    if whole:
        notes.append(
            f"{len(whole)} matrices are not quantized, groups of {options.group_size} do not divide them: "
            f"{', '.join(whole[:3])}{' ...' if len(whole) > 3 else ''}"
        )
    scheme = {"group_size": options.group_size, "bits": options.bits, "mode": "affine"}
    values |= dict.fromkeys(mlx_lm_folder.KEYS, scheme)
    return notes + hf.write_folder(opened, place, options, parts, values, _METADATA, index=True)


def _write_as_packed(opened: Opened, place: Path, options: Options, values: dict[str, Any]) -> list[str]:
    """A folder whose matrices are quantized as they were; those that changed are quantized anew."""
    parts, schemes = [], {}
    for foreign, tensor, _ in hf.in_file(opened):
        name, packed = mlx_lm_names.name_of(opened.config.family, foreign), tensor.packed
        if packed is None:
            parts.append(stream.plain(name, tensor, tensor.dtype, False, options))
            continue
        module = name.removesuffix(".weight")
        schemes[module] = {"group_size": packed.group_size, "bits": packed.bits, "mode": "affine"}
        if packed.parts:
            parts.append(stream.copied(module, packed.parts, options))
        else:
            part = stream.quantized(module, tensor, packed.dtype, packed.bits, packed.group_size, options)
            parts.append(part)
    usual = max(schemes.values(), key=list(schemes.values()).count)
    scheme = usual | {module: own for module, own in schemes.items() if own != usual}
    values |= dict.fromkeys(mlx_lm_folder.KEYS, scheme)
    return hf.write_folder(opened, place, options, parts, values, _METADATA, index=True)
