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
    """How a file quantizes one tensor. ``again`` gives float32; ``half`` is half a step at every value of a matrix."""

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
        return _q8_0(opened)
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


def _q8_0(opened: Opened) -> dict[str, Step]:
    """GGUF: blocks of 32 inputs with one float16 scale."""
    from convert.formats.gguf.file import BLOCK, quantized, read_gguf
    from convert.formats.gguf.names import name_of

    def again(array: np.ndarray) -> np.ndarray:
        block = np.dtype([("d", "<f2"), ("q", "i1", BLOCK)])
        blocks = quantized(np.ascontiguousarray(array, dtype=np.float32).reshape(-1)).view(block)
        values = blocks["d"].astype(np.float32)[:, None] * blocks["q"].astype(np.float32)
        return values.reshape(array.shape)

    def half(array: np.ndarray) -> np.ndarray:
        top = np.abs(array.astype(np.float64)).reshape(-1, BLOCK).max(axis=1, keepdims=True)
        return np.repeat(top * (0.5 / 127 + 2.0**-10), BLOCK, axis=1).reshape(array.shape)

    stored = read_gguf(opened.path)[1]
    return {
        name: Step("Q8_0", again, half)
        for name in params.table(opened.config)
        if stored[name_of(opened.config, name)].type == "Q8_0"
    }
