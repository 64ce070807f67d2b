"""What a training step holds at most, from the operations of the step itself, on tensors that have shapes only."""

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlxgpt.common.config import Recipe
from torch_ref import engine as engines
from torch_ref import losses, optim


class Watch(TorchDispatchMode):
    """Counts the bytes of the storages that live, and keeps what lived at the peak."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[weakref.ref, tuple[int, ...], int]] = {}
        self.bytes = self.peak = 0
        self.at_peak: list[tuple[tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return made

    def note(self, tensor: torch.Tensor) -> None:
        """Takes up a storage that is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = storage.nbytes()

        def gone(_: weakref.ref, key: int = key, size: int = size) -> None:
            self.live.pop(key)
            self.bytes -= size

        self.live[key] = weakref.ref(storage, gone), tuple(tensor.shape), size
        self.bytes += size
        if self.bytes > self.peak:
            self.peak = self.bytes
            self.at_peak = [(shape, size) for _, shape, size in self.live.values()]


class Still(engines.Model):
    """A model that is where it is: tensors without values cannot be moved."""

    def to(self, *_: Any, **__: Any) -> "Still":
        """Itself."""
        return self


class Outline(engines.Engine):
    """An engine of the right shapes without values."""

    def __init__(self, recipe: Recipe):
        kept, engines.Model = engines.Model, Still
        try:
            super().__init__(recipe, {}, "cpu")
        finally:
            engines.Model = kept

    def _put(self, params: dict) -> None:
        """Keeps the zeros that the model was made of."""


def peak(recipe: Recipe, rows: int, length: int) -> Any:
    """Of a step on micro-batches of ``rows`` rows of ``length`` tokens."""
    config = recipe.optim
    shapes = FakeTensorMode()
    with shapes:
        outline = Outline(recipe)
    watch = Watch()
    for tensor in (*outline.model.parameters(), *outline.model.buffers(), *outline.m.values(), *outline.v.values()):
        watch.note(tensor)
    with shapes, watch:
        ints, floats = torch.zeros((rows, length), dtype=torch.int32), torch.zeros((rows, length))
        batch = losses.Arrays(ints, ints, floats, None, None)
        keys = torch.zeros((1 + engines.SITES * recipe.model.n_layer,), dtype=torch.int32)
        first = torch.zeros((), dtype=torch.int32)
        outline._gradients(batch, keys, first)
        with torch.no_grad():
            for name, p in outline.weights.items():
                g, m = p.grad, outline.m[name]
                if name in outline.muon:
                    optim.muon(p, g, m, [0.0] * 5, config)
                else:
                    optim.adamw(p, g, m, outline.v[name], [0.0] * 5, outline.table[name].decay, config)
    return watch.peak, watch.at_peak
