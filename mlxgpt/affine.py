"""MLX's affine format (common/model/affine.py) on the device, in MLX."""

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt.layers import Array


def quantize(x: Array, bits: int, group_size: int) -> tuple[Array, Array, Array]:
    """Words, and scales and biases in x's dtype, of x (..., n) by its last axis: the bits of affine.quantize."""
    words, scales, biases = mx.quantize(x, group_size=group_size, bits=bits)
    return words, scales, biases


def dequantize(words: Array, scales: Array, biases: Array, bits: int, group_size: int) -> Array:
    """q * scale + bias in float32: words (..., n) to (..., 32 n / bits)."""
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
