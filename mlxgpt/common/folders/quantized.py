"""Quantized weights that a folder brings: fp8 with scales is read as float32, all else is refused by its method's name.

mlx-lm's own quantization is read by ``mlx_lm_folder``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders.tensors import FLOATS, Stored
from mlxgpt.common.model import float_blocks, quantization_methods

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")  # what follows a weight's name in that of its scales, which are factors in both
_SCALE_DTYPES = (*FLOATS, "F8_E8M0", "U8")
# scales of activations and of the cache, which say how to round what is computed, not what the weights are
_ACTIVATIONS = re.compile(
    r".*\.(input_scale|input_scale_inv|input_scale_ub|activation_scale|output_scale|[qkv]_scale|kv_scale|prob_output_scale)"
)
# a tensor's name -> the method that has such; the first that matches
_SIGNS = (
    (r".*\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)", "bitsandbytes, 4 bits"),
    (r".*\.(SCB|weight_format)", "bitsandbytes, 8 bits"),
    (r".*\.g_idx", "GPTQ"),
    (r".*\.weight_global_scale", "compressed-tensors, nvfp4"),
    (r".*\.(weight_packed|weight_shape)", "compressed-tensors"),
    (r".*\.weight_scale_2", "modelopt, nvfp4"),
    (r".*_blocks", "mxfp4"),
    (r".*\.W_q", "HQQ"),
    (r".*\.weight_scales", "EETQ"),
    (r".*\.(codebooks|codes)", "AQLM"),
    (r".*\.weight(\._data|\._scale|_qdata|:_data)", "torchao or quanto"),
    (r".*\.weight_zero_point", "Quark or compressed-tensors"),
)


@dataclass(frozen=True)
class Fp8:
    """A matrix of fp8 codes with their scales, each for ``block`` rows and columns of it."""

    codes: Stored
    scales: Stored
    block: tuple[int, int]
    dtype: str = "F32"

    @property
    def path(self) -> Path:
        """The codes' file."""
        return self.codes.path

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        return self.codes.shape

    def read(self) -> np.ndarray:
        """Code times scale in float32."""
        return float_blocks.scale_fp8(self.codes.read(), self.scales.read(), self.block)


def plain_values(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what it says of quantization.

    Raises:
        UserError: it, or hf_quant_config.json beside it, names a method that is not read.
    """
    _block(folder, values)
    return {key: value for key, value in values.items() if key not in quantization_methods.KEYS}


def _block(folder: Path, values: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block of fp8 that the folder says, (0, 0) for none, None where it says nothing of quantization."""
    found, where = quantization_methods.said(values), f"{folder / 'config.json'}: "
    beside = folder / "hf_quant_config.json"
    if found is None and beside.is_file():
        scheme = read_json(beside).get("quantization")
        if isinstance(scheme, dict) and scheme.get("quant_algo"):
            found, where = ("quantization", scheme), f"{beside}: "
    if found is None or quantization_methods.is_mlx_lm(values):
        return None
    key, scheme = found
    if isinstance(scheme, Mapping) and "mode" in scheme and not quantization_methods.method_of(scheme):
        raise UserError(f"{where}quantization is missing, which mlx-lm reads, beside an equal {key}")
    block = quantization_methods.fp8_block(scheme) if isinstance(scheme, Mapping) else None
    if block is None:
        raise refusal(f"{where}{key}", quantization_methods.describe(scheme))
    return block


def refusal(where: str, method: str) -> UserError:
    """The error for weights that ``method`` quantized."""
    return UserError(f"{where}: weights quantized by {method} are not supported: {quantization_methods.EXPECTED}")


def resolve(folder: Path, values: Mapping[str, Any], entries: Mapping[str, Stored]) -> dict[str, Stored]:
    """``entries``, with matrices of fp8 and their scales as one tensor of float32; scales of activations are dropped.

    Raises:
        UserError: tensors of another method; fp8 without scales, scales without fp8, or those that do not fit.
    """
    said = _block(folder, values)
    codes = [name for name, entry in entries.items() if entry.dtype in _FP8 and not name.endswith(_SCALES)]
    if said is not None and not codes:
        raise UserError(f"{folder}: config.json says that weights are quantized, but no tensor is")
    refuse(entries)
    made = dict(entries)
    for name in codes:
        scales = next((made.pop(name + end) for end in _SCALES if name + end in made), None)
        if scales is None:
            raise refusal(f"{entries[name].path}: {name}", "fp8 without scales")
        block = float_blocks.block_of(entries[name].shape, scales.shape, said or (0, 0))
        if block is None or scales.dtype not in _SCALE_DTYPES:
            found = f"{scales.dtype} {list(scales.shape)} for {list(entries[name].shape)}"
            blocks = f" in blocks of {said[0]} x {said[1]}" if said and said[0] else ""
            raise UserError(f"{scales.path}: scales of {name}: found {found}, expected floats that divide it{blocks}")
        made[name] = Fp8(entries[name], scales, block)
    if codes:
        made = {name: entry for name, entry in made.items() if not _ACTIVATIONS.fullmatch(name)}
    return made


def refuse(entries: Mapping[str, Stored]) -> None:
    """Refuses tensors that are a quantization method's, whatever config.json says.

    Raises:
        UserError: names the method and a tensor.
    """
    for pattern, method in _SIGNS:
        name = next((name for name in entries if re.fullmatch(pattern, name)), None)
        if name is not None:
            raise refusal(f"{entries[name].path}: {name}", method)
    name = next((name for name in entries if name.endswith(".qweight")), None)
    if name is not None:
        scales = entries.get(name.removesuffix("qweight") + "scales")
        awq = scales is not None and entries[name].shape[-1] * 8 == scales.shape[-1]
        raise refusal(f"{entries[name].path}: {name}", "AWQ" if awq else "GPTQ")
    name = next((name for name in entries if name.endswith(".scales")), None)
    if name is not None:
        raise UserError(
            f"{entries[name].path}: {name} is there, but config.json has no quantization, as mlx-lm says it"
        )
