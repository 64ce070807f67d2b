"""Arguments that are written one by one: read with their function's schema, which says what a text stands for."""

import re
from collections.abc import Mapping
from typing import Any

from mlxgpt.common.serve.tools.literal import Partial, json_value, literal, matched, value_at, white
from mlxgpt.common.serve.tools.shape import Parameters, Shape

_KEY = re.compile(r"[^\s<>=\"':,(){}\[\]|]+")
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def read(shape: Shape, schema: dict[str, Any], text: str, at: int, last: bool) -> tuple[dict[str, Any], int]:
    """The arguments that begin at ``at``, and the place behind them.

    Raises:
        Partial, ValueError: see literal.py.
    """
    form = shape.parameters
    assert form is not None
    made: dict[str, Any] = {}
    while True:
        try:
            begins = literal(text, white(text, at), form.before.strip())
            key, begins = matched(text, begins, _KEY)
        except ValueError:
            return made, at
        kind, begins = _begun(form, text, begins)
        if form.quotes:
            made[key], at = value_at(text, begins, form.quotes)
        else:
            raw, at = _raw(shape, form, text, begins, last)
            kinds = {kind} if kind else types_of((schema.get("properties") or {}).get(key), schema)
            made[key] = meant(raw, kinds)
        at = _apart(form, text, at)


def _apart(form: Parameters, text: str, at: int) -> int:
    """Behind what stands between two arguments, if it does."""
    if not form.apart.strip():
        return at
    try:
        return literal(text, white(text, at), form.apart.strip())
    except ValueError:
        return at


def _begun(form: Parameters, text: str, at: int) -> tuple[str, int]:
    """The type that is written beside a key, "" where none is, and the place of its value."""
    written = dict.fromkeys(begins for _, begins in form.between)
    partial = False
    for begins in sorted(written, key=len, reverse=True):
        try:
            stop = literal(text, at, begins.rstrip())
        except Partial:
            partial = True
            continue
        except ValueError:
            continue
        blank = begins[len(begins.rstrip()) :]
        if blank and blank.startswith(text[stop:]):
            raise Partial
        kinds = [kind for kind, each in form.between if each == begins]
        only = len(written) > 1 and ("string" if kinds == ["string"] else kinds[0])
        return only or "", stop + len(blank) * text.startswith(blank, stop)
    if partial:
        raise Partial
    raise ValueError


def _raw(shape: Shape, form: Parameters, text: str, at: int, last: bool) -> tuple[str, int]:
    """A value that ends where ``after`` stands and another argument or the call's end follows."""
    mark, place = form.after.strip(), at
    blank = form.after[: len(form.after) - len(form.after.lstrip())]
    while (place := text.find(mark, place)) >= 0:
        stop = place + len(mark)
        if _follows(shape, form, text, white(text, stop), last):
            return text[at:place].removesuffix(blank), stop
        place += 1
    raise Partial


def _follows(shape: Shape, form: Parameters, text: str, at: int, last: bool) -> bool:
    """Whether an argument begins at ``at``, or a call ends."""
    partial = False
    for begins in (form.apart + form.before, shape.between, shape.closes):
        try:
            if begins.strip():
                literal(text, at, begins.strip())
                return True
        except Partial:
            partial = True
        except ValueError:
            continue
    if partial and not last:
        raise Partial
    return partial or at == len(text)


def resolved(schema: dict[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that a schema refers to inside ``whole``; itself where it does not."""
    found: Any = schema
    for _ in range(20):
        if not isinstance(found, dict) or not isinstance(found.get("$ref"), str):
            break
        path, found = found["$ref"].removeprefix("#").split("/")[1:], whole
        for part in path:
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if isinstance(found, dict) else {}


def types_of(schema: Any, whole: Mapping[str, Any], deep: int = 20) -> set[str]:
    """The types of JSON that a value may have; empty where the schema does not say. ``whole`` has what it refers to."""
    if not isinstance(schema, dict) or not deep:
        return set()
    schema = resolved(schema, whole)
    said = schema.get("type")
    kinds = {said} if isinstance(said, str) else {each for each in said or () if isinstance(each, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(key) or ():
            kinds |= types_of(each, whole, deep - 1)
    listed = [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else ())]
    return kinds or {type_of(each) for each in listed}


def type_of(value: Any) -> str:
    """The type of a value in JSON Schema."""
    return "null" if value is None else _TYPES.get(type(value), "")


def meant(raw: str, kinds: set[str]) -> Any:
    """The value that a text stands for: text where no other type may be, else JSON or Python's form of a value."""
    try:
        value = json_value(raw)
    except ValueError:
        try:
            value, stop = value_at(f"{raw} ", 0)
            if raw[stop:].strip():
                return raw
        except (Partial, ValueError):
            return raw
    if "string" in kinds and not (type_of(value) in kinds and not isinstance(value, str)):
        return raw
    return raw if isinstance(value, str) and not kinds else value
