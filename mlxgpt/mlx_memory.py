"""What MLX's CPU backend holds while it computes a graph: fused, ordered and freed as MLX does it, without computing.

Written after mlx 0.32: compile.cpp (fusion), transforms.cpp (order of evaluation), scheduler.h and encoder.h (how far
the encoding thread runs ahead of the one that computes, and so how late memory is freed), the primitives (which of them
copy, take over an input's buffer, or only look at it). Nothing here is fitted.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

DEPTH, ARRAYS = 11, 24  # of one fused kernel: nesting, inputs (compile.cpp)
WIDTH = 20  # of the breadth-first order (bfs_max_width)
DISPATCHES, TASKS = 10, 10  # dispatches a task, tasks in flight (encoder.h, transforms.cpp)
SCALAR = "scalar "  # begins the name of a constant, which has its value in it
SLACK = 16384  # bytes by which a buffer taken over may be too large

_FUSABLE = set(
    [
        "Abs",
        "ArcCos",
        "ArcCosh",
        "ArcSin",
        "ArcSinh",
        "ArcTan",
        "ArcTanh",
        "AsType",
        "Ceil",
        "Cos",
        "Conjugate",
        "Cosh",
        "Remainder",
        "Erf",
        "ErfInv",
        "Exp",
        "Floor",
        "Log",
        "Log1p",
        "LogicalNot",
        "Negative",
        "Round",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Square",
        "Sqrt",
        "Tan",
        "Tanh",
        "Expm1",
        "Real",
        "Imag",
        "BitwiseInvert",
        "Add",
        "Divide",
        "Equal",
        "Greater",
        "GreaterEqual",
        "Less",
        "LessEqual",
        "LogicalAnd",
        "LogicalOr",
        "LogAddExp",
        "Maximum",
        "Minimum",
        "Multiply",
        "NotEqual",
        "Power",
        "Subtract",
        "BitwiseBinary",
        "ArcTan2",
        "Select",
        "Broadcast",
    ]
)
_RESHAPE = {"Reshape", "Flatten", "Unflatten", "View"}
_VIEWS = _RESHAPE | set(
    ["Transpose", "Broadcast", "ExpandDims", "Squeeze", "Split", "Slice", "StopGradient", "Depends"]
)
_IN_PLACE = {"Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate", "Copy"}  # begin as a copy of their input


@dataclass
class Node:
    """One primitive: names of its inputs and outputs."""

    name: str
    arguments: list[Any]
    inputs: list[str]
    outputs: list[str]


class Kind(NamedTuple):
    """An array's shape and bytes an element."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass
class Graph:
    """Nodes in order of definition, their arrays, and what goes in and comes out."""

    nodes: list[Node]
    kinds: dict[str, Kind]
    inputs: list[str]
    outputs: list[str]


def merge(graph: Graph) -> Graph:
    """The graph with one of each pair of nodes that compute the same from the same, as mx.compile simplifies it."""
    same: dict[str, str] = {}
    first: dict[str, Node] = {}
    nodes = []
    for node in graph.nodes:
        node = Node(node.name, node.arguments, [same.get(name, name) for name in node.inputs], node.outputs)
        known = (
            node if node.name == "Depends" else first.setdefault(f"{node.name} {node.arguments} {node.inputs}", node)
        )
        if known is not node and not set(node.outputs) & set(graph.outputs):
            same |= dict(zip(node.outputs, known.outputs, strict=True))
        else:
            nodes.append(node)
    return Graph(nodes, graph.kinds, graph.inputs, graph.outputs)


def prune(graph: Graph) -> Graph:
    """The graph without what no output needs."""
    needed, wanted = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if needed & set(node.outputs):
            needed |= set(node.inputs)
            wanted.append(node)
    return Graph(wanted[::-1], graph.kinds, graph.inputs, graph.outputs)


@dataclass
class Call:
    """A custom function in a graph, where linear maps stand for it: y = sum of M_j p_j, differentiated as M_j^T dy.

    ``start`` names the mark Depends(p ..., start) of what goes in, ``end`` Depends(y, end) of the first output.
    ``forward`` takes all that goes in; ``backward`` that, dy and the outputs, and gives the gradients of ``linear``.
    """

    start: str
    end: str
    linear: list[int]  # which of what goes in has a map
    forward: Graph
    backward: Graph


def substitute(graph: Graph, calls: list[Call]) -> Graph:
    """The graph with the functions themselves in the place of their maps; one node holds all outputs of a function."""
    nodes, kinds = list(graph.nodes), dict(graph.kinds)
    for number, call in enumerate(calls):
        maker = {name: node for node in nodes for name in node.outputs}
        start = next((node for node in nodes if node.name == "Depends" and node.inputs[-1] == call.start), None)
        end = next((node for node in nodes if node.name == "Depends" and node.inputs[-1] == call.end), None)
        if start is None or end is None:
            continue
        primals = start.inputs[:-1]
        inner, made = _inlined(call.forward, primals, f"f{number}.", kinds)
        held = [f"h{number}.{n}" for n in range(len(primals) + len(made))]
        held[len(primals)] = end.outputs[0]
        kinds |= {name: kinds[source] for name, source in zip(held, [*primals, *made], strict=True)}
        ahead = [*inner, Node("Depends", [], [*primals, *made], held)]

        matrices: dict[str, int] = {}  # transposed M_j -> j
        for node in nodes:
            if node.name == "Matmul" and (source := _through(maker, node.inputs[0])) in start.outputs:
                matrices[node.inputs[1]] = start.outputs.index(source)
        turned = {node.outputs[0]: matrices[node.inputs[0]] for node in nodes
                  if node.name == "Transpose" and node.inputs[0] in matrices}  # fmt: skip
        back = [node for node in nodes if node.name == "Matmul" and node.inputs[1] in turned]
        behind: list[Node] = []
        again: dict[str, str] = {}
        if back:
            cotangent = _through(maker, back[0].inputs[0])
            behind, grads = _inlined(call.backward, [*primals, cotangent, *held[len(primals) :]], f"b{number}.", kinds)
            again = {node.outputs[0]: grads[call.linear.index(turned[node.inputs[1]])] for node in back}
        gone, result = {id(node) for node in back}, []
        for node in nodes:
            if node is end:
                result += ahead
            elif id(node) in gone:
                result += behind
                behind = []
            else:
                names = [again.get(name, name) for name in node.inputs]
                result.append(Node(node.name, node.arguments, names, node.outputs))
        nodes = result
    return prune(_without_idle_reshapes(Graph(nodes, kinds, graph.inputs, graph.outputs)))


def _without_idle_reshapes(graph: Graph) -> Graph:
    """What a map needed and the function in its place does not: reshapes to the shape that an array has already."""
    same: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        inputs = [same.get(name, name) for name in node.inputs]
        if node.name == "Reshape" and graph.kinds[inputs[0]].shape == graph.kinds[node.outputs[0]].shape:
            same[node.outputs[0]] = inputs[0]
        else:
            nodes.append(Node(node.name, node.arguments, inputs, node.outputs))
    return Graph(nodes, graph.kinds, graph.inputs, [same.get(name, name) for name in graph.outputs])


def _through(maker: dict[str, Node], name: str) -> str:
    """What a map multiplies, before it was flattened and cast."""
    for allowed in ("AsType", "Reshape", "AsType"):
        node = maker.get(name)
        if node is not None and node.name == allowed:
            name = node.inputs[0]
    return name


def _inlined(graph: Graph, inputs: list[str], prefix: str, kinds: dict[str, Kind]) -> tuple[list[Node], list[str]]:
    """A graph's nodes for other inputs, under names of their own, and the names of its outputs."""
    names = dict(zip(graph.inputs, inputs, strict=True))
    names = {name: names.get(name, name if name.startswith(SCALAR) else prefix + name) for name in graph.kinds}
    for name, kind in graph.kinds.items():
        kinds.setdefault(names[name], kind)
    nodes = [_renamed(node, names) for node in graph.nodes]
    return nodes, [names[name] for name in graph.outputs]


def recompute(graph: Graph, start: str, end: str) -> Graph:
    """The graph with what lies between two marks computed again for the backward pass, as mx.checkpoint does.

    A mark is ``Depends(x, ..., start)`` before a block, of what it reads but weights, and ``Depends(y, end)`` after.
    """
    nodes, kinds = list(graph.nodes), dict(graph.kinds)
    maker = {name: node for node in nodes for name in node.outputs}
    for last in [node for node in graph.nodes if node.name == "Depends" and node.inputs[-1] == end]:
        mark, inside = _between(last, start, maker)
        again = {name: f"{name}*" for node in [mark, *inside] for name in node.outputs}
        kinds |= {copy: kinds[name] for name, copy in again.items()}
        clones = [Node("Depends", [], [*mark.outputs, last.outputs[0]], [again[name] for name in mark.outputs])]
        clones += [_renamed(node, again) for node in inside]
        members, made, place = {id(node) for node in [*inside, last]}, [], len(nodes)
        for node in nodes:
            if id(node) not in members and again.keys() & set(node.inputs):
                place = min(place, len(made))
                names = [again.get(name, name) for name in node.inputs]
                node = Node(node.name, node.arguments, names, node.outputs)
                maker |= dict.fromkeys(node.outputs, node)
            made.append(node)
        nodes = made[:place] + clones + made[place:]
    return prune(Graph(nodes, kinds, graph.inputs, graph.outputs))


def _between(last: Node, start: str, maker: dict[str, Node]) -> tuple[Node, list[Node]]:
    """The mark before a block, and the nodes from there to ``last`` in order."""
    inside: list[Node] = []
    known: dict[int, bool] = {}
    marks: list[Node] = []

    def visit(node: Node | None) -> bool:
        """Whether it depends on the mark."""
        if node is None:
            return False
        if node.name == "Depends" and node.inputs[-1] == start:
            marks.append(node)
            return True
        if id(node) not in known:
            known[id(node)] = any([visit(maker.get(name)) for name in node.inputs])
            if known[id(node)]:
                inside.append(node)
        return known[id(node)]

    visit(maker.get(last.inputs[0]))
    return marks[0], inside


def _renamed(node: Node, names: dict[str, str]) -> Node:
    return Node(node.name, node.arguments, [names.get(name, name) for name in node.inputs],
                [names[name] for name in node.outputs])  # fmt: skip


def fuse(graph: Graph) -> Graph:
    """The graph with chains of elementwise primitives made into one ``Compiled`` each, as mx.compile does."""
    kinds, outputs = dict(graph.kinds), set(graph.outputs)
    maker = {name: node for node in graph.nodes for name in node.outputs}
    users: dict[str, list[str]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node.outputs[0])
    made: list[Node] = []
    inside: set[str] = set()

    for last in reversed(graph.nodes):
        root = last.outputs[0]
        if root in inside:
            continue
        group: set[str] = set()
        border: set[str] = set()

        def collect(name: str, depth: int, shape: tuple[int, ...], group: set[str] = group, border: set[str] = border):
            if name in group:
                return
            node = maker.get(name)
            foreign = name in outputs and kinds[name].shape != shape
            if depth >= DEPTH or node is None or node.name not in _FUSABLE or foreign:
                border.add(name)
                return
            if depth and not all(user in group for user in users[name]):
                if node.name == "Broadcast" and len(border) < ARRAYS:
                    collect(split(name, node, group), depth, shape)
                else:
                    border.add(name)
                return
            (border.add if name in outputs else border.discard)(name)
            if len(border) >= ARRAYS:
                return
            group.add(name)
            for each in node.inputs:
                collect(each, depth + 1, shape)

        def split(name: str, node: Node, group: set[str]) -> str:
            """A second broadcast for the users that are in the group."""
            other = f"{name}'{len(kinds)}"
            kinds[other] = kinds[name]
            maker[other] = Node(node.name, node.arguments, node.inputs, [other])
            users[other] = [user for user in users[name] if user in group]
            users[name] = [user for user in users[name] if user not in group]
            for user in users[other]:
                old = maker[user]
                maker[user] = Node(
                    old.name, old.arguments, [other if each == name else each for each in old.inputs], old.outputs
                )
            return other

        if last.name != "Broadcast":
            collect(root, 0, kinds[root].shape)
        if len(group) <= 1:
            made.append(maker[root])
            continue
        order: list[str] = []
        inputs: dict[str, None] = {}

        def walk(name: str, order: list[str] = order, inputs: dict[str, None] = inputs, group: set[str] = group):
            if name not in group:
                inputs[name] = None
            elif name not in order:
                for each in maker[name].inputs:
                    walk(each)
                order.append(name)

        walk(root)
        inside.update(order[:-1])
        kept = [name for name in order[:-1] if name in outputs] + [root]
        compiled = Node("Compiled", [], list(inputs), kept)
        for name in order[:-1]:
            if name in outputs:
                users[name] = [user for user in users.get(name, []) if user not in group]
        for name in inputs:
            users[name] = [user for user in users.get(name, []) if user not in group] + kept
        for name in kept:
            maker[name] = compiled
        made.append(compiled)
    return Graph(made[::-1], kinds, graph.inputs, graph.outputs)


def order(graph: Graph) -> list[Node]:
    """The nodes in the order in which mx.eval(outputs) computes them: breadth first from the end, within a width."""
    maker = {name: node for node in graph.nodes for name in node.outputs}
    degree: Counter[int] = Counter()
    end = Node("Synchronizer", [], list(graph.outputs), [])
    stack, seen = [end], set()
    while stack:
        for name in stack.pop().inputs:
            if (node := maker.get(name)) is not None:
                degree[id(node)] += 1
                if id(node) not in seen:
                    seen.add(id(node))
                    stack.append(node)
    tape, place = [end], 0
    waiting: list[tuple[Node, int]] = []
    while place < len(tape) or waiting:
        if place < len(tape):
            node, start, place = tape[place], 0, place + 1
        else:
            node, start = waiting.pop()
        for number in range(start, len(node.inputs)):
            source = maker.get(node.inputs[number])
            if source is None:
                continue
            if len(tape) - place >= WIDTH:
                waiting.append((node, number))
                break
            degree[id(source)] -= 1
            if not degree[id(source)]:
                tape.append(source)
    return tape[:0:-1]


@dataclass
class Buffer:
    """Memory that arrays share; ``pending`` counts the dispatched work that still holds it."""

    size: int
    origin: str
    arrays: int = 0
    pending: int = 0
    freed: bool = False


@dataclass
class Array:
    """How an array lies in its buffer. ``data`` counts the elements that are there, fewer than it has if broadcast."""

    buffer: Buffer
    strides: tuple[int, ...]
    data: int
    contiguous: bool  # no gaps, in some order of the axes
    users: int = 0


def _row(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _is_row(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(size == 1 or a == b for size, a, b in zip(shape, strides, _row(shape), strict=True))


@dataclass
class Heap:
    """Live bytes as evaluation goes on."""

    kinds: dict[str, Kind]
    arrays: dict[str, Array] = field(default_factory=dict)
    live: int = 0
    peak: int = 0
    log: list[tuple[Buffer, bool]] = field(default_factory=list)  # what was allocated (True) and freed, in order
    length: int = 0  # of the log at the peak
    dispatched: int = 0
    queue: deque[tuple[int, list[Buffer]]] = field(default_factory=deque)

    def allocate(self, size: int, origin: str) -> Buffer:
        """A new buffer."""
        buffer = Buffer(size, origin)
        self.log.append((buffer, True))
        self.live += size
        if self.live > self.peak:
            self.peak, self.length = self.live, len(self.log)
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Gives it back if nothing holds it."""
        if not buffer.arrays and not buffer.pending and not buffer.freed:
            buffer.freed = True
            self.log.append((buffer, False))
            self.live -= buffer.size

    def at_peak(self) -> list[Buffer]:
        """What lived when the most did."""
        held: dict[int, Buffer] = {}
        for buffer, made in self.log[: self.length]:
            if made:
                held[id(buffer)] = buffer
            else:
                del held[id(buffer)]
        return list(held.values())

    def place(self, name: str, buffer: Buffer, strides: tuple[int, ...], data: int, contiguous: bool) -> None:
        """Puts an array into a buffer."""
        buffer.arrays += 1
        self.arrays[name] = Array(buffer, strides, data, contiguous)

    def new(self, name: str) -> None:
        """An array in rows in a buffer of its own."""
        kind = self.kinds[name]
        self.place(name, self.allocate(kind.size * kind.itemsize, name), _row(kind.shape), kind.size, True)

    def hold(self, held: list[Buffer], dispatches: int) -> None:
        """Work that has been dispatched and holds buffers until it is computed, which is up to 100 dispatches later."""
        for buffer in held:
            buffer.pending += 1
        self.dispatched += dispatches
        self.queue.append((self.dispatched, held))
        self.catch_up(DISPATCHES * (self.dispatched // DISPATCHES - TASKS))

    def catch_up(self, done: int) -> None:
        """Frees what work up to a dispatch held."""
        while self.queue and self.queue[0][0] <= done:
            for buffer in self.queue.popleft()[1]:
                buffer.pending -= 1
                self.free(buffer)

    def row(self, name: str) -> bool:
        """Whether an array lies in rows."""
        array, kind = self.arrays[name], self.kinds[name]
        return array.data == kind.size and _is_row(kind.shape, array.strides)

    def takes(self, name: str, out: str) -> bool:
        """Whether ``out`` may take over the buffer of ``name``, which nobody needs after this node."""
        array, a, b = self.arrays[name], self.kinds[name], self.kinds[out]
        alone = array.users == 1 and array.buffer.arrays == 1 and not array.buffer.pending
        return alone and a.itemsize == b.itemsize and array.buffer.size <= b.size * b.itemsize + SLACK

    def share(self, name: str, out: str) -> None:
        """``out`` in the buffer and the layout of ``name``."""
        array = self.arrays[name]
        self.place(out, array.buffer, self.wide(array, out), array.data, array.contiguous)

    def wide(self, array: Array, out: str) -> tuple[int, ...]:
        """An array's strides with those of the axes of size 1 that ``out`` has before it."""
        return (0,) * (len(self.kinds[out].shape) - len(array.strides)) + array.strides

    def like(self, name: str, out: str) -> None:
        """``out`` in a new buffer, laid out like ``name``."""
        array = self.arrays[name]
        buffer = self.allocate(array.data * self.kinds[out].itemsize, out)
        self.place(out, buffer, self.wide(array, out), array.data, array.contiguous)


class Outcome(NamedTuple):
    """Most bytes live at a time, the buffers that they are, and how the outputs lie."""

    peak: int
    buffers: list[Buffer]
    strides: list[tuple[int, ...]]


def run(graph: Graph, kept: list[str], strides: dict[str, tuple[int, ...]]) -> Outcome:
    """Evaluates the graph without values.

    ``kept`` are inputs that somebody holds while it is computed; the others go when they have been used. ``strides``
    are those of inputs that do not lie in rows.
    """
    heap, nodes = Heap(graph.kinds), order(graph)
    users = Counter(name for node in nodes for name in node.inputs)
    made = {name for node in nodes for name in node.outputs}
    stay = {*kept, *graph.outputs}
    for name in dict.fromkeys([*graph.inputs, *(name for name in users if name not in made)]):
        heap.new(name)
        heap.arrays[name].users = users[name] + (name in stay or not users[name])
        heap.arrays[name].strides = strides.get(name, heap.arrays[name].strides)
    for node in nodes:
        temporaries = _evaluate(node, heap)
        counts = Counter(node.inputs)
        own = {id(heap.arrays[name].buffer) for name in node.outputs}
        holds = {id(each): each for each in (*(heap.arrays[name].buffer for name in counts), *temporaries)}
        for name in node.outputs:
            heap.arrays[name].users = users[name] + (name in stay)
        heap.hold([each for key, each in holds.items() if key not in own], _dispatches(node, heap, len(temporaries)))
        for name, count in (*counts.items(), *((name, 0) for name in node.outputs)):
            array = heap.arrays[name]
            array.users -= count
            if not array.users:
                array.buffer.arrays -= 1
                heap.free(array.buffer)
    return Outcome(heap.peak, heap.at_peak(), [heap.arrays[name].strides for name in graph.outputs])


def _dispatches(node: Node, heap: Heap, copies: int) -> int:
    """Tasks that a node puts into the queue: what it computes, copies of its inputs, and the one that holds them."""
    if node.name == "Concatenate":
        return 1 + len(node.inputs)
    first, out = node.inputs[:1], heap.arrays[node.outputs[0]].buffer
    if node.name in _VIEWS and any(heap.arrays[name].buffer is out for name in first):
        return 1
    if node.name in _IN_PLACE and heap.arrays[node.inputs[0]].buffer is not out:
        copies += 1
    return 2 + copies + (node.name == "AddMM")


def _evaluate(node: Node, heap: Heap) -> list[Buffer]:
    """Places a node's outputs; returns temporary buffers."""
    kinds, arrays, out = heap.kinds, heap.arrays, node.outputs[0]
    shape, first = kinds[out].shape, node.inputs[0] if node.inputs else ""
    if node.name == "Transpose":
        source = arrays[first]
        strides = tuple(source.strides[axis] for axis in node.arguments[0])
        heap.place(out, source.buffer, strides, source.data, source.contiguous)
    elif node.name in ("Broadcast", "ExpandDims", "Squeeze"):
        source = arrays[first]
        heap.place(out, source.buffer, _stretched(node, kinds[first].shape, source, shape), source.data,
                   source.contiguous)  # fmt: skip
    elif node.name in ("Split", "Slice"):
        source = arrays[first]
        for each in node.outputs:
            whole = kinds[each].size == kinds[first].size
            steps = node.arguments[2] if node.name == "Slice" else (1,) * len(source.strides)
            strides = tuple(stride * step for stride, step in zip(source.strides, steps, strict=True))
            row = _is_row(kinds[each].shape, strides)
            heap.place(each, source.buffer, strides, kinds[each].size, (whole and source.contiguous) or row)
    elif node.name in _RESHAPE:
        source = arrays[first]
        strides = _reshaped(kinds[first].shape, source.strides, shape)
        if node.name == "View":
            strides = source.strides
        if strides is None:
            heap.new(out)
        else:
            heap.place(out, source.buffer, strides, source.data, source.contiguous)
    elif node.name in ("StopGradient", "Depends"):
        for name, each in zip(node.inputs, node.outputs, strict=False):
            heap.share(name, each)
    elif node.name in ("Matmul", "AddMM", "QuantizedMatmul"):
        temporaries = [heap.allocate(kinds[each].size * kinds[each].itemsize, each)
                       for each in node.inputs[:2] if not _multiplies(kinds[each].shape, arrays[each])]  # fmt: skip
        heap.new(out)
        return temporaries
    elif node.name == "Softmax":
        good = arrays[first].strides[-1:] == (1,) and arrays[first].contiguous
        (heap.share if heap.takes(first, out) else heap.like)(first, out) if good else heap.new(out)
    elif node.name == "AsType" or node.name in _IN_PLACE:
        if not arrays[first].contiguous or (arrays[first].data != kinds[first].size and node.name != "AsType"):
            heap.new(out)
        else:
            (heap.share if heap.takes(first, out) else heap.like)(first, out)
    elif node.name == "Compiled":
        _compiled(node, heap)
    elif node.name in _FUSABLE:
        _elementwise(node, heap)
    else:
        for each in node.outputs:
            heap.new(each)
    return []


def _stretched(node: Node, shape: tuple[int, ...], source: Array, target: tuple[int, ...]) -> tuple[int, ...]:
    if node.name == "Squeeze":
        gone = {axis % len(shape) for axis in node.arguments[0]}
        return tuple(stride for axis, stride in enumerate(source.strides) if axis not in gone)
    if node.name == "ExpandDims":
        new = {axis % len(target) for axis in node.arguments[0]}
        old = iter(source.strides)
        return tuple(1 if axis in new else next(old) for axis in range(len(target)))
    pad = len(target) - len(shape)
    return (0,) * pad + tuple(
        0 if a == 1 and b != 1 else stride for a, b, stride in zip(shape, target[pad:], source.strides, strict=True)
    )


def _reshaped(shape: tuple[int, ...], strides: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of a reshape that needs no copy, or None."""
    dims: list[list[int]] = []  # runs of axes that lie one in the other: [size, stride]
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = [dims[-1][0] * size, stride]
        else:
            dims.append([size, stride])
    result: list[int] = []
    runs: Iterator[list[int]] = iter(dims)
    left, step = 1, 1
    for size in target:
        if left == 1 and size > 1:
            left, stride = next(runs)
            step = left * stride
        if size > 1:
            if left % size:
                return None
            step //= size
            left //= size
        result.append(step)
    return tuple(result)


def _multiplies(shape: tuple[int, ...], array: Array) -> bool:
    """Whether BLAS takes a matrix as it lies: rows or columns without gaps."""
    if len(shape) < 2:
        return True
    (rows, columns), (a, b) = shape[-2:], array.strides[-2:]
    return (b == 1 and (a == columns or rows == 1)) or (a == 1 and (b == rows or columns == 1))


def _compiled(node: Node, heap: Heap) -> None:
    kinds, arrays, outs = heap.kinds, heap.arrays, list(node.outputs)
    size = kinds[outs[0]].size
    full = [name for name in node.inputs if kinds[name].size > 1]
    dense = bool(full) and all(kinds[name].size == size and arrays[name].contiguous for name in full) and (
        all(heap.row(name) for name in full) or len({arrays[name].strides for name in full}) == 1)  # fmt: skip
    like = next((name for name in full if kinds[name].size == size), None)
    for name in full:
        if not outs:
            break
        if (dense or (heap.row(name) and kinds[name].size == size)) and heap.takes(name, outs[0]):
            heap.share(name, outs.pop(0))
    for each in outs:
        heap.like(like, each) if dense and like else heap.new(each)


def _elementwise(node: Node, heap: Heap) -> None:
    kinds, arrays, out = heap.kinds, heap.arrays, node.outputs[0]
    size = kinds[out].size
    full = [name for name in node.inputs if arrays[name].data > 1]
    if not full:
        heap.like(node.inputs[0], out)
        return
    dense = all(kinds[name].size == size and arrays[name].contiguous for name in full) and (
        all(heap.row(name) for name in full) or len({arrays[name].strides for name in full}) == 1)  # fmt: skip
    for name in full:
        if (dense or (heap.row(name) and kinds[name].size == size)) and heap.takes(name, out):
            heap.share(name, out)
            return
    heap.like(full[0], out) if dense else heap.new(out)
