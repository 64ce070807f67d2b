"""What a training step holds at most, from the graph of the step itself, which is built and never computed."""

import dataclasses
from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import engine as engines
from mlxgpt import losses, model
from mlxgpt.common import mlx_memory
from mlxgpt.common.config import Recipe
from mlxgpt.common.mlx_memory import Graph, Kind, Node
from mlxgpt.common.plan_memory import Footprint, Piece


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
        whole = mx.depends([*primals, *(array for _, array in named)], [mx.zeros(())])  # all outputs, or none
        joined = whole[len(primals) :]
        self.outputs = tree_unflatten([(name, array) for (name, _), array in zip(named, joined, strict=True)])
        return self.outputs


class Outline(engines.Engine):
    """An engine of the right shapes without values: nothing is evaluated, so nothing is allocated."""

    def __init__(self, recipe: Recipe):
        train = dataclasses.replace(recipe.train, deterministic=False)
        super().__init__(dataclasses.replace(recipe, train=train), {}, "auto")
        self.names = [name for name, _ in tree_flatten(self.model.parameters())]
        self._loss_and_grad = self._staged
        self.marks = [mx.zeros(()), mx.zeros(())]

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

        def run(x: mx.array, mask: Any, rope: Any, *rest: Any) -> mx.array:
            start, end = self.marks
            masks = [mask] if isinstance(mask, mx.array) else []
            x, *others = mx.depends([x, *masks, *(rope or ())], [start])
            if masks:
                mask, *others = others
            y = block(x, mask, tuple(others) if rope else rope, *rest)
            return mx.depends([y], [end])[0]

        return run

    def state(self) -> tuple[list[mx.array], list[mx.array]]:
        """Weights; moments."""
        weights = self._weights()
        return [weights[name] for name in self.names], [*self.m.values(), *self.v.values()]

    def take(self, weights: list[mx.array], moments: list[mx.array]) -> None:
        """Puts what state() lists back."""
        self.model.update(tree_unflatten(list(zip(self.names, weights, strict=True))))
        it = iter(moments)
        self.m, self.v = ({name: next(it) for name in group} for group in (self.m, self.v))


def export(function: Any, *groups: list[mx.array]) -> tuple[Graph, list[list[str]]]:
    """The graph that ``function`` (a list of arrays a group -> list of arrays) makes, and the groups' names in it."""
    made, kinds, records = Graph([], {}, [], []), {}, []

    def flat(*arrays: mx.array) -> list[mx.array]:
        it = iter(arrays)
        return function(*([next(it) for _ in group] for group in groups))

    mx.export_function(records.append, flat, *(array for group in groups for array in group))
    for record in records:
        if record["type"] == "constants":
            kinds |= {name: Kind(tuple(array.shape), array.dtype.size) for name, array in record["constants"]}
            continue
        for key in ("inputs", "outputs"):
            kinds |= {name: Kind(tuple(shape), dtype.size) for name, shape, dtype in record.get(key, ())}
        names = {key: [entry[0] for entry in record[key]] for key in ("inputs", "outputs") if key in record}
        if record["type"] == "primitive":
            made.nodes.append(Node(record["name"], record["arguments"], **names))
        elif record["type"] in names:
            setattr(made, record["type"], names[record["type"]])
    it = iter(made.inputs)
    return dataclasses.replace(made, kinds=kinds), [[next(it) for _ in group] for group in groups]


@dataclasses.dataclass
class Phase:
    """One call of a compiled function: its graph, its arguments' names in it, and which of them the caller keeps."""

    graph: Graph
    names: dict[str, list[str]]
    kept: list[str]


def step(outline: Outline, rows: int, length: int, micro_batches: int) -> list[Phase]:
    """What Engine.train_step calls, in order."""
    weights, moments = outline.state()
    ints, floats, scalars = mx.zeros((rows, length), mx.int32), mx.zeros((rows, length)), [mx.zeros((6,))]
    keys = mx.zeros((1 + engines.SITES * outline.recipe.model.n_layer,), mx.uint32)
    data = [ints, ints, floats, keys, mx.zeros((), mx.uint32)]

    def gradients(w: list, m: list, data: list, marks: list, total: dict | None = None) -> tuple:
        outline.take(w, m)
        outline.marks = marks
        return outline._gradients(losses.Arrays(*data[:3], None, None), data[3], data[4], total)

    def update(terms: mx.array, grads: dict, scalars: list) -> list[mx.array]:
        more = outline._update(terms, grads, scalars[0])
        return [terms, *more, *(array for group in outline.state() for array in group)]

    def whole(w: list, m: list, data: list, marks: list, scalars: list) -> list[mx.array]:
        return update(*gradients(w, m, data, marks), scalars)

    def first(w: list, m: list, data: list, marks: list) -> list[mx.array]:
        terms, grads = gradients(w, m, data, marks)
        return [terms, *(grads[name] for name in outline.table)]

    def add(w: list, m: list, data: list, marks: list, total: list) -> list[mx.array]:
        terms, grads = gradients(w, m, data, marks, dict(zip(outline.table, total, strict=True)))
        return [terms, *(grads[name] for name in outline.table)]

    def apply(w: list, m: list, terms: list, total: list, scalars: list) -> list[mx.array]:
        outline.take(w, m)
        return update(terms[0], dict(zip(outline.table, total, strict=True)), scalars)

    def phase(function: Any, kept: tuple[str, ...], **groups: list[mx.array]) -> Phase:
        graph, names = export(function, *groups.values())
        named = dict(zip(groups, names, strict=True))
        return Phase(graph, named, [name for group in kept for name in named[group]])

    state: dict[str, list[mx.array]] = {"weights": weights, "moments": moments}
    batch = {"data": data, "marks": outline.marks}
    if micro_batches == 1:
        phases = [phase(whole, (), **state, **batch, scalars=scalars)]
    else:
        total = [mx.zeros(param.shape) for param in outline.table.values()]
        phases = [
            phase(first, ("weights", "moments"), **state, **batch),
            phase(add, ("weights", "moments"), **state, **batch, gradients=total),
            phase(apply, ("gradients",), **state, terms=[floats], gradients=total, scalars=scalars),
        ]
    if "scalars" in phases[-1].names:  # mx.eval is given the state first
        phases[-1].graph.outputs = [*phases[-1].graph.outputs[3:], *phases[-1].graph.outputs[:3]]
    return phases


def footprint(recipe: Recipe, rows: int, length: int, micro_batches: int = 1) -> Footprint:
    """Of a step on ``micro_batches`` of ``rows`` rows of ``length`` tokens."""
    outline, best = Outline(recipe), Footprint(0, [])
    kept = mx.custom_function, model.checkpoint
    mx.custom_function, model.checkpoint = Cut, outline.marked  # type: ignore[assignment]
    try:
        phases = step(outline, rows, length, micro_batches)
        cut = Cut.last is not None
    finally:
        mx.custom_function, model.checkpoint = kept
        Cut.last = None
    lie: list[tuple[int, ...]] = []  # gradients as the phase before leaves them
    for phase in phases:
        graph, total = phase.graph, phase.names.get("gradients", [])
        if "marks" in phase.names:
            graph = mlx_memory.recompute(mlx_memory.merge(graph) if cut else graph, *phase.names["marks"])
        if outline.compiled:
            graph = mlx_memory.fuse(graph)
        done = mlx_memory.run(graph, phase.kept, dict(zip(total, lie, strict=False)))
        lie = done.strides[1:]
        if done.peak > best.peak:
            labels = {
                name: label for label in ("weights", "moments", "gradients") for name in phase.names.get(label, ())
            }
            pieces = [Piece(labels.get(b.origin, ""), graph.kinds[b.origin].shape, b.size) for b in done.buffers]
            best = Footprint(done.peak, pieces)
    return best
