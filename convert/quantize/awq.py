"""AWQ (Lin et al. 2024) from the inputs' Gram matrices alone: channels that matter are scaled up, ranges are clipped.

The columns of W are multiplied by s = mean|x|^e, and what writes those channels is divided by s (folding.py); e is
the exponent of a grid that costs least. No forward pass is needed: the change of the outputs is tr(D G D^T) / tokens
with D = Q(W s) / s - W. A scaled row has the groups it had, so one fold does not disturb another.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from convert.quantize.folding import Fold, fold, folds
from convert.quantize.work import Inputs, Scheme
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model.affine import Quantized

EXPONENTS = np.linspace(0, 1, 20, endpoint=False)
SHRINKS = np.linspace(1, 0.5, 11)
_SMALLEST = 1e-4  # of a mean, relative to the largest: a channel that is never on


def scale_channels(
    config: ModelConfig, weights: Mapping[str, np.ndarray], given: Mapping[str, Inputs], schemes: Mapping[str, Scheme]
) -> tuple[dict[str, np.ndarray], dict[str, Inputs]]:
    """One place of a model with its channels scaled: what of its parameters changes, and what its matrices are given.

    Args:
        config: the model's.
        weights: the parameters of a block, or of the head and the norm before it.
        given: the inputs of each matrix there that is to be quantized, by module.
        schemes: theirs.
    """
    changed, inputs = dict(weights), dict(given)
    for place in folds(config):
        if not isinstance(place, Fold) or f"{place.readers[0]}.weight" not in weights:
            continue
        rounded = [name for name in place.readers if name in given]
        if not rounded:
            continue
        matrices = [weights[f"{name}.weight"] for name in rounded]
        scale = search(matrices, given[rounded[0]], [schemes[name] for name in rounded], place)
        changed |= fold(changed, place, scale)
        inputs |= {name: scaled(given[name], scale) for name in rounded}
    return {name: each for name, each in changed.items() if each is not weights[name]}, inputs


def search(weights: Sequence[np.ndarray], inputs: Inputs, schemes: Sequence[Scheme], place: Fold) -> np.ndarray:
    """The scale (n_in,) of the channels that ``weights`` read, which costs least; all ones where none costs less.

    Args:
        weights: the matrices (n_out, n_in) of ``place.readers``, float32; those that stay as they are left out.
        inputs: of all of them.
        schemes: theirs, one each.
        place: what shares a scale.
    """
    size = np.maximum(place.shared(inputs.mean), _SMALLEST * max(inputs.mean.max(), np.finfo(np.float64).tiny))
    gram = (inputs.gram / inputs.tokens).astype(np.float32)
    best, least = np.ones(len(size), np.float32), np.inf
    for exponent in EXPONENTS:
        scale = size**exponent
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        cost = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            rounded = Quantized.of(weight * scale, scheme.bits, scheme.group_size).dequantize()
            change = rounded / scale - weight
            cost += float(np.vdot(change @ gram, change))
        if cost < least:
            best, least = scale, cost
    return best


def scaled(inputs: Inputs, scale: np.ndarray) -> Inputs:
    """What the readers are given once their channels are divided by ``scale``."""
    wide = scale.astype(np.float64)
    return Inputs(inputs.gram / np.outer(wide, wide), inputs.mean / wide, inputs.tokens)


def clip(weight: np.ndarray, inputs: Inputs, scheme: Scheme) -> np.ndarray:
    """The matrix (n_out, n_in), the range of each group as much narrower as costs least with that group alone."""
    size = scheme.group_size
    groups = weight.reshape(len(weight), -1, size).astype(np.float32)
    blocks = inputs.gram.reshape(groups.shape[1], size, groups.shape[1], size) / inputs.tokens
    own = np.stack([blocks[n, :, n] for n in range(len(blocks))]).astype(np.float32)  # (groups, size, size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    best, least = groups.copy(), np.full(groups.shape[:2], np.inf, np.float32)
    for shrink in SHRINKS:
        cut = np.clip(groups, low * np.float32(shrink), high * np.float32(shrink))
        stored = cut.reshape(weight.shape).astype(weight.dtype)
        rounded = Quantized.of(stored, scheme.bits, size).dequantize().reshape(groups.shape)
        change = (rounded - groups).swapaxes(0, 1)  # (groups, n_out, size)
        cost = ((change @ own) * change).sum(-1).T
        better = cost < least
        best[better], least[better] = cut[better], cost[better]
    return best.reshape(weight.shape).astype(weight.dtype)


def quantize(weight: np.ndarray, inputs: Inputs, scheme: Scheme) -> Quantized:
    """A matrix whose channels are scaled already: its ranges clipped, then rounded to nearest."""
    return Quantized.of(clip(weight, inputs, scheme), scheme.bits, scheme.group_size)
