"""What a training step holds at most, from the graph of the step itself, which is built and never computed."""

import dataclasses
from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import losses, model
from mlxgpt import engine as engines
from mlxgpt.common import mlx_memory
from mlxgpt.common.config import Recipe
from mlxgpt.common.mlx_memory import Graph, Kind, Node


class Cut:
    """Stands for mx.custom_function, whose graph MLX cannot export: notes what goes in and how it is differentiated."""

    last: "Cut | None" = None

    def __init__(self, function: Any):
        self.function = function
        Cut.last = self

    def vjp(self, function: Any) -> Any:
        """Takes the function that mx.custom_function calls for gradients."""
        self.backward = function
        return function

    def __call__(self, *primals: mx.array) -> Any:
        self.primals = primals
        named = tree_flatten(list(self.function(*primals)))
        joined = mx.depends([*primals, *(array for _, array in named)], [mx.zeros(())])[len(primals) :]
        self.outputs = tree_unflatten([(name, array) for (name, _), array in zip(named, joined, strict=True)])
        return self.outputs


class Outline(engines.Engine):
    """An engine of the right shapes without values: nothing is evaluated, so nothing is allocated."""

    def __init__(self, recipe: Recipe):
        train = dataclasses.replace(recipe.train, deterministic=False)
        super().__init__(dataclasses.replace(recipe, train=train), {}, "auto")
        self.names = [name for name, _ in tree_flatten(self.model.parameters())]
        self._loss_and_grad = self._staged
        self.ends = (mx.zeros(()), mx.zeros(()))

    def _put(self, params: dict) -> None:
        """Keeps the zeros that the model was made of."""

    def _settle(self, *more: mx.array) -> None:
        """Leaves everything pending."""

    def _staged(self, *inputs: Any) -> Any:
        """nn.value_and_grad of the objective, around a Cut by hand."""
        Cut.last = None
        _, terms = self._objective(*inputs)
        if Cut.last is None:
            return nn.value_and_grad(self.model, self._objective)(*inputs)
        cut = Cut.last
        cotangents = [inputs[0].weights.reshape(-1), *cut.outputs[1:]]  # a head uses the first alone
        back = list(cut.backward(cut.primals, cotangents, cut.outputs))
        flat = tree_flatten(self.model.trainable_parameters())
        kept = [n for n in range(len(back)) if n != 2]  # hidden states, weight, bias; not the targets

        def primals(*values: mx.array) -> list[mx.array]:
            self.model.update(tree_unflatten([(name, v) for (name, _), v in zip(flat, values, strict=True)]))
            self._objective(*inputs)
            assert Cut.last
            return [Cut.last.primals[n] for n in kept]

        _, grads = mx.vjp(primals, [value for _, value in flat], [back[n] for n in kept])
        self.model.update(tree_unflatten(flat))
        named = [(name, grad) for (name, _), grad in zip(flat, grads, strict=True)]
        return (terms.sum(), terms), tree_unflatten(named)

    def marked(self, block: Any) -> Any:
        """Stands for mx.checkpoint: a block whose ends can be found in the graph."""

        def run(x: mx.array, *rest: Any) -> mx.array:
            return mx.depends([block(mx.depends([x], [self.ends[0]])[0], *rest)], [self.ends[1]])[0]

        return run

    def state(self) -> list[mx.array]:
        """Weights, first and second moments."""
        weights = self._weights()
        return [*(weights[name] for name in self.names), *self.m.values(), *self.v.values()]

    def take(self, arrays: list[mx.array]) -> None:
        """Puts what state() lists back."""
        it = iter(arrays)
        self.model.update(tree_unflatten([(name, next(it)) for name in self.names]))
        self.m = {name: next(it) for name in self.m}
        self.v = {name: next(it) for name in self.v}


def graph(function: Any, inputs: list[mx.array]) -> Graph:
    """What ``function`` (arrays -> list of arrays) makes of inputs, simplified as mx.compile does it."""
    made, kinds = Graph([], {}, [], []), {}
    records: list[dict[str, Any]] = []
    mx.export_function(records.append, lambda *arrays: function(list(arrays)), *inputs)
    for record in records:
        if record["type"] == "constants":
            kinds |= {name: Kind(tuple(array.shape), array.dtype.size) for name, array in record["constants"]}
            continue
        for key in ("inputs", "outputs"):
            kinds |= {name: Kind(tuple(shape), dtype.size) for name, shape, dtype in record.get(key, ())}
        names = {key: [entry[0] for entry in record[key]] for key in ("inputs", "outputs") if key in record}
        if record["type"] == "primitive":
            made.nodes.append(Node(record["name"], record["arguments"], **names))
        elif record["type"] in ("inputs", "outputs"):
            setattr(made, record["type"], names[record["type"]])
    return dataclasses.replace(made, kinds=kinds)


def peak(recipe: Recipe, rows: int, length: int) -> Any:
    """Of a step on micro-batches of ``rows`` rows of ``length`` tokens."""
    outline = Outline(recipe)
    B, T = rows, length
    ints, floats = mx.zeros((B, T), mx.int32), mx.zeros((B, T))
    keys = mx.zeros((1 + engines.SITES * recipe.model.n_layer,), mx.uint32)
    rest = [ints, ints, floats, keys, mx.zeros((), mx.uint32), mx.zeros((6,))]
    state = outline.state()
    count = len(state)

    def step(arrays: list[mx.array]) -> list[mx.array]:
        outline.take(arrays[:count])
        tokens, targets, weights, keys, first, scalars = arrays[count : count + 6]
        outline.ends = (arrays[-2], arrays[-1])
        batch = losses.Arrays(tokens, targets, weights, None, None)
        terms, norm, squares = outline._step(batch, keys, first, scalars)
        return [*outline.state(), terms, norm, squares]

    kept = mx.custom_function, model.checkpoint
    mx.custom_function, model.checkpoint = Cut, outline.marked
    try:
        made = graph(step, [*state, *rest, *outline.ends])
    finally:
        mx.custom_function, model.checkpoint = kept
    if Cut.last:
        made = mlx_memory.merge(made)
    made = mlx_memory.recompute(made, *made.inputs[-2:])
    return mlx_memory.peak(made, [], outline.compiled)
