"""What a training step holds at most, from the graph of the step itself, which is built and never computed."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any, ClassVar, cast

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import engine as engines
from mlxgpt import losses, mlx_memory, model, quant
from mlxgpt.common.config import Recipe
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.plan.memory import Footprint, Piece
from mlxgpt.mlx_memory import Graph, Kind, Node


class Stand:
    """Stands for mx.custom_function, whose graph MLX cannot export: linear maps, to be found and replaced."""

    calls: ClassVar[list[tuple["Stand", list[mx.array], Any]]] = []

    def __init__(self, function: Any):
        self.function = function

    def vjp(self, function: Any) -> Any:
        """Takes the function that mx.custom_function calls for gradients."""
        self.backward = function
        return function

    def __call__(self, *primals: mx.array) -> Any:
        made = self.function(*primals)
        outputs = _flat(made)
        number = len(Stand.calls)
        Stand.calls.append((self, list(primals), made))
        marked = mx.depends(list(primals), [_tag(number, 0)])
        like, parts = outputs[0][1], []
        for place, (primal, mark) in enumerate(zip(primals, marked, strict=True)):
            if mx.issubdtype(primal.dtype, mx.floating):
                matrix = mx.broadcast_to(_tag(number, 2 + place).astype(primal.dtype), (primal.size, like.size))
                parts.append((mark.reshape(1, primal.size) @ matrix).astype(like.dtype))
        first = mx.depends([sum(parts[1:], parts[0]).reshape(like.shape)], [_tag(number, 1)])[0]
        others = [(name, mx.zeros(each.shape, each.dtype)) for name, each in outputs[1:]]
        whole = tree_unflatten([(outputs[0][0], first), *others])
        return tuple(whole) if isinstance(made, tuple) else first

    def call(self, number: int, primals: list[mx.array], made: Any, names: dict[float, str]) -> mlx_memory.Call:
        """What is put in the place of call ``number``; ``names`` are those of the constants."""
        outputs = _flat(made)
        linear = [place for place, each in enumerate(primals) if mx.issubdtype(each.dtype, mx.floating)]
        into, out = _like(primals), _like([each for _, each in outputs])

        def forward(values: list[mx.array]) -> list[mx.array]:
            return [each for _, each in _flat(self.function(*values))]

        def backward(values: list[mx.array], cotangent: list[mx.array], results: list[mx.array]) -> list[mx.array]:
            def shaped(arrays: list[mx.array]) -> Any:
                if not isinstance(made, tuple):
                    return arrays[0]
                return tuple(tree_unflatten([(name, a) for (name, _), a in zip(outputs, arrays, strict=True)]))

            given = tuple(values) if len(values) > 1 else values[0]
            grads = self.backward(given, shaped([*cotangent, *results[1:]]), shaped(results))  # the others are zero
            grads = list(grads) if isinstance(grads, tuple | list) else [grads]
            return [grads[place] for place in linear]

        there, _, _ = export(forward, into)
        back, _, _ = export(backward, into, _like([outputs[0][1]]), out)
        start, end = (names[_value(number, kind)] for kind in (0, 1))
        return mlx_memory.Call(start, end, linear, there, back)


def _flat(made: Any) -> list[tuple[str, mx.array]]:
    """A function's outputs by name; one array counts as a tuple of it."""
    return cast(list[tuple[str, mx.array]], tree_flatten(made if isinstance(made, tuple) else (made,)))


def _value(number: int, kind: int) -> float:
    """A constant that nothing else has: float32 holds it exactly."""
    return -(2.0**22) - 16 * number - kind


def _tag(number: int, kind: int) -> mx.array:
    return mx.array(_value(number, kind), mx.float32)


def _like(arrays: list[mx.array]) -> list[mx.array]:
    return [mx.zeros(each.shape, each.dtype) for each in arrays]


def outlined(recipe: Recipe) -> dict[str, Any]:
    """The base's tensors without values: quantized where the engine would have them so."""
    adapter, trains = recipe.adapter, engines.adapter_params.trainable(recipe)
    stay = adapter and adapter.bits and (adapter.dequantize == "never" or mx.default_device() == mx.Device(mx.gpu))
    made: dict[str, Any] = {}
    for name, param in engines.parameters.table(recipe.model).items():
        made[name] = mx.zeros(param.shape)
        if adapter and stay and param.adaptable and name not in trains and not param.shape[1] % adapter.group_size:
            n_out, n_in = param.shape
            words: Any = mx.zeros((n_out, n_in * adapter.bits // 32), mx.uint32)
            scales: Any = mx.zeros((n_out, n_in // adapter.group_size))
            made[name] = Quantized(words, scales, scales, adapter.bits, adapter.group_size)
    return made


class Outline(engines.Engine):
    """An engine of the right shapes without values: nothing is evaluated, so nothing is allocated."""

    def __init__(self, recipe: Recipe):
        train = dataclasses.replace(recipe.train, deterministic=False)
        recipe = dataclasses.replace(recipe, train=train)
        kept = engines.quantize_base.prepare
        engines.quantize_base.prepare = lambda *_: (outlined(recipe), "")
        try:
            tensors: Any = {name: mx.zeros(shape) for name, shape in engines.adapter_params.shapes(recipe).items()}
            super().__init__(recipe, tensors, "auto")
        finally:
            engines.quantize_base.prepare = kept
        self.names = [name for name, _ in tree_flatten(self.model.parameters())]
        self.marks = [mx.zeros(()), mx.zeros(())]

    def _put(self, params: dict) -> None:
        """Keeps the zeros that the model was made of."""

    def _settle(self, *more: mx.array) -> None:
        """Leaves everything pending."""

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
        weights = dict(tree_flatten(self.model.parameters()))
        return [weights[name] for name in self.names], [*self.m.values(), *self.v.values()]

    def take(self, weights: list[mx.array], moments: list[mx.array]) -> None:
        """Puts what state() lists back."""
        self.model.update(tree_unflatten(list(zip(self.names, weights, strict=True))))
        it = iter(moments)
        self.m, self.v = ({name: next(it) for name in group} for group in (self.m, self.v))


def export(function: Any, *groups: list[mx.array]) -> tuple[Graph, list[list[str]], dict[float, str]]:
    """The graph that ``function`` (a list of arrays a group -> such a list) makes; names of groups, and of scalars."""
    made, kinds, records, scalars = Graph([], {}, [], []), {}, [], {}

    def flat(*arrays: mx.array) -> list[mx.array]:
        it = iter(arrays)
        return function(*([next(it) for _ in group] for group in groups))

    mx.export_function(records.append, flat, *(array for group in groups for array in group))
    alias: dict[str, str] = {}  # scalars that are equal are one, here and in any other graph
    for record in records:
        if record["type"] == "constants":
            for name, array in record["constants"]:
                if not array.ndim:
                    alias[name] = f"{mlx_memory.SCALAR}{array.dtype} {array.item()}"
                    scalars |= {float(array.item()): alias[name]} if array.dtype == mx.float32 else {}
                kinds[alias.get(name, name)] = Kind(tuple(array.shape), array.dtype.size)
            continue
        for key in ("inputs", "outputs"):
            kinds |= {name: Kind(tuple(shape), dtype.size) for name, shape, dtype in record.get(key, ())}
        names: dict[str, Any] = {key: [alias.get(entry[0], entry[0]) for entry in record[key]]
                 for key in ("inputs", "outputs") if key in record}  # fmt: skip
        if record["type"] == "primitive":
            made.nodes.append(Node(record["name"], record["arguments"], **names))
        elif record["type"] in names:
            setattr(made, record["type"], names[record["type"]])
    it = iter(made.inputs)
    return dataclasses.replace(made, kinds=kinds), [[next(it) for _ in group] for group in groups], scalars


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
    keys = outline._keys(1)
    data = [ints, ints, floats, keys, mx.zeros((), mx.uint32)]

    def gradients(w: list, m: list, data: list, marks: list, total: dict | None = None) -> tuple:
        outline.take(w, m)
        outline.marks = marks
        tokens, targets, weights, keys, first = data
        return outline._gradients(losses.Arrays(tokens, targets, weights, None, None), keys, first, total)

    def update(terms: mx.array, grads: dict, scalars: list) -> list[mx.array]:
        more = outline._update(terms, grads, scalars[0])
        return [terms, *more, *(array for group in outline.state() for array in group)]

    def whole(w: list, m: list, data: list, marks: list, scalars: list) -> list[mx.array]:
        terms, grads = gradients(w, m, data, marks)
        return update(terms, grads, scalars)

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
        Stand.calls.clear()
        graph, names, scalars = export(function, *groups.values())
        calls = list(Stand.calls)
        if calls:
            made = [each.call(number, primals, out, scalars) for number, (each, primals, out) in enumerate(calls)]
            graph = mlx_memory.merge(mlx_memory.substitute(graph, made))
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


@contextlib.contextmanager
def standing(outline: Outline) -> Iterator[None]:
    """Puts stand-ins where the model has custom functions and checkpoints, and takes them away again."""
    spec = importlib.util.find_spec("mlxgpt.fast")
    assert spec and spec.loader
    copy = importlib.util.module_from_spec(spec)  # fast.py once more, decorated by the stand-in
    patches = [(mx, "custom_function", Stand), (model, "checkpoint", outline.marked), (model, "fast", copy),
               (quant, "product", quant.product.__wrapped__)]  # fmt: skip
    kept = [(place, name, getattr(place, name)) for place, name, _ in patches]
    try:
        for place, name, value in patches:
            setattr(place, name, value)
        spec.loader.exec_module(copy)
        yield
    finally:
        for place, name, value in kept:
            setattr(place, name, value)
        Stand.calls.clear()


def footprint(recipe: Recipe, rows: int, length: int, micro_batches: int = 1) -> Footprint:
    """Of a step on ``micro_batches`` of ``rows`` rows of ``length`` tokens."""
    outline, best = Outline(recipe), Footprint(0, [])
    with standing(outline):
        phases = step(outline, rows, length, micro_batches)
    lie: list[tuple[int, ...]] = []  # gradients as the phase before leaves them
    for phase in phases:
        graph, total = phase.graph, phase.names.get("gradients", [])
        if "marks" in phase.names:
            graph = mlx_memory.recompute(graph, *phase.names["marks"])
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
