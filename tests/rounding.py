"""What float32 costs a computation, whichever BLAS, kernels or framework compute it: the measure of parity's gates.

The computation runs in torch in float64, and every operation's result is rounded to float32, forward and backward:
the best that float32 storage allows. Its distance from plain float64 is the *cost*. A framework's own float32 also
accumulates in float32: over the cases of the ladder it lies 1.3 (median) to 1.6 times the cost from float64 wherever
that is above 8e-6, with MKL and with OpenBLAS alike. A gate is three times the cost, at least 1e-5.
"""

from collections.abc import Callable
from typing import Any

import torch
from compare import worst, worst_gradient
from torch.utils._python_dispatch import TorchDispatchMode

LEAST = 1e-5  # a gate is never below it
TIMES = 3.0


class Rounding(TorchDispatchMode):
    """Rounds what every operation returns in float64 to float32; views stay views."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, returns = func(*args, **(kwargs or {})), func._schema.returns
        if isinstance(found, torch.Tensor):
            return _rounded(found, returns[0].alias_info)
        if isinstance(found, (tuple, list)) and len(returns) == len(found):
            return type(found)(_rounded(one, each.alias_info) for one, each in zip(found, returns, strict=True))
        return found


def _rounded(found: Any, alias: Any) -> Any:
    if not isinstance(found, torch.Tensor) or found.dtype != torch.float64:
        return found
    if alias is None:
        return found.float().double()
    return found.copy_(found.float()) if alias.is_write else found


def rounded(function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """What ``function`` computes where every result is rounded to float32."""
    with Rounding():
        return function(*args, **more)


def costs(what: str, best: Any, exact: Any) -> tuple[float, float]:
    """What float32 costs the logits and the worst gradient of a probe."""
    return (
        worst(f"{what}: cost, logits", best.logits, exact.logits),
        worst_gradient(f"{what}: cost, gradients", best.gradients, exact.gradients),
    )


def gate(cost: float, least: float = LEAST, times: float = TIMES) -> float:
    """The largest distance from float64 that counts as rounding; infinite for a broken cost, which nothing passes."""
    return max(least, times * cost)
