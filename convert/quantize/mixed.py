"""``--bits mixed:4.5``: bits by matrix, so that the expected KL is the least that fits into so many bits per weight.

All is counted: words, scales, biases, and what is not quantized.
"""

from collections.abc import Mapping

import numpy as np

from convert.quantize.allocation import allocate
from mlxgpt.common.errors import UserError
from mlxgpt.common.model.affine import BITS


def matrix_bits(shape: tuple[int, ...], bits: int, group_size: int, dtype: np.dtype) -> int:
    """The bits that a matrix takes in a file: words, and scales and biases of ``dtype``."""
    count = int(np.prod(shape))
    return count * bits + count // group_size * 2 * dtype.itemsize * 8


def choose(
    losses: Mapping[str, Mapping[int, float]],
    shapes: Mapping[str, tuple[int, ...]],
    group_size: int,
    dtype: np.dtype,
    other: int,
    weights: int,
    target: float,
) -> dict[str, int]:
    """The bits of each matrix of ``losses``, never more than ``target`` bits per weight in all.

    Args:
        losses: what each of BITS is expected to cost, see sensitivity.expected_losses.
        shapes: the matrices'.
        group_size: weights that share a scale.
        dtype: of scales and biases.
        other: bits of all tensors that are not in ``losses``.
        weights: of the whole model.
        target: bits per weight.

    Raises:
        UserError: even at the fewest bits the model is larger.
    """
    sizes = [[matrix_bits(shapes[name], bits, group_size, dtype) for bits in BITS] for name in losses]
    costs = [[each[bits] for bits in BITS] for each in losses.values()]
    chosen = allocate(sizes, costs, int(target * weights) - other)
    if chosen is None:
        least = (other + sum(map(min, sizes))) / weights
        raise UserError(f"--bits mixed:{target:g}: all matrices at {BITS[0]} bits make {least:.3f} bits per weight")
    return {name: BITS[at] for name, at in zip(losses, chosen, strict=True)}
