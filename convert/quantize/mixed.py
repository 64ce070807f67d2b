"""``--bits mixed:4.5``: bits by matrix, so that the expected KL is the least that fits into so many bits per weight.

All is counted: words, scales, biases, and what is not quantized.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from convert.quantize.allocation import allocate
from convert.quantize.sensitivity import expected_losses
from convert.quantize.source import Source
from convert.quantize.work import Scheme
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import families, params
from mlxgpt.common.model.affine import BITS

TOKENS = 4096  # of the calibration text that sensitivity is measured on, or one window


def schemes(
    target: float,
    source: Source,
    walk: Any,
    rows: np.ndarray,
    modules: Sequence[str],
    group_size: int,
    say: Callable[[str], None],
) -> dict[str, Scheme]:
    """The schemes of ``modules``, of at most ``target`` bits per weight in all.

    Args:
        target: bits per weight.
        source: the model.
        walk: a backend's calibrate.Walk.
        rows: (N, T + 1) ids of the calibration text, of which the first are read.
        modules: the matrices.
        group_size: weights that share a scale.
        say: is told of each matrix before its turn.

    Raises:
        UserError: see ``choose``.
    """
    shapes = {name: param.shape for name, param in params.table(families.on_disk(source.config)).items()}
    other = sum(
        int(np.prod(shape)) * (source.dtype(name).itemsize if name in source else 4) * 8
        for name, shape in shapes.items()
        if name.removesuffix(".weight") not in modules
    )
    sizes = {
        name: {
            bits: matrix_bits(shapes[f"{name}.weight"], bits, group_size, source.dtype(f"{name}.weight"))
            for bits in BITS
        }
        for name in modules
    }
    weights = params.count(source.config)
    least: dict[str, dict[int, float]] = {name: {bits: 0.0 for bits in BITS} for name in modules}
    choose(least, sizes, other, weights, target)  # refuses before it measures
    few = rows[: max(1, TOKENS // (rows.shape[1] - 1))]
    losses = expected_losses(walk, source, few, modules, group_size, lambda name: say(f"sensitivity of {name}"))
    chosen = choose(losses, sizes, other, weights, target)
    return {name: Scheme(bits, group_size) for name, bits in chosen.items()}


def matrix_bits(shape: tuple[int, ...], bits: int, group_size: int, dtype: np.dtype) -> int:
    """The bits that a matrix takes in a file: words, and scales and biases of ``dtype``."""
    count = int(np.prod(shape))
    return count * bits + count // group_size * 2 * dtype.itemsize * 8


def choose(
    losses: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, Mapping[int, int]],
    other: int,
    weights: int,
    target: float,
) -> dict[str, int]:
    """The bits of each matrix of ``losses``, never more than ``target`` bits per weight in all.

    Args:
        losses: what each of BITS is expected to cost, see sensitivity.expected_losses.
        sizes: the bits that each of BITS takes in all, see ``matrix_bits``.
        other: bits of all tensors that are not in ``losses``.
        weights: of the whole model.
        target: bits per weight.

    Raises:
        UserError: even at the fewest bits the model is larger.
    """
    each = [[sizes[name][bits] for bits in BITS] for name in losses]
    costs = [[cost[bits] for bits in BITS] for cost in losses.values()]
    chosen = allocate(each, costs, int(target * weights) - other)
    if chosen is None:
        least = (other + sum(map(min, each))) / weights
        found = f"all matrices at {BITS[0]} bits make {least:.3f} bits per weight, scales and all else counted"
        raise UserError(f"--bits mixed:{target:g}: {found}")
    return {name: BITS[at] for name, at in zip(losses, chosen, strict=True)}
