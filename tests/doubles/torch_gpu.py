"""torch_ref as it runs on CUDA or MPS, on the CPU: their branches, but no kernels of theirs; waits are counted."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_ref import fast, transfer

WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


class Gpu:
    """Its ``events``, and, if watched, ``waits`` by name and ``copies``: True from pinned memory and not waited for."""

    def __init__(self, kind: str, patch: pytest.MonkeyPatch):
        self.waits: list[str] = []
        self.copies: list[bool] = []
        self.events: list[str] = []
        self.pinned: set[int] = set()
        self.patch = patch
        patch.setattr(fast, "kind", lambda _: kind)
        patch.setattr(fast, "has_triton", lambda: True)
        patch.setattr(fast, "call", self._call)
        patch.setattr(flex_attention, "_validate_device", lambda *_: None)  # on CPUs it has no backward officially
        patch.setattr(transfer, "pinned", self._pinned)
        patch.setattr(torch.mps, "current_allocated_memory", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda _: self)

    def watch(self) -> None:
        """Counts from now on; PyTorch compiles nothing then, FlexAttention included."""
        self.waits, self.copies, self.events = [], [], []
        for name in WAITS:
            self.patch.setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))
        plain = torch.Tensor.to

        def to(tensor: torch.Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
            if args and isinstance(args[0], torch.device):
                self.copies.append(non_blocking and tensor.untyped_storage().data_ptr() in self.pinned)
            return plain(tensor, *args, **kwargs)

        self.patch.setattr(torch.Tensor, "to", to)

    def _call(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return function(*args, **kwargs)

    def _pinned(self, elements: int) -> torch.Tensor:
        made = torch.empty(elements, dtype=torch.int32)
        self.pinned.add(made.untyped_storage().data_ptr())
        return made

    def _counting(self, name: str, plain: Callable) -> Callable:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.untyped_storage().data_ptr() not in self.pinned:
                self.waits.append(name)
            return plain(tensor, *args, **kwargs)

        return call

    def record_event(self) -> "Gpu":
        """As a stream's."""
        self.events.append("recorded")
        return self

    def synchronize(self) -> None:
        """As an event's."""
        self.events.append("waited")


class Log(TorchDispatchMode):
    """The operations that reach PyTorch's kernels, and the dtypes of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(func.name().removeprefix("aten::").partition(".")[0])
        made = func(*args, **(kwargs or {}))
        self.dtypes |= {each.dtype for each in tree_leaves(made) if isinstance(each, torch.Tensor)}
        return made
