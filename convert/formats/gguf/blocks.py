"""GGUF's quantized types: blocks of values with a scale, computed by the ``gguf`` package, llama.cpp's own in Python.

It is imported where a file has such tensors, since that takes longer than copying a small model.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BLOCK = 32  # values of a block of every type that is written
# the types that are written, with their number in general.file_type
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7}
_HALF = 2.0**-10  # relative error of a float16 scale, and of what it is multiplied with, at the most


class Block(NamedTuple):
    """A block of a type: how many values it holds, in how many bytes."""

    values: int
    bytes: int


def named(number: int) -> str | None:
    """The name of a tensor type by its number in a file; None if there is none."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(number).name if number in set(GGMLQuantizationType) else None


def number_of(kind: str) -> int:
    """The number of a tensor type in a file."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind].value


@functools.cache
def readable() -> Mapping[str, Block]:
    """The quantized types that ``dequantize`` knows."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    known = [kind for kind in GGMLQuantizationType if hasattr(quants, kind.name) and kind.name != "BF16"]
    return {kind.name: Block(*GGML_QUANT_SIZES[kind]) for kind in known}


def dequantize(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Bytes of whole blocks (n,) as their values, float32 (m,)."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):  # a scale of Inf is refused later, by the name of its tensor
        return quants.dequantize(blocks.reshape(-1), GGMLQuantizationType[kind])


def quantize(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 values, a multiple of 32 of them, as blocks: bytes (n, bytes of a block)."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):
        made = quants.quantize(values.reshape(-1), GGMLQuantizationType[kind])
    return made.reshape(-1, readable()[kind].bytes)


def scales_fit(blocks: np.ndarray, kind: str) -> bool:
    """Whether the scales of blocks, and the minima that some types have, are finite in float16."""
    header = 4 if kind.endswith("_1") else 2
    return bool(np.isfinite(blocks[:, :header].copy().view("<f2")).all())


def largest_error(values: np.ndarray, kind: str) -> np.ndarray:
    """What rounding ``values`` (..., a multiple of 32) to a type that is written may change each by, float64.

    Half a step; a whole one in Q4_0 and Q5_0, which have one level less on one side. Scale and minimum are float16.
    """
    blocks = values.astype(np.float64).reshape(-1, BLOCK)
    top = np.abs(blocks).max(axis=1, keepdims=True)
    span = blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)
    steps = {"Q4_0": top / 8, "Q5_0": top / 16, "Q8_0": 0.5 * top / 127, "Q4_1": span / 30, "Q5_1": span / 62}
    room = steps[kind] + _HALF * (top + (span if kind.endswith("_1") else 0))
    return np.repeat(room, BLOCK, axis=1).reshape(values.shape)
