"""Arguments that a template writes one by one, in XML or as a function's: learned from what differs.

Told apart by calls of no, one and two arguments, and of arguments of each type.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from mlxgpt.common.serve.tools.probe import ARGUMENT, CALLS, KEYS, Asked, Found, Probe, found
from mlxgpt.common.serve.tools.shape import ARGS, Parameters, Slot

_ATOM = re.compile(r"\s+|<[^<>\s]*>?|[^<>\s]*>|[^<>\s]+")
_LIST, _OBJECT = "vl_item", "vk_item"
_VALUES: dict[str, Any] = {
    "string": ARGUMENT,
    "integer": 7101,
    "number": 7.25,
    "boolean": True,
    "null": None,
    "array": [_LIST],
    "object": {_OBJECT: 7},
}


def learn(probe: Probe, one: str, two: str) -> tuple[Parameters, list[Found], list[Found], list[Found]] | None:
    """Their form, and the slots of a call alone and of two; None where the form is not known.

    The last slot of each call is that of its arguments, from the first of them to what stands behind the last.
    """
    told = {kind: text for kind in _VALUES if (text := probe.written(_asked(_VALUES[kind])))}
    pair = probe.written(_asked(7101, 7202))
    places = {kind: found for kind, text in told.items() if (found := _placed(text, kind))}
    if not {"string", "integer"} <= places.keys() or not pair:
        return None
    number = told["integer"]
    begins = {kind: told[kind][key:value] for kind, (key, value, _) in places.items()}
    quotes = _quotes(told["string"], begins, places["string"])
    if quotes:
        begins = dict.fromkeys(begins, begins["integer"])
    key, _, stop = places["integer"]
    first = _atoms(number[_named(number) : key - len(KEYS[0])])
    inner = pair[pair.index("7101") + 4 :]
    between, rest = _atoms(inner[: inner.find(KEYS[1])]), _atoms(number[stop:])
    before = _shared(first[::-1], between[::-1])[::-1]
    if len(before) == len(first) and len(first) > 1 and before[0].isspace():
        before = before[1:]
    between = between[: len(between) - len(before)]
    after = _shared(between, rest)
    if not quotes and (not "".join(after).strip() or KEYS[0] in "".join(after)):
        return None
    form = Parameters(
        "".join(before),
        tuple((kind, begins.get(kind, begins["integer"])) for kind in _VALUES),
        "".join(after),
        "".join(between[len(after) :]),
        _words(told, places),
        (quotes, '"', "'") if quotes else (),
    )
    made = [_slots(text, calls, form) for text, calls in ((one, CALLS[:1]), (two, CALLS if two else ()))]
    if any(slots is None for slots in made):
        return None
    single, double = made
    return form, single[0], *(double if double else ([], []))  # type: ignore[index, misc]


def _asked(*values: Any) -> Asked:
    return CALLS[0]._replace(arguments=dict(zip(KEYS, values, strict=False)))


def _named(text: str) -> int:
    """Behind the name that stands last before the arguments."""
    name = CALLS[0].name
    return text.rfind(name, 0, text.find(KEYS[0])) + len(name)


def _placed(text: str, kind: str) -> tuple[int, int, int] | None:
    """Behind the key, and where the value begins and ends."""
    key = text.find(KEYS[0]) + len(KEYS[0])
    if key < len(KEYS[0]):
        return None
    value = _VALUES[kind]
    if kind in ("array", "object"):
        inside = text.find(_LIST if kind == "array" else _OBJECT, key)
        start = text.rfind("[" if kind == "array" else "{", key, inside)
        return (key, start, start) if inside >= 0 and start >= 0 else None
    for written in (value,) if isinstance(value, str) else (json.dumps(value), str(value)):
        if (start := text.find(written, key)) >= 0:
            return key, start, start + len(written)
    return None


def _quotes(text: str, begins: dict[str, str], place: tuple[int, int, int]) -> str:
    """What encloses strings and not numbers."""
    quote = begins["string"].removeprefix(begins["integer"])
    return quote if quote != begins["string"] and text.startswith(quote, place[2]) else ""


def _words(told: dict[str, str], places: dict[str, tuple[int, int, int]]) -> tuple[str, str, str]:
    """How true, false and null are written."""
    true, null = (told[kind][slice(*places[kind][1:])] if kind in places else "" for kind in ("boolean", "null"))
    return true or "true", "False" if true == "True" else "false", null or "null"


def _atoms(text: str) -> list[str]:
    """White space, tags, and what is between."""
    return _ATOM.findall(text)


def _shared(one: Sequence[str], two: Sequence[str]) -> list[str]:
    """What both begin with."""
    size = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return list(one[:size])


def _slots(text: str, calls: Sequence[Asked], form: Parameters) -> list[list[Found]] | None:
    """The slots of each call: name, id and so on, and the arguments."""
    made = []
    for call in calls:
        (value,) = call.arguments.values()
        place = text.find(value)
        key = text.rfind(KEYS[0], 0, place)
        if place < 0 or key < 0:
            return None
        quote = form.quotes[0] if form.quotes else ""
        stop = place + len(value) + len(quote)
        stop += len(form.after) if text.startswith(form.after, stop) else 0
        slots = [each for each in found(text, call) if each.stop <= key]
        made.append([*slots, Found(key - len(form.before), stop, Slot(ARGS))])
    return made
