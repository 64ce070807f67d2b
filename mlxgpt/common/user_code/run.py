"""A user's model, from its file to its numbers: imported, built, loaded and called, in a process of its own.

``python -m torch_ref.sample REQUEST.json`` and ``python -m mlxgpt.sample REQUEST.json``; convert/adopt/module.py starts
them. A request is a JSON object with the fields of ``Request``. Beside ``out``, an .npz, there is ``out``.json with
``stage``, what was last begun, and in the end ``said``, notes, or ``error``.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders.tensors import read_tensors
from mlxgpt.common.inference import probe
from mlxgpt.common.model import module_names
from mlxgpt.common.user_code import build, call, imports
from mlxgpt.common.user_code.call import Caller
from mlxgpt.common.user_code.imports import TheirError

ROWS, TOKENS = 2, 64

Arrays = Iterator[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Request:
    """What to run, and on what. ``weights``: safetensors by their names, one a scale; ``ids``: an .npy (T + 1,)."""

    path: str
    name: str
    out: str
    weights: Mapping[str, str]  # x1 and, to judge, x8
    vocab_size: int
    n_layer: int = 0
    block_size: int = 0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    left: Collection[str] = ()  # tensors of the checkpoint that are no weights
    seed: int = 0
    ids: str = ""  # to judge: else random ones, for a sample
    prompt: int = 1
    greedy: int = 0
    gradients: bool = False


class Library(call.Library, Protocol):
    """Further, what is done with a model before it is called."""

    def is_model(self, thing: Any) -> bool:
        """Whether it is a model, or a class of one."""
        ...

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Everything that a model holds, by name."""
        ...

    def buffers(self, model: Any) -> set[str]:
        """The names of it that are no parameters."""
        ...

    def groups(self, model: Any) -> dict[str, int]:
        """Name -> a number that is the same for names of one and the same array."""
        ...

    def put(self, model: Any, values: Mapping[str, np.ndarray]) -> None:
        """Sets these, in float32 on the CPU, and puts the model in evaluation mode."""
        ...

    def gradients(self, model: Any, call: Callable[[], Any], targets: np.ndarray) -> Arrays:
        """Of the mean next-token loss, by their names; ``call`` gives logits (1, T, V)."""
        ...


class Answer:
    """The file beside ``out`` that says how far it came."""

    def __init__(self, out: Path):
        self._place = out.with_name(f"{out.name}.json")

    def begin(self, stage: str) -> None:
        """Notes what is begun."""
        self._write({"stage": stage})

    def finish(self, **said: Any) -> None:
        """Notes the end."""
        self._write(said)

    def _write(self, values: dict[str, Any]) -> None:
        self._place.write_text(json.dumps(values))


def main(library: Library, argv: list[str]) -> int:
    """Runs the request in the file ``argv[0]``."""
    values: dict[str, Any] = read_json(Path(argv[0]))
    request = Request(**values)
    answer = Answer(Path(request.out))
    try:
        said = list(run(library, request, answer))
    except (UserError, TheirError) as error:
        answer.finish(error=str(error), theirs=isinstance(error, TheirError))
        return 2
    answer.finish(said=said)
    return 0


def run(library: Library, request: Request, answer: Answer) -> list[str]:
    """Writes ``out`` and returns notes.

    Raises:
        UserError: the class does not fit, with the cure.
        TheirError: what the user's code raised.
    """
    path = Path(request.path)
    answer.begin("import")
    module, said = imports.load(path, request.name)
    answer.begin("build")
    found = imports.find(module, request.name, library.is_model)
    if not isinstance(found, type) and library.is_model(found):
        model = found
    else:
        model, more = build.build(found, request.name, module, path, request.kwargs, request.extras)
        said += more
    if isinstance(model, tuple):  # a function that returns what belongs to a model, too
        model = next((each for each in model if library.is_model(each)), model)
    if isinstance(model, type) or not library.is_model(model):
        raise UserError(f"{path}: {request.name} gives {type(model).__name__}, expected a model")
    answer.begin("load")
    weights = {scale: read_tensors(Path(place)) for scale, place in request.weights.items()}
    loader = Loader(library, model, request, weights["x1"])
    said += loader.said
    loader.put(weights["x1"])
    answer.begin("call")
    caller = Caller(
        library, model, path, request.name, request.vocab_size, request.n_layer, request.block_size
    )  # fmt: skip
    with library.quiet():
        ids = caller.settle(lambda length: draw(request.seed, length, request.vocab_size))
    said += caller.way.spelled()
    made = judged(library, request, caller, loader, weights) if request.ids else sampled(library, caller, ids)
    probe.write_arrays(Path(request.out), made)
    return said


def draw(seed: int, length: int, vocab_size: int) -> np.ndarray:
    """Random ids (B, T), with B other than T; the shorter they are, the more rows."""
    rows = max(ROWS, TOKENS // length)
    rows += rows == length
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, length)).astype(np.int32)


def sampled(library: Library, caller: Caller, ids: np.ndarray) -> Arrays:
    """The arrays of a sample.npz: of long ones one row, for every candidate is run on it; two told axes apart."""
    ids = ids[:1] if ids.shape[1] >= TOKENS // ROWS else ids
    with library.quiet():
        logits, states = caller.both(ids)
    yield "ids", ids
    yield "logits", logits
    for n, state in enumerate(states):
        yield f"hidden.{n}", state


def judged(
    library: Library,
    request: Request,
    caller: Caller,
    loader: "Loader",
    weights: Mapping[str, Mapping[str, np.ndarray]],
) -> Arrays:
    """What ``verify`` compares, with the names of probe.py; gradients by the user's names."""
    ids = probe.read_ids(Path(request.ids))
    tokens, targets = ids[None, :-1], ids[None, 1:]
    for scale, values in weights.items():
        loader.put(values)
        with library.quiet():
            logits, states = caller.both(tokens)
        yield f"logits.{scale}", logits[0, -probe.KEPT :] if not caller.last_only else logits
        for n, state in enumerate(states):
            yield f"hidden.{scale}.{f'h.{n - 1}' if n else 'embed'}", state[0, -probe.KEPT :]
        if request.gradients and not caller.last_only:
            forward = lambda: caller.native(tokens)  # noqa: E731
            for name, array in library.gradients(caller.model, forward, targets):
                yield f"gradient.{scale}.{loader.given(name)}", array
    if request.greedy:
        loader.put(weights["x1"])
        yield from greedy(library, request, caller, ids[: request.prompt].tolist())


def greedy(library: Library, request: Request, caller: Caller, ids: list[int]) -> Arrays:
    """What follows a prompt as far as it goes: one whole pass a token, for a user's model has no cache that we know."""
    rows, drawn = list[np.ndarray](), list[int]()
    most = request.block_size or len(ids) + request.greedy
    with library.quiet():
        for _ in range(min(request.greedy, most - len(ids) + 1)):
            try:
                logits = library.host(caller.native(np.array([ids + drawn], np.int32)))
            except TheirError:
                if not drawn:
                    raise
                break  # a context that is shorter than the folder says
            rows.append(logits[0, -1] if logits.ndim == 3 else logits[0])
            drawn.append(int(rows[-1].argmax()))
    yield "greedy.tokens", np.array(drawn, np.int32)
    yield "greedy.margins", probe.margins(np.stack(rows))


class Loader:
    """Which tensor of the checkpoint goes where in the model: strictly, up to prefixes that wrappers leave.

    Raises:
        UserError: the first name that is missing, unexpected or of another shape.
    """

    def __init__(self, library: Library, model: Any, request: Request, weights: Mapping[str, np.ndarray]):
        self._library, self._model, self._request = library, model, request
        self.said: list[str] = []
        have, buffers = library.shapes(model), library.buffers(model)
        names = aligned(have, weights, request.left)
        groups = library.groups(model)
        there = {groups.get(name) for name in names if name in have}
        missing = [name for name in have if name not in names and name not in buffers and groups[name] not in there]
        unexpected = [name for name, given in names.items() if name not in have and given not in request.left]
        where = f"{request.path}: {request.name}"
        if missing or unexpected:
            first = f"{missing[0]}, which the checkpoint does not have" if missing else ""
            other = f"{unexpected[0]} of the checkpoint" if unexpected else ""
            does = f"has {first}" + (f", and no {other}" if other else "") if missing else f"has no {other}"
            counts = f"({len(missing)} missing, {len(unexpected)} unexpected)"
            raise UserError(f"{where} {does} {counts}: expected the class that wrote it, with its sizes by --kwargs")
        self.names = {name: names[name] for name in have if name in names}
        for name, given in self.names.items():
            if have[name] != weights[given].shape:
                shapes = f"{list(have[name])}, the checkpoint {list(weights[given].shape)}"
                raise UserError(f"{where}: {name} has shape {shapes}: give the sizes by --kwargs")
        dropped = [name for name in names if name not in have]
        if dropped:
            self.said.append(f"left out, as {request.name} has no such buffer: {dropped[0]}{_more(dropped)}")
        for group in set(groups.values()):
            same = [name for name in self.names if groups[name] == group]
            if any(not np.array_equal(weights[self.names[same[0]]], weights[self.names[name]]) for name in same[1:]):
                raise UserError(f"{where}: {same[0]} and {same[1]} are one array, but two in the checkpoint")

    def put(self, weights: Mapping[str, np.ndarray]) -> None:
        """Loads these values, by the checkpoint's names."""
        self._library.put(self._model, {name: weights[given] for name, given in self.names.items()})

    def given(self, name: str) -> str:
        """The checkpoint's name of a tensor of the model."""
        return self.names.get(name, name)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def aligned(have: Iterable[str], given: Iterable[str], left: Iterable[str] = ()) -> dict[str, str]:
    """The model's name -> the checkpoint's, with the prefix taken off or put before that fits best."""
    held, there = set(have), list(given)
    best: dict[str, str] = {}
    prefixes = dict.fromkeys(["", *(p for name in there for p in _prefixes(name))])
    more = dict.fromkeys(["", *(p for name in held for p in _prefixes(name))])
    for peel in (False, True):
        for taken in prefixes:
            for put in more if not taken else [""]:
                made = {}
                for name in there:
                    plain = module_names.peel(name) if peel else name
                    made[put + plain.removeprefix(taken)] = name
                if not best or len(held & made.keys()) > len(held & best.keys()):
                    best = made
    return best


def _prefixes(name: str) -> list[str]:
    """``model.`` and ``model.transformer.`` of model.transformer.wte.weight; none with a number in it."""
    parts = name.split(".")[:-1]
    made = [".".join(parts[: n + 1]) + "." for n in range(len(parts))]
    return [each for each in made[:4] if not any(part.isdigit() for part in each.split("."))]
