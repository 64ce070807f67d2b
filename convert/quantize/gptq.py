"""GPTQ (Frantar et al. 2023) in MLX's affine format: one matrix at a time, in float64 on the host.

Columns are rounded one after the other, in the order of activation with static groups, and what rounding a column
changes in the outputs is taken from those that follow. With H = G / tokens + DAMPING mean(diag H) I, D the change of
a row and U the upper Cholesky factor of the inverse, H^-1 = U^T U,

    e = (w_k - q_k) / U_kk,   w_j -= e U_kj  for j > k,   and the cost of a row is D H D^T.

A group's range is searched beforehand, its scale and bias are fitted by least squares afterwards, and with those the
columns are rounded once more; a row keeps what costs least. All is held against the scales and biases as they are
stored, so what is written is what was optimized.
"""

import numpy as np

from convert.quantize.work import Inputs, Scheme
from mlxgpt.common.model.affine import Quantized, pack

DAMPING = 0.01  # of the mean of H's diagonal
SHRINKS = np.linspace(1, 0.5, 21)  # of a group's range
ROUNDS = 3  # of rounding and fitting
BLOCK = 128  # columns whose errors are gathered before the rest is told
_SMALLEST = 1e-7  # a scale where the weights of a group are equal, as mx.quantize has it


def quantize(weight: np.ndarray, inputs: Inputs, scheme: Scheme, dtype: np.dtype | None = None) -> Quantized:
    """A matrix (n_out, n_in) in the scheme; scales and biases in ``dtype``, default the matrix's.

    Inputs that were never on, and a singular G, are left to the damping; of no inputs at all all columns count alike.
    """
    w, dtype = weight.astype(np.float64).T, dtype or weight.dtype  # (n_in, n_out): a column of W is a row in memory
    H = damped(inputs)
    scales, biases = search(w, np.diag(H), scheme, dtype)
    order = np.argsort(-np.diag(H), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    best, least = (np.zeros_like(w), scales, biases), np.full(w.shape[1], np.inf)
    for _ in range(ROUNDS):
        levels = np.empty_like(w)
        scale, bias = (np.repeat(each, scheme.group_size, axis=0)[order] for each in (scales, biases))
        levels[order] = round_columns(w[order], factor, scale, bias, 2**scheme.bits - 1)
        scales, biases = fit(w, levels, H, scales, biases, scheme.group_size, dtype)
        change = matrix(levels, scales, biases, scheme.group_size) - w
        costs = np.einsum("io,io->o", change, H @ change)
        better = costs < least
        least = np.where(better, costs, least)
        best = tuple(np.where(better, new, old) for new, old in zip((levels, scales, biases), best, strict=True))
    levels, scales, biases = (np.ascontiguousarray(each.T) for each in best)
    words = pack(levels.astype(np.uint8), scheme.bits)
    return Quantized(words, scales.astype(dtype), biases.astype(dtype), scheme.bits, scheme.group_size)


def damped(inputs: Inputs) -> np.ndarray:
    """H (n_in, n_in), positive definite."""
    H = inputs.gram / inputs.tokens
    return H + (DAMPING * np.mean(np.diag(H)) or 1.0) * np.eye(len(H))


def search(w: np.ndarray, diagonal: np.ndarray, scheme: Scheme, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases (n_in / group_size, n_out), as ``dtype`` has them, of the matrix w (n_in, n_out).

    Of ranges from the whole of a group's weights to half of it: where the squared error is least, each input weighted
    by H's diagonal (n_in,).
    """
    groups, bins = w.reshape(-1, scheme.group_size, w.shape[1]), 2**scheme.bits - 1
    weights = diagonal.reshape(-1, 1, scheme.group_size)
    low, high = groups.min(axis=1), groups.max(axis=1)
    best, least = (low, low), np.full(low.shape, np.inf)
    for shrink in SHRINKS:
        scales = stored(np.maximum((high - low) * shrink / bins, _SMALLEST), dtype)
        biases = stored(low * shrink, dtype)
        change = nearest(groups, scales[:, None], biases[:, None], bins) * scales[:, None] + biases[:, None] - groups
        errors = (weights @ np.square(change, out=change))[:, 0]
        better = errors < least
        least = np.where(better, errors, least)
        best = np.where(better, scales, best[0]), np.where(better, biases, best[1])
    return best


def round_columns(w: np.ndarray, factor: np.ndarray, scales: np.ndarray, biases: np.ndarray, bins: int) -> np.ndarray:
    """Levels (n_in, n_out) of w, whose columns are rows here, in order; scales and biases are of its shape.

    ``factor``: U (n_in, n_in) of the same order. What a block changes is told to the columns behind it at once.
    """
    w, levels = w.copy(), np.empty_like(w)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        errors = np.empty((stop - start, w.shape[1]))
        for k in range(start, stop):
            levels[k] = nearest(w[k], scales[k], biases[k], bins)
            errors[k - start] = (w[k] - (levels[k] * scales[k] + biases[k])) / factor[k, k]
            w[k + 1 : stop] -= factor[k, k + 1 : stop, None] * errors[k - start]
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return levels


def fit(
    w: np.ndarray,
    levels: np.ndarray,
    H: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    group_size: int,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of which the levels cost less: group after group by least squares, the others as they are.

    A pair that costs no less once it is rounded to ``dtype`` stays as it was.
    """
    scales, biases = scales.copy(), biases.copy()
    change = matrix(levels, scales, biases, group_size) - w
    for n in range(len(scales)):
        inside = slice(n * group_size, (n + 1) * group_size)
        own, level = H[inside, inside], levels[inside]
        pull = H[inside] @ change  # half the gradient of the cost, by the weights of the group
        by_level = own @ level
        # the normal equations of the steps of scale and bias: [[aa, ab], [ab, bb]] [ds, db] = -[a, b]
        aa, ab, bb = np.einsum("io,io->o", level, by_level), by_level.sum(axis=0), own.sum()
        a, b = np.einsum("io,io->o", level, pull), pull.sum(axis=0)
        size = aa * bb - ab * ab
        solvable = size > 1e-9 * aa * bb
        size = np.where(solvable, size, 1)
        scale = stored(scales[n] + np.where(solvable, (ab * b - bb * a) / size, 0), dtype)
        bias = stored(biases[n] + np.where(solvable, (ab * a - aa * b) / size, 0), dtype)
        ds, db = scale - scales[n], bias - biases[n]
        more = ds * (2 * a + ds * aa + db * ab) + db * (2 * b + ds * ab + db * bb)
        better = (more < 0) & (scale != 0) & np.isfinite(scale) & np.isfinite(bias)
        scales[n], biases[n] = np.where(better, scale, scales[n]), np.where(better, bias, biases[n])
        change[inside] += better * (level * ds + db)
    return scales, biases


def nearest(w: np.ndarray, scales: np.ndarray, biases: np.ndarray, bins: int) -> np.ndarray:
    """The level of each weight."""
    return np.minimum(np.maximum(np.rint((w - biases) / scales), 0), bins)


def matrix(levels: np.ndarray, scales: np.ndarray, biases: np.ndarray, group_size: int) -> np.ndarray:
    """The weights (n_in, n_out) of levels of that shape, and of scales and biases (n_in / group_size, n_out)."""
    return levels * np.repeat(scales, group_size, axis=0) + np.repeat(biases, group_size, axis=0)


def stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values as ``dtype`` has them, in float64."""
    with np.errstate(over="ignore"):
        return values.astype(dtype).astype(np.float64)
