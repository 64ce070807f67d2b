"""The peak of memory where PyTorch counts only what is held now (MPS): that figure, read after every operation.

The first steps of an engine are watched so, each operation at the price of some Python; later ones allocate the same.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_ref import fast

STEPS = 2  # the first has no moments to read yet where an update makes some


class Peak(TorchDispatchMode):
    """The most bytes that torch.mps has named so far, of tensors that operations made; also in autograd's threads."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # watched, of each engine

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing compiles while this is on, and dynamo takes seconds to import."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.look()
        return made

    def look(self) -> int:
        """Bytes now."""
        now = torch.mps.current_allocated_memory()
        self.bytes = max(self.bytes, now)
        return now


PEAK = Peak()


def watched(step: Callable) -> Callable:
    """An engine's step, whose peak is seen on MPS; a compiled one is looked at before and after."""

    @functools.wraps(step)
    def run(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if fast.kind(engine.device) != "mps":
            return step(engine, *args, **kwargs)
        done = PEAK.steps.get(engine, 0)
        PEAK.steps[engine] = done + 1
        PEAK.look()
        if engine.compiled or done >= STEPS:
            made = step(engine, *args, **kwargs)
        else:
            with PEAK:
                made = step(engine, *args, **kwargs)
        PEAK.look()
        return made

    return run
