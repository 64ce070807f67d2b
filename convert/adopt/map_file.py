"""A map as TOML that a user reads and edits, and the buffers that it cannot make, beside it."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.adopt.apply import Plan
from convert.adopt.maps.buffers import dtype_of
from convert.adopt.rules import BUFFERS, GROUPS, ROPES, Buffer, Map, Optimizer, Rule
from convert.adopt.source import SEPARATORS
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.files import atomic_path, atomic_write
from mlxgpt.common.folders.tensors import DTYPES
from mlxgpt.common.recipes import read_toml, toml_value, typed

NAME = "map.toml"
KINDS = ("pt", "safetensors", "npz")
_HEAD = """\
# A map of mlxgpt: which tensors a file of a model of your own has, how they lie, and what they are here.
#   mlxgpt adopt FILE --out DIR --map map.toml     reads the file by it
#   mlxgpt convert DIR FILE --map map.toml         writes that file again: your names, your layout
"""
_TENSORS = """\
# Theirs = ours. {n} is the number of a block, {h} of a head, from 0; {n+1} counts from 1, {2n} and {2n+1} take turns.
# axes: how theirs lies, outermost first, parentheses around what is one axis: o out, i in, h heads, d head_dim,
# n blocks, p the pieces of "to" in turn, g groups of grouped heads, 1 an axis of one. Without axes: as ours, o i.
"""
_SOURCE = {
    "kind": "pt, safetensors or npz",
    "under": "keys of the file under which the tensors lie",
    "prefix": "what every name begins with",
    "separator": "between the words of a name in the file",
    "rope": "how rope pairs the dimensions of a head: " + ", ".join(ROPES),
    "dtype": "of all tensors but those in [dtypes]",
    "order": "names in the file's order",
    "nested": "whether the words of a name are dicts and lists in the file",
}
_OPTIMIZER = {
    "at": "keys of the file under which the state of torch.optim.AdamW lies",
    "groups": "one; matrices, then the rest; or linear, weights of linear layers, then the rest, each sorted by name",
    "copies": "whether the copy of a tied tensor is a parameter of its own",
    "step": "keys in [beside] of the number of steps",
    "settings": "of each group",
}
_SECTIONS = ("source", "model", "tensors", "left", "buffers", "dtypes", "optimizer", "beside")


def to_toml(made: Map) -> str:
    """The map as text; ``from_toml`` reads it back equal."""
    return _HEAD + "\n".join(_lines(made)) + "\n"


def _lines(made: Map) -> Iterator[str]:
    values = {name: getattr(made, name) for name in ("kind", "under", "prefix", "separator", "rope")}
    if "" in made.dtypes:
        values["dtype"] = made.dtypes[""]
    if made.order:
        values["order"] = made.order
    if made.nested:
        values["nested"] = True
    yield "\n[source]"
    for name, value in values.items():
        yield f"{name} = {toml_value(value)}  # {_SOURCE[name]}"
    yield "\n[model]  # mlxgpt keys says what each means"
    for name, value in made.model.items():
        yield f"{name} = {toml_value(value)}"
    yield f"\n{_TENSORS}[tensors]"
    for rule in made.rules:
        yield f"{toml_value(rule.theirs)} = {_rule(rule)}{_why(rule)}"
    yield "\n[left]  # tensors that are no weights"
    for name, why in made.left.items():
        yield f"{toml_value(name)} = {toml_value(why)}"
    if made.buffers:
        yield f"\n# How each is made again: {', '.join(BUFFERS[:-1])}, or kept in the .npz beside this file\n[buffers]"
    for name, buffer in made.buffers.items():
        made_by = ", ".join(f"{key} = {toml_value(value)}" for key, value in vars(buffer).items())
        yield f"{toml_value(name)} = {{{made_by}}}"
    others = {name: dtype for name, dtype in made.dtypes.items() if name}
    if others:
        yield "\n[dtypes]"
    for name, dtype in others.items():
        yield f"{toml_value(name)} = {toml_value(dtype)}"
    if made.optimizer:
        yield "\n[optimizer]"
        for name, said in _OPTIMIZER.items():
            yield f"{name} = {toml_value(getattr(made.optimizer, name))}  # {said}"
    if made.beside:
        yield "\n[beside]  # what else the file holds"
    for name, value in made.beside.items():
        yield f"{toml_value(name)} = {toml_value(_packed(value))}"


def _packed(value: Any) -> Any:
    """A plain value as one that TOML has: null, and dicts by numbers, as tables of one key."""
    if value is None:
        return {"null": True}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and set(value) not in ({"null"}, {"pairs"}):
            return {key: _packed(each) for key, each in value.items()}
        return {"pairs": [[key, _packed(each)] for key, each in value.items()]}
    return [_packed(each) for each in value] if isinstance(value, list) else value


def _unpacked(value: Any) -> Any:
    """The inverse of ``_packed``.

    Raises:
        UserError: pairs that are none.
    """
    if isinstance(value, list):
        return [_unpacked(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value == {"null": True}:
        return None
    if set(value) == {"pairs"}:
        pairs = value["pairs"]
        whole = isinstance(pairs, list) and all(isinstance(each, list) and len(each) == 2 for each in pairs)
        _expect(
            whole and all(isinstance(each[0], str | int) for each in pairs),
            "beside: pairs",
            pairs,
            "[[key, value], ...]",
        )
        return {key: _unpacked(each) for key, each in pairs}
    return {key: _unpacked(each) for key, each in value.items()}


def _rule(rule: Rule) -> str:
    if rule.axes or len(rule.to) != 1:
        axes = f", axes = {toml_value(rule.axes)}" if rule.axes else ""
        return f"{{to = {toml_value(rule.to[0] if len(rule.to) == 1 else rule.to)}{axes}}}"
    return toml_value(rule.to[0])


def _why(rule: Rule) -> str:
    said = [rule.sure] * (rule.sure != "sure") + [" ".join(rule.why.split())] * bool(rule.why)
    return f"  # {': '.join(said)}" if said else ""


def write(path: Path, made: Map, kept: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes the map, and beside it, as .npz, the buffers that it says are ``kept``.

    Raises:
        UserError: the system refuses to write.
    """
    beside = path.with_suffix(".npz")
    if kept:
        with atomic_path(beside) as place, open(place, "wb") as file:
            np.savez_compressed(file, **{name: array for name, array in kept.items()})  # type: ignore[arg-type]
    else:
        beside.unlink(missing_ok=True)
    with atomic_write(path) as file:
        file.write(to_toml(made).encode())


def read(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Map:
    """The map in a file; ``shapes`` are those of the tensors that it must fit.

    Raises:
        UserError: names the file, the key, and what is wrong.
    """
    values = read_toml(path)
    try:
        made = from_toml(values)
        Plan(made, shapes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return made


def read_kept(path: Path, made: Map) -> dict[str, np.ndarray]:
    """The buffers that lie beside the map at ``path``.

    Raises:
        UserError: the file is missing, damaged or not the one that the map was written with.
    """
    wanted = {name: buffer for name, buffer in made.buffers.items() if buffer.make == "kept"}
    if not wanted:
        return {}
    beside = path.with_suffix(".npz")
    try:
        with np.load(beside, allow_pickle=False) as file:
            found = {name: file[name] for name in wanted}
    except KeyError as error:
        raise UserError(f"{beside}: {error}: expected the buffers that {path.name} says are kept") from None
    except Exception as error:  # what numpy and zipfile raise for a damaged archive is anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{beside}: {reason}: expected the buffers that {path.name} says are kept") from None
    for name, buffer in wanted.items():
        kind = dtype_of(buffer.dtype)
        array = found[name]
        found[name] = array.view(kind) if array.dtype.kind == "V" and array.dtype.itemsize == kind.itemsize else array
        if (found[name].shape, found[name].dtype) != (buffer.shape, kind):
            shown = f"{found[name].dtype} {list(array.shape)}"
            raise UserError(f"{beside}: {name}: {shown}, expected {buffer.dtype} {list(buffer.shape)} by {path.name}")
    return found


def from_toml(values: Mapping[str, Any]) -> Map:
    """The map that a parsed file is.

    Raises:
        UserError: an unknown key, or a value that is none for its key.
    """
    for section in values:
        if section not in _SECTIONS:
            raise UserError(f"unknown key {section}{nearest(section, _SECTIONS)}: expected {', '.join(_SECTIONS)}")
        if not isinstance(values[section], dict):
            raise UserError(f"{section} = {values[section]!r}: expected a section [{section}]")
    for section in ("model", "tensors"):
        if not values.get(section):
            raise UserError(f"[{section}] is missing or empty")
    source = _source(values.get("source", {}))
    left = values.get("left", {})
    for name, why in left.items():
        _expect(isinstance(why, str), f"left.{name}", why, "text")
    dtypes = {"": source.pop("dtype")} if "dtype" in source else {}
    for name, dtype in values.get("dtypes", {}).items():
        dtypes[name] = dtype
    for name, dtype in dtypes.items():
        _expect(_is_dtype(dtype), f"dtypes.{name}" if name else "source.dtype", dtype, "a dtype such as float32")
    buffers = {name: _buffer(name, value) for name, value in values.get("buffers", {}).items()}
    for name in buffers:
        if name not in left:
            raise UserError(f"buffers.{name}: expected a line of that name under [left]{nearest(name, left)}")
    rules = tuple(_read_rule(name, value) for name, value in values["tensors"].items())
    others = {"beside": _unpacked(values.get("beside", {})), "optimizer": _optimizer(values.get("optimizer"))}
    return Map(rules, _model(values["model"]), left, dtypes=dtypes, buffers=buffers, **others, **source)


def _expect(known: bool, key: str, value: Any, expected: str) -> None:
    if not known:
        raise UserError(f"{key} = {value!r}: expected {expected}")


def _source(values: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _SOURCE:
            raise UserError(f"unknown key source.{key}{nearest(key, _SOURCE)}: expected {', '.join(_SOURCE)}")
        if key in ("under", "order"):
            _expect(
                isinstance(value, list) and all(isinstance(one, str) for one in value), f"source.{key}", value, "names"
            )
            made[key] = tuple(value)
            continue
        kind = bool if key == "nested" else str
        _expect(isinstance(value, kind), f"source.{key}", value, "true or false" if kind is bool else "text")
        made[key] = value
    for key, known in (("kind", KINDS), ("rope", ROPES), ("separator", SEPARATORS)):
        if key in made:
            _expect(made[key] in known, f"source.{key}", made[key], f"one of {', '.join(known)}")
    return made


def _optimizer(values: Mapping[str, Any] | None) -> Optimizer | None:
    if values is None:
        return None
    for key in values:
        if key not in _OPTIMIZER:
            raise UserError(f"unknown key optimizer.{key}{nearest(key, _OPTIMIZER)}: expected {', '.join(_OPTIMIZER)}")
    for key in ("at", "step"):
        value = values.get(key, [])
        _expect(
            isinstance(value, list) and all(isinstance(one, str) for one in value), f"optimizer.{key}", value, "keys"
        )
    _expect(bool(values.get("at")), "optimizer.at", values.get("at"), "keys such as ['optimizer']")
    _expect(values.get("groups") in GROUPS, "optimizer.groups", values.get("groups"), f"one of {', '.join(GROUPS)}")
    copies, settings = values.get("copies", False), values.get("settings", [])
    _expect(isinstance(copies, bool), "optimizer.copies", copies, "true or false")
    tables = isinstance(settings, list) and all(isinstance(each, dict) for each in settings)
    numbers = tables and all(type(one) in (int, float) for each in settings for one in each.values())
    _expect(numbers, "optimizer.settings", settings, "numbers by name")
    return Optimizer(tuple(values["at"]), values["groups"], tuple(settings), copies, tuple(values.get("step", [])))


def _model(values: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key model.{key}{nearest(key, fields)}")
    return {key: typed("model", fields[key], value) for key, value in values.items()}


def _read_rule(name: str, value: Any) -> Rule:
    if isinstance(value, str):
        return Rule(name, (value,))
    _expect(isinstance(value, dict), f"tensors.{name}", value, "our name, or {to = ..., axes = ...}")
    for key in value:
        if key not in ("to", "axes"):
            raise UserError(f"unknown key tensors.{name}.{key}: expected to and axes")
    to, axes = value.get("to"), value.get("axes", "")
    to = [to] if isinstance(to, str) else to
    named = isinstance(to, list) and to and all(isinstance(one, str) for one in to)
    _expect(bool(named), f"tensors.{name}.to", value.get("to"), "our name, or a list of names")
    _expect(isinstance(axes, str), f"tensors.{name}.axes", axes, "text such as 'i o'")
    return Rule(name, tuple(to or ()), axes)


def _buffer(name: str, value: Any) -> Buffer:
    expected = "{make = ..., dtype = ..., shape = [...]}"
    whole = isinstance(value, dict) and set(value) == {"make", "dtype", "shape"} and isinstance(value["shape"], list)
    _expect(bool(whole), f"buffers.{name}", value, expected)
    shape = value["shape"]
    _expect(value["make"] in BUFFERS, f"buffers.{name}.make", value["make"], f"one of {', '.join(BUFFERS)}")
    _expect(_is_dtype(value["dtype"]), f"buffers.{name}.dtype", value["dtype"], "a dtype such as float32")
    sizes = all(type(size) is int and 0 <= size < 2**31 for size in shape)
    _expect(sizes, f"buffers.{name}.shape", shape, "whole numbers")
    return Buffer(value["make"], value["dtype"], tuple(shape))


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in {kind.name for kind in DTYPES.values()} | {"complex64", "complex128"}
