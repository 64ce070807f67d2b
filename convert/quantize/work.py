"""What the parts of ``mlxgpt quantize`` hand to each other: statistics of a matrix's inputs, and choices of bits.

A matrix W (n_out, n_in) computes x W^T; what rounding costs is tr(D G D^T) / tokens, D the change of W, G the sum of
x^T x over the calibration tokens (Frantar et al. 2023, GPTQ): all methods work from G, on the host, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlxgpt.common.inference.calibration import Inputs
from mlxgpt.common.model.affine import Quantized

__all__ = ["Inputs", "Method", "Scheme", "cost"]


@dataclass(frozen=True)
class Scheme:
    """How one matrix is to be stored."""

    bits: int  # of affine.BITS
    group_size: int


Method = Callable[[np.ndarray, Inputs, Scheme], Quantized]
"""A matrix (n_out, n_in) of the dtype that scales and biases get, its inputs, its scheme -> the matrix quantized."""


def cost(change: np.ndarray, inputs: Inputs) -> float:
    """Mean squared change of the outputs, summed over them, of a change (n_out, n_in) of the matrix."""
    wide = change.astype(np.float64)
    return float(np.einsum("oi,ij,oj->", wide, inputs.gram, wide, optimize=True)) / inputs.tokens
