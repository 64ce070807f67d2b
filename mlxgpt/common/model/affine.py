"""MLX's affine quantization in numpy: w = q * scale + bias for every group of inputs, q packed into words of 32 bits.

A matrix [out, in] becomes words uint32 [out, in * bits / 32], the lowest bits first, and scales and biases
[out, in / group_size] of the matrix's own dtype. The rules are those of mx.quantize in mlx 0.32: bit for bit.
"""

from dataclasses import dataclass

import numpy as np

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
_SMALLEST = np.float32(1e-7)  # a scale of mx.quantize, where the weights of a group are equal


@dataclass(frozen=True)
class Quantized:
    """A matrix as its words (n_out, n_in bits / 32), and scales and biases (n_out, n_in / group_size)."""

    words: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int
    group_size: int

    @classmethod
    def of(cls, weight: np.ndarray, bits: int, group_size: int) -> "Quantized":
        """What mx.quantize makes of a matrix."""
        return cls(*quantize(weight, bits, group_size), bits, group_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        return (*self.words.shape[:-1], self.words.shape[-1] * 32 // self.bits)

    def dequantize(self) -> np.ndarray:
        """The matrix in float32."""
        return dequantize(self.words, self.scales, self.biases, self.bits, self.group_size)


def quantize(weight: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What mx.quantize makes of a matrix (..., in) of finite float32, float16 or bfloat16: words, scales, biases."""
    assert bits in BITS and weight.shape[-1] % group_size == 0
    bins = np.float32(2**bits - 1)
    groups = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    negative = np.abs(low) > np.abs(high)
    edge = np.where(negative, low, high)  # the value farthest from 0 is kept as it is
    scale = np.maximum((high - low) / bins, _SMALLEST)
    scale = np.where(negative, scale, -scale)
    steps = np.rint(edge / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(steps == 0, scale, edge / steps)
    bias = np.where(steps == 0, np.float32(0), edge)
    groups -= bias[..., None]
    groups /= scale[..., None]
    with np.errstate(invalid="ignore"):
        levels = np.clip(np.rint(groups, out=groups), 0, bins, out=groups).astype(np.uint8)
    return pack(levels.reshape(weight.shape), bits), scale.astype(weight.dtype), bias.astype(weight.dtype)


def dequantize(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """float32 q * scale + bias, multiplied and added in float32 whatever the dtype of scales and biases."""
    levels = unpack(words, bits).astype(np.float32)
    groups = levels.reshape(*levels.shape[:-1], -1, group_size)
    groups *= scales.astype(np.float32)[..., None]
    groups += biases.astype(np.float32)[..., None]
    return groups.reshape(levels.shape)


def recover(
    weight: np.ndarray, bits: int, group_size: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Words, and scales and biases of ``dtype``, of which ``dequantize`` makes these float32 weights, bit for bit.

    mx.quantize does not find them: its scale comes from the rounded edge of a group. None where there are none.
    """
    groups = weight.reshape(-1, group_size)
    words, first_scales, first_biases = quantize(weight, bits, group_size)
    levels = unpack(words, bits).reshape(groups.shape)
    scales, biases = (part.astype(dtype).reshape(-1) for part in (first_scales, first_biases))

    def equal(rows: np.ndarray, levels: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            made = levels.astype(np.float32) * scales.astype(np.float32)[:, None] + biases.astype(np.float32)[:, None]
        return (made == groups[rows]).all(-1)

    rest = np.arange(len(groups))
    rest = rest[~equal(rest, levels, scales, biases)]
    low, high, bins = groups.min(-1), groups.max(-1), 2**bits - 1
    for near, far in ((low, high), (high, low)):
        for reached in range(bins, bins - 3, -1):  # the level of the far edge, as rounding left it
            bias = near[rest].astype(dtype)
            step = (far[rest] - near[rest]) / np.float32(reached)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                if dtype == np.float32:
                    step = near[rest] / np.rint(near[rest] / step)
                scale = step.astype(dtype)
                found = np.rint((groups[rest] - near[rest][:, None]) / scale.astype(np.float32)[:, None])
            found = np.clip(np.nan_to_num(found), 0, bins).astype(np.uint8)
            good = equal(rest, found, scale, bias)
            kept = rest[good]
            levels[kept], scales[kept], biases[kept] = found[good], scale[good], bias[good]
            rest = rest[~good]
    if rest.size:
        return None
    shape = (*weight.shape[:-1], -1)
    return pack(levels.reshape(weight.shape), bits), scales.reshape(shape), biases.reshape(shape)


def pack(levels: np.ndarray, bits: int) -> np.ndarray:
    """Levels (..., in) below 2^bits as little-endian uint32 words (..., in * bits / 32), the lowest bits first."""
    if bits == 8:
        return np.ascontiguousarray(levels, dtype=np.uint8).view("<u4")
    if bits in (2, 4):
        parts = levels.astype(np.uint8).reshape(*levels.shape[:-1], -1, 8 // bits)
        packed = parts[..., 0].copy()
        for i in range(1, 8 // bits):
            packed |= parts[..., i] << (bits * i)
        return packed.view("<u4")
    shown = np.unpackbits(levels.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(shown.reshape(*levels.shape[:-1], -1), axis=-1, bitorder="little").view("<u4")


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The levels in uint32 words (..., n) as uint8 (..., 32 n / bits)."""
    packed = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    if bits == 8:
        return packed
    if bits in (2, 4):
        parts = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
        return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)
    shown = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return np.packbits(shown, axis=-1, bitorder="little")[..., 0]
