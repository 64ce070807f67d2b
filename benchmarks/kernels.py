"""Kernels that a training step launches on Metal, counted in MLX's compiled graph: nothing is computed or timed.

    python -m benchmarks.kernels

The graph is made on any machine, with MLX's default device said to be a GPU: the code takes its paths for a GPU, and
the norms count as the kernels that Metal has for them. What only renames memory launches nothing; a concatenation
launches a kernel for each of its inputs, as MLX's Metal backend does.
"""

import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt import device as devices
from mlxgpt import engine as engines
from mlxgpt.common import recipes
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import Recipe
from mlxgpt.common.model import adapters

# isort: split
import mlx.core as mx

VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten"),
    *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
"""Primitives that launch nothing on Metal, as long as what they are given is contiguous."""
NODE = re.compile(r'\{ (\d+) \[label ="([^"]*)", shape=rectangle\]; \}')


def operations(*arrays: mx.array) -> Counter[str]:
    """The primitives of the graph that makes the arrays, by name."""
    return Counter(label for _, label in _nodes(arrays))


def kernels(*arrays: mx.array, copies: bool = True) -> int:
    """Kernels that the graph of the arrays launches, with or without ``copies`` into larger arrays."""
    text, launched = _text(arrays), 0
    inputs = Counter(re.findall(r"-> (\d+)$", text, re.MULTILINE))
    for node, label in NODE.findall(text):
        if label == "Concatenate":
            launched += inputs[node] if copies else 0
        else:
            launched += 0 if label in VIEWS else 2 if label == "Pad" else 1
    return launched


def _text(arrays: tuple[mx.array, ...]) -> str:
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue()


def _nodes(arrays: tuple[mx.array, ...]) -> list[tuple[str, str]]:
    return NODE.findall(_text(arrays))


def _norm(reductions: int) -> Any:
    """Stands for a norm: a kernel forward, one backward and a reduction for each of its weights, and nothing fused."""

    @mx.custom_function
    def run(x: mx.array, *weights: mx.array) -> mx.array:
        return mx.sort(x)

    @run.vjp
    def run_vjp(primals: Any, cotangent: mx.array, y: mx.array) -> Any:
        _, *weights = primals if isinstance(primals, tuple | list) else (primals,)
        made = mx.sort(cotangent)
        return (made, *(made.reshape(-1, made.shape[-1]).sum(axis=0) for _ in weights)) if weights else made

    return run


@contextlib.contextmanager
def on_metal() -> Iterator[None]:
    """The paths for a GPU, and its norms: graphs that are made here are for counting, not for computing."""
    gpu, norm = mx.Device(mx.gpu), _norm(1)

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return norm(x) if weight is None else norm(x, weight)

    def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
        return norm(x, *(each for each in (weight, bias) if each is not None))

    with (
        mock.patch.object(mx, "default_device", lambda: gpu),
        mock.patch.object(devices, "use", lambda name="auto": gpu),
        mock.patch.object(devices, "limit", lambda *_: []),
        mock.patch.object(mx.fast, "rms_norm", rms_norm),
        mock.patch.object(mx.fast, "layer_norm", layer_norm),
    ):
        yield


def _like(shape: tuple[int, ...]) -> mx.array:
    """Of this shape, made by nothing that launches a kernel, and without memory."""
    return mx.broadcast_to(mx.array(0.0), shape)


class Counted(engines.Engine):
    """An engine whose steps are made and never computed; its weights have shapes and no values."""

    def __init__(self, recipe: Recipe):
        tensors: Any = {name: _like(shape) for name, shape in adapters.shapes(recipe).items()}
        super().__init__(recipe, tensors)
        for group in (self.p, self.m, self.v):
            group |= {name: _like(each.shape) for name, each in group.items()}
        self._show({name: _like(self.table[name].shape) for name in self.table})

    def _settle(self, *more: mx.array) -> None:
        """Leaves everything pending."""

    def arrays(self, rows: int, packed: bool) -> engines.losses.Arrays:
        """A micro-batch of the recipe's context length."""
        shape = (rows, self.recipe.model.block_size)
        ints, extra = np.zeros(shape, np.int32), np.zeros(shape, np.int32) if packed else None
        return self._arrays(Batch(ints, ints, np.ones(shape, np.float32), extra, extra))

    def step(self, rows: int, packed: bool = False) -> list[mx.array]:
        """What an update from one micro-batch makes: its results and the new state."""
        terms, _, *norms = self._run_step(self.arrays(rows, packed), self._keys(1), mx.array(0, mx.uint32), _like((6,)))
        return [terms, *norms, *self.state()]

    def gradients(self, rows: int, packed: bool = False) -> tuple[mx.array, dict[str, mx.array]]:
        """What a further micro-batch makes of gradients that were there."""
        total = {name: _like(param.shape) for name, param in self.table.items()}
        terms, _, grads = self._run_gradients(self.arrays(rows, packed), self._keys(1), mx.array(0, mx.uint32), total)
        return terms, grads

    def update(self) -> list[mx.array]:
        """What an update makes of gradients that are there."""
        grads = {name: _like(param.shape) for name, param in self.table.items()}
        return [*self._run_update(_like((2, 2)), grads, _like((6,))), *self.state()]

    def state(self) -> list[mx.array]:
        """Weights and moments."""
        return [*(self.p or self._weights()).values(), *self.m.values(), *self.v.values()]


def of_recipe(name: str) -> Recipe:
    """A shipped recipe, with a vocabulary where its own comes from the data."""
    sections = recipes.read_toml(recipes.find(name))
    sections["model"].setdefault("vocab_size", sections["data"].get("vocab_size", 65))
    return recipes.build(sections)


def main() -> None:
    """Prints the table."""
    print(f"{'recipe':<20} {'one micro-batch':>16} {'a further one':>14} {'update':>8} {'tensors':>8}")
    for name in ("pydocs", "llama-10m", "gpt2-124m"):
        recipe = of_recipe(name)
        rows = recipe.train.micro_batch_size or recipe.train.batch_size
        with on_metal():
            engine = Counted(recipe)
            terms, grads = engine.gradients(rows)
            found = [kernels(terms, *grads.values()), kernels(*engine.update())]
            whole = kernels(*Counted(recipe).step(rows))
        print(f"{name:<20} {whole:>16} {found[0]:>14} {found[1]:>8} {len(recipe_tensors(recipe)):>8}")


def recipe_tensors(recipe: Recipe) -> Any:
    """Tensors that are trained."""
    return adapters.trainable(recipe)


if __name__ == "__main__":
    main()
