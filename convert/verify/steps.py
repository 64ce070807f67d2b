"""Quantized tensors: a matrix quantized again as a file has it, and the size of half a quantization step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from convert.formats.opened import Opened
from mlxgpt.common.files import read_json
from mlxgpt.common.folders.tensors import DTYPES, Entry, read_tensor
from mlxgpt.common.model import affine, params


@dataclass(frozen=True)
class Step:
    """How a file quantizes one tensor. ``again`` gives float32; ``half`` is what rounding may change each value by."""

    kind: str
    again: Callable[[np.ndarray], np.ndarray]
    half: Callable[[np.ndarray], np.ndarray]

    def within(self, values: np.ndarray, target: np.ndarray) -> bool:
        """Whether ``target`` is nowhere farther from ``values`` than half a step."""
        gap = np.abs(values.astype(np.float64) - target.astype(np.float64))
        return bool(np.isfinite(gap).all() and (gap <= self.half(values)).all())


Steps = Mapping[str, Step]


def steps_of(opened: Opened) -> Steps:
    """The quantized tensors of a model, by our names; {} where none is."""
    if opened.format == "mlx-lm":
        return _affine(opened)
    if opened.format == "gguf":
        return _blocks(opened)
    return {}


def _affine(opened: Opened) -> dict[str, Step]:
    """mlx-lm: w = q scale + bias by group of inputs."""
    from mlxgpt.common.folders.mlx_lm_names import names
    from mlxgpt.common.folders.model_folder import find_tensors

    scheme = read_json(opened.path / "config.json").get("quantization")
    if not isinstance(scheme, dict):
        return {}
    entries, made = find_tensors(opened.path), {}
    for foreign, ours in names(opened.config).items():
        module = foreign.removesuffix(".weight")
        scales, biases = entries.get(f"{module}.scales"), entries.get(f"{module}.biases")
        if scales is None or biases is None or ours not in opened.tensors:
            continue
        own = scheme.get(module)
        said = own if isinstance(own, dict) else scheme
        made[ours] = _affine_step(scales, biases, int(said["bits"]), int(said["group_size"]))
    return made


def _affine_step(scales: Entry, biases: Entry, bits: int, group_size: int) -> Step:
    dtype = DTYPES[scales.dtype]

    def again(array: np.ndarray) -> np.ndarray:
        words, scale, bias = affine.quantize(np.ascontiguousarray(array).astype(dtype), bits, group_size)
        return affine.dequantize(words, scale, bias, bits, group_size)

    def half(array: np.ndarray) -> np.ndarray:
        scale, bias = (np.abs(read_tensor(entry).astype(np.float64)) for entry in (scales, biases))
        rounding = 2.0 ** -{"F32": 23, "F16": 10, "BF16": 7}[scales.dtype]  # of scale, bias and the values themselves
        room = 0.5 * scale + rounding * (bias + (2**bits - 1) * scale)
        return np.repeat(room, group_size, axis=-1).reshape(array.shape)

    return Step(f"{bits} bits in groups of {group_size}", again, half)


def _blocks(opened: Opened) -> dict[str, Step]:
    """GGUF: the types of blocks of 32 inputs that are written here, too."""
    from convert.formats.gguf import blocks
    from convert.formats.gguf.names import name_of
    from convert.formats.gguf.split import read_parts

    def step(kind: str) -> Step:
        def again(array: np.ndarray) -> np.ndarray:
            made = blocks.quantize(np.ascontiguousarray(array, dtype=np.float32), kind)
            return blocks.dequantize(made, kind).reshape(array.shape)

        return Step(kind, again, lambda array: blocks.largest_error(array, kind))

    stored = read_parts(opened.path)[1]
    kinds = {name: stored[name_of(opened.config, name)].type for name in params.table(opened.config)}
    return {name: step(kind) for name, kind in kinds.items() if kind in blocks.FILE_TYPES}
