"""What float32 costs a computation, whichever BLAS, kernels or framework compute it: the measure of parity's gates.

The computation runs in torch in float64, and every operation's result is rounded to float32, up or down at random, forward
and backward (stochastic arithmetic: Vignes 1993, Parker 1997). The largest distance from plain float64 of a few draws is
the *cost*. Measured over the 48 cases of test_adapters.py with MKL (2026-11-29): a framework's own float32 lies 1.0 times
the cost from float64 in the median, 1.3 times at most wherever it is above 8e-6. A gate is twice the cost, at least 1e-5.
"""

from collections.abc import Callable
from typing import Any

import torch
from compare import worst, worst_gradient
from torch.utils._python_dispatch import TorchDispatchMode

LEAST = 1e-5  # a gate is never below it
TIMES = 2.0
DRAWS = 2


class Rounding(TorchDispatchMode):
    """Rounds what every operation returns in float64 to float32, up or down at random; views stay views."""

    def __init__(self, seed: int):
        super().__init__()
        self._draw = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, returns = func(*args, **(kwargs or {})), func._schema.returns
        if isinstance(found, torch.Tensor):
            return self._rounded(found, returns[0].alias_info)
        if isinstance(found, (tuple, list)) and len(returns) == len(found):
            return type(found)(self._rounded(one, each.alias_info) for one, each in zip(found, returns, strict=True))
        return found

    def _rounded(self, found: Any, alias: Any) -> Any:
        if not isinstance(found, torch.Tensor) or found.dtype != torch.float64:
            return found
        if alias is not None and not alias.is_write:
            return found
        unit = torch.ldexp(torch.ones_like(found), torch.frexp(found).exponent - 24)
        noise = torch.rand(found.shape, dtype=torch.float64, generator=self._draw) - 0.5
        made = (found + noise * unit).float().double()
        return made if alias is None else found.copy_(made)


def rounded(function: Callable[..., Any], *args: Any, **more: Any) -> list[Any]:
    """What ``function`` computes where every result is rounded to float32, a few times."""
    made = []
    for seed in range(DRAWS):
        with Rounding(seed):
            made.append(function(*args, **more))
    return made


def costs(what: str, drawn: list[Any], exact: Any) -> tuple[float, float]:
    """What float32 costs the logits and the worst gradient of a probe."""
    return (
        max(worst(f"{what}: cost, logits", one.logits, exact.logits) for one in drawn),
        max(worst_gradient(f"{what}: cost, gradients", one.gradients, exact.gradients) for one in drawn),
    )


def gate(cost: float) -> float:
    """The largest distance from float64 that counts as rounding; infinite for a broken cost, which nothing passes."""
    return max(LEAST, TIMES * cost)
