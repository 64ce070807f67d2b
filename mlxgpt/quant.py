"""Matrices that stay quantized, in MLX's affine format (common/model/affine.py); they compute, and do not train."""

from functools import cache
from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxgpt.affine import dequantize
from mlxgpt.common.model.affine import Quantized
from mlxgpt.layers import Array, Embedding, Linear, Matrix
from mlxgpt.model import Model

FEW = 8  # rows of x below which the CPU's quantized product beats making the matrix


class Words(Matrix):
    """W as words (n_out, n_in bits / 32), and scales and biases (n_out, n_in / group_size)."""

    def __init__(self, matrix: "Quantized | Words"):
        nn.Module.__init__(self)
        self.bits, self.group_size = matrix.bits, matrix.group_size
        self.words, self.scales, self.biases = parts(matrix)

    def matmul(self, x: Array, bias: Array | None = None) -> Array:
        """x W^T + bias, in x's dtype."""
        y = product(self.bits, self.group_size)(x, *self.tensors())
        return y if bias is None else y + bias.astype(x.dtype)

    def tensors(self) -> list[Array]:
        """Words, scales and biases."""
        return [self.words, self.scales, self.biases]

    def matrix(self) -> Array:
        """W."""
        return dequantize(self.words, self.scales, self.biases, self.bits, self.group_size)


class QuantizedLinear(Words, Linear):
    """y = x W^T + b."""

    def __init__(self, matrix: Quantized | Words, bias: Array | None):
        super().__init__(matrix)
        if bias is not None:
            self.bias = bias


class QuantizedEmbedding(Words, Embedding):
    """Rows of W."""

    def __init__(self, matrix: Quantized | Words, deterministic: bool):
        super().__init__(matrix)
        self._deterministic = deterministic

    def rows(self, index: Array) -> Array:
        """W[index]."""
        return dequantize(self.words[index], self.scales[index], self.biases[index], self.bits, self.group_size)


def parts(matrix: Quantized | Words) -> list[Array]:
    """Words, scales and biases on the device, scales and biases in the dtype that they have."""
    if isinstance(matrix, Words):
        return matrix.tensors()
    made = [mx.array(matrix.words)]
    for array in (matrix.scales, matrix.biases):
        narrow = array.dtype == ml_dtypes.bfloat16
        made.append(mx.array(array.astype(np.float32)).astype(mx.bfloat16) if narrow else mx.array(array))
    return made


@cache
def product(bits: int, group_size: int) -> Any:
    """x W^T of x, words, scales and biases, which keeps no W for the gradient, which is by x alone.

    A GPU multiplies by what is quantized. On a CPU that is 40 times slower than a BLAS, so W is made, and made again.
    """

    @mx.custom_function
    def times(x: Array, words: Array, scales: Array, biases: Array) -> Array:
        if mx.default_device() == mx.Device(mx.gpu) or x.size // x.shape[-1] < FEW:
            scales, biases = scales.astype(x.dtype), biases.astype(x.dtype)
            return mx.quantized_matmul(x, words, scales, biases, transpose=True, group_size=group_size, bits=bits)
        return x @ dequantize(words, scales, biases, bits, group_size).astype(x.dtype).T

    @times.vjp
    def times_vjp(primals: tuple[Array, ...], cotangent: Array, _: Array) -> tuple[Array, ...]:
        x, words, scales, biases = primals
        still = mx.zeros_like(words), mx.zeros_like(scales), mx.zeros_like(biases)
        if mx.default_device() == mx.Device(mx.gpu):
            wide = scales.astype(x.dtype), biases.astype(x.dtype)
            grad = mx.quantized_matmul(cotangent, words, *wide, transpose=False, group_size=group_size, bits=bits)
            return grad, *still
        words = mx.depends([words], [cotangent])[0]  # else compilation makes one W of the two, and keeps it
        return cotangent @ dequantize(words, scales, biases, bits, group_size).astype(x.dtype), *still

    return times


def taken(model: Any, path: str, kind: str) -> Any:
    """A tensor of a model, for another one: the array, or the module of a matrix that is quantized."""
    module = model.at(path)
    return module if kind == "weight" and isinstance(module, Words) else getattr(module, kind)


def place(model: Model, path: str, matrix: Quantized | Words) -> None:
    """Puts a quantized matrix where ``path`` says, in place of the module there; its bias stays.

    Of the module of another model the arrays are taken, not copied.
    """
    above, _, name = path.rpartition(".")
    owner: Any = model.at(above) if above else model
    module = getattr(owner, name)
    if isinstance(module, Embedding):
        setattr(owner, name, QuantizedEmbedding(matrix, module._deterministic))
    else:
        setattr(owner, name, QuantizedLinear(matrix, module.bias if "bias" in module else None))
