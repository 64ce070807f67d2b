"""Matrices that stay quantized, in MLX's affine format (common/model/affine.py); they compute, and do not train."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn as nn

from mlxgpt.common.model.affine import Quantized
from torch_ref import fast
from torch_ref.affine import dequantize
from torch_ref.layers import Array, Embedding, Linear, Matrix
from torch_ref.model import Model


class Words(Matrix):
    """W as words (n_out, n_in bits / 32), and scales and biases (n_out, n_in / group_size)."""

    words: Array
    scales: Array
    biases: Array

    def __init__(self, matrix: "Quantized | Words"):
        nn.Module.__init__(self)
        self.bits, self.group_size = matrix.bits, matrix.group_size
        for name, part in zip(("words", "scales", "biases"), parts(matrix), strict=True):
            self.register_buffer(name, part)

    def matmul(self, x: Array, bias: Array | None = None) -> Array:
        """x W^T + bias, in x's dtype."""
        y = Product.apply(x, *self.tensors(), self.bits, self.group_size)
        return y if bias is None else y + bias.to(x.dtype)

    def tensors(self) -> list[Array]:
        """Words, scales and biases."""
        return [self.words, self.scales, self.biases]

    def matrix(self) -> Array:
        """W."""
        return dequantize(self.words, self.scales, self.biases, self.bits, self.group_size)


class QuantizedLinear(Words, Linear):
    """y = x W^T + b."""

    def __init__(self, matrix: Quantized | Words, bias: nn.Parameter | None):
        super().__init__(matrix)
        self.bias = bias


class QuantizedEmbedding(Words, Embedding):
    """Rows of W."""

    def rows(self, index: Array) -> Array:
        """W[index]."""
        return dequantize(self.words[index], self.scales[index], self.biases[index], self.bits, self.group_size)


def parts(matrix: Quantized | Words) -> list[Array]:
    """Words (as int32), scales and biases, scales and biases in the dtype that they have."""
    if isinstance(matrix, Words):
        return matrix.tensors()
    made = [torch.from_numpy(np.ascontiguousarray(matrix.words).view(np.int32))]
    for array in (matrix.scales, matrix.biases):
        narrow = array.dtype == ml_dtypes.bfloat16
        made.append(torch.from_numpy(array.astype(np.float32)).bfloat16() if narrow else torch.from_numpy(array))
    return made


class Product(torch.autograd.Function):
    """x W^T of x, words, scales and biases, which keeps no W for the gradient, which is by x alone.

    W is made, and made again.
    """

    @staticmethod
    def forward(ctx: Any, x: Array, *matrix: Any) -> Array:
        ctx.save_for_backward(*matrix[:3])
        ctx.rest = matrix[3:]
        return fast.linear(x, dequantize(*matrix).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> tuple[Array | None, ...]:
        cotangent = cotangents[0]
        grad = fast.linear(cotangent, dequantize(*ctx.saved_tensors, *ctx.rest).to(cotangent.dtype).T)
        return grad, None, None, None, None, None


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
        setattr(owner, name, QuantizedEmbedding(matrix))
    else:
        setattr(owner, name, QuantizedLinear(matrix, module.bias))
