"""How much a model changes when one matrix alone is rounded: what mixed bits are chosen by.

Measured is KL(before || after) in nats per token with the matrix rounded to nearest at PROBE bits, and everything else
as it is. At other bits it is that times the ratio of the costs tr(D G D^T): KL is a quadratic form of small changes.
"""

from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from convert.quantize.work import cost
from mlxgpt.common.inference import calibration
from mlxgpt.common.inference.calibration import Inputs, Stream, Weights
from mlxgpt.common.model.affine import BITS, Quantized

PROBE = 3


def expected_losses(
    walk: Any,
    weights: Weights,
    tokens: np.ndarray,
    matrices: Sequence[str],
    group_size: int,
    said: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[int, float]]:
    """The KL that each of BITS is expected to cost, by matrix.

    Args:
        walk: a backend's calibrate.Walk.
        weights: the model's, by name.
        tokens: (N, T + 1) ids of text.
        matrices: modules to be quantized, such as h.0.attn.q_proj, wte and lm_head.
        group_size: divides their inputs.
        said: is told of each matrix before its turn.
    """
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    streams, costs = [walk.start(weights, tokens)], {}
    for n in range(walk.config.n_layer):
        inside = [name.removeprefix(f"h.{n}.") for name in matrices if name.startswith(f"h.{n}.")]
        after, given = walk.block(n, weights, streams[-1], inside)
        streams.append(after)
        costs |= {f"h.{n}.{name}": _costs(weights, f"h.{n}.{name}", given[name], group_size) for name in inside}
    for name in matrices:
        if not name.startswith("h."):  # an embedding's rows are added up with equal weights, unless they are the head
            head = f"{name}.weight" in calibration.head_names(walk.config)
            costs[name] = _costs(weights, name, walk.head_inputs(weights, streams[-1]) if head else None, group_size)
    found = {}
    for name in matrices:
        said(name)
        whole = calibration.held(weights, f"{name}.weight")
        rounded = {f"{name}.weight": Quantized.of(whole, PROBE, group_size)}
        changed = ChainMap(cast(Any, rounded), cast(Any, weights))  # the model itself may be on disk
        kl = float(_after(walk, weights, changed, name, tokens, streams, targets).mean(dtype=np.float64))
        base = costs[name][PROBE]
        found[name] = {bits: kl * costs[name][bits] / base if base else 0.0 for bits in BITS}
    return found


def _costs(weights: Weights, name: str, inputs: Inputs | None, group_size: int) -> dict[int, float]:
    """What rounding to nearest costs at each of BITS."""
    weight = calibration.held(weights, f"{name}.weight")
    inputs = inputs or Inputs(np.eye(weight.shape[1]), np.ones(weight.shape[1]), 1)
    return {bits: cost(Quantized.of(weight, bits, group_size).dequantize() - weight, inputs) for bits in BITS}


def _after(
    walk: Any,
    weights: Weights,
    changed: Weights,
    name: str,
    tokens: np.ndarray,
    streams: Sequence[np.ndarray],
    targets: np.ndarray,
) -> np.ndarray:
    """KL (N, T) where ``name`` alone is changed: only what comes after it is computed anew."""
    first = int(name.split(".")[1]) if name.startswith("h.") else 0 if name in ("wte", "wpe") else len(streams) - 1
    x = walk.start(changed, tokens) if name in ("wte", "wpe") else streams[first]
    for n in range(first, walk.config.n_layer):
        x, _ = walk.block(n, changed, x)
    return walk.compare(Stream(weights, streams[-1]), Stream(changed, x), targets).kl
