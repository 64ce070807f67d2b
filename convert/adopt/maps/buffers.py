"""Buffers of their file, which are no weights: recognized ones are made again, the others kept once, beside the map."""

import hashlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from convert.adopt import apply
from convert.adopt.rules import Buffer, Map, has_number, matching, named
from convert.adopt.source import State
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.tensors import DTYPES


def _triangle(shape: tuple[int, ...], above: bool) -> np.ndarray:
    square = np.ones(shape[-2:], dtype=bool)
    return np.broadcast_to(np.triu(square, 1) if above else np.tril(square), shape)


# make -> the array of a shape, before it is cast
_MADE: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "tril": lambda shape: _triangle(shape, above=False),
    "triu": lambda shape: _triangle(shape, above=True),
    "-inf": lambda shape: np.where(_triangle(shape, above=True), np.float32(-np.inf), np.float32(0)),
    "arange": lambda shape: np.broadcast_to(np.arange(shape[-1]), shape),
    "zeros": np.zeros,
    "ones": np.ones,
}


def dtype_of(name: str) -> np.dtype:
    """The dtype of a name, bfloat16 too."""
    return next((kind for kind in DTYPES.values() if kind.name == name), None) or np.dtype(name)


def make(buffer: Buffer) -> np.ndarray:
    """The values of a recognized buffer."""
    with np.errstate(invalid="ignore"):
        return np.ascontiguousarray(_MADE[buffer.make](buffer.shape).astype(dtype_of(buffer.dtype)))


def recognize(array: np.ndarray) -> Buffer:
    """How to make an array again; ``kept`` where no rule makes it bit for bit."""
    for name in _MADE:
        triangle = name in ("tril", "triu", "-inf")
        if (triangle and (array.ndim < 2 or min(array.shape[-2:]) < 2)) or (name == "arange" and not array.ndim):
            continue
        if name == "-inf" and array.dtype.kind in "biu":
            continue
        found = Buffer(name, array.dtype.name, tuple(array.shape))
        if make(found).tobytes() == np.ascontiguousarray(array).tobytes():
            return found
    return Buffer("kept", array.dtype.name, tuple(array.shape))


def lines(made: Map, state: State, plan: apply.Plan) -> tuple[dict[str, str], dict[str, Buffer], dict[str, np.ndarray]]:
    """Lines of [left] and of [buffers], and arrays to keep: one for all blocks where those are equal."""
    left: dict[str, str] = {}
    buffers: dict[str, Buffer] = {}
    kept: dict[str, np.ndarray] = {}
    for line, why in made.left.items():
        names = [name for name in state.tensors if matching(line).fullmatch(name) and name not in plan.rule_of]
        found = {name: state.tensors[name].read() for name in names[:1]}
        digests = {name: _digest(state.tensors[name].read()) for name in names}
        together = set(names) == set(_names(line, plan)) and len(set(digests.values())) == 1
        for name in [line] if together else names:
            array = found[names[0]] if together else state.tensors[name].read()
            left[name], buffers[name] = why, recognize(array)
            if buffers[name].make == "kept":
                kept[name] = array
    return left, buffers, kept


def _digest(array: np.ndarray) -> bytes:
    head = f"{array.dtype.name} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).digest()


def _names(line: str, plan: apply.Plan) -> Iterator[str]:
    """The names that a line of [left] stands for, in a model of these sizes."""
    for n in range(plan.config.n_layer if has_number(line, "n") else 1):
        for h in range(plan.config.n_head if has_number(line, "h") else 1):
            yield named(line, n, h)


def again(made: Map, kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every buffer of their file, by name.

    Raises:
        UserError: a line of [left] that no line of [buffers] says how to make.
    """
    plan = apply.Plan(made)
    found: dict[str, np.ndarray] = {}
    for line in made.left:
        if line not in made.buffers:
            raise UserError(f"left.{line}: nothing says how to make it again: expected a line under [buffers]")
        buffer = made.buffers[line]
        array = kept[line] if buffer.make == "kept" else make(buffer)
        found |= dict.fromkeys(_names(line, plan), array)
    return found
