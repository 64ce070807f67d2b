"""What a template says about tool calls, learned by rendering some.

Nothing is looked up by the model's name. Where a form cannot be learned, tools are refused with a line that says why.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.tools import described, parameters
from mlxgpt.common.serve.tools.literal import Partial, white
from mlxgpt.common.serve.tools.probe import CALLS, NAMES, TAG, Asked, Found, Probe, found
from mlxgpt.common.serve.tools.read import Reader
from mlxgpt.common.serve.tools.shape import ARGS, INDEX, Call, Keys, Shape, Slot
from mlxgpt.common.sft.template import Template


class Learned(NamedTuple):
    """What a template says about calls."""

    shape: Shape
    ends: tuple[int, ...] = ()  # the tokens that may end an answer of calls, beside those that end any answer
    short_ids: bool = False  # it refuses ids other than nine letters and digits, as Mistral's do
    described: bool = False  # it tells the model how to write calls and leaves those of messages out


def learn(template: Template) -> Learned:
    """What the template says about calls.

    Raises:
        UserError: it does not write tools, or its calls have a form that is not known.
    """
    probe = Probe(template)
    if NAMES[0] not in probe.whole:
        raise UserError(f"{template.name} does not write the tools of a request: expected a template that does")
    one, two = probe.written(CALLS[0]), probe.written(*CALLS)
    if not one:
        shape = described.learn(probe.about)
        if shape is None:
            raise UserError(f"{template.name} writes tools and no tool calls: expected a template that writes both")
        return Learned(shape, described=True)
    shape = _shape(probe, one, two)
    if shape is not None:
        shape, ends = _ended(probe, shape, one)
        proved = _proved(shape, one, CALLS[:1]) and not _ends_before(template, shape)
        if proved and (not shape.between or _proved(shape, two, CALLS)):
            return Learned(shape, ends, probe.short_ids())
    raise UserError(f"{template.name} writes tool calls in a form that is not known here: {one[:80]!r}")


def _proved(shape: Shape, text: str, calls: Sequence[Asked]) -> bool:
    """Whether calls are read from what the template writes for them."""
    read: list[Call] = []
    at = 0
    try:
        while len(read) < len(calls):
            reader = Reader(shape, {}, text, white(text, at), True)
            at = reader.read()
            read += reader.calls
    except (Partial, ValueError):
        return False
    same = [(call.name, json.loads(call.arguments)) for call in read] == [each[:2] for each in calls]
    return same and (bool(shape.mark) or shape.keys is not None)


def _ends_before(template: Template, shape: Shape) -> bool:
    """Whether what ends an answer stands before its calls, as where calls are a turn of their own."""
    return any(end and end in shape.opens for end in (template.form.end, template.end))


def _shape(probe: Probe, one: str, two: str) -> Shape | None:
    """The shape of one and of two calls; None where their arguments are neither JSON nor written one by one."""
    single, double = found(one, CALLS[0]), [found(two, call) for call in CALLS]
    if not any(each.slot.kind == ARGS for each in single):
        learned = parameters.learn(probe, one, two)
        if learned is None:
            return None
        form, single, *double = learned
        return replace(_assembled(one, two, single, double), parameters=form)
    shape = _assembled(one, two, single, double)
    inside = next(_objects(one, single[0].start), None)
    if inside is None:
        return shape
    start, stop, keys, listed = inside
    return replace(shape, mark=one[:start].strip(), stop=one[stop:].strip(), keys=keys, listed=listed)


def _assembled(one: str, two: str, single: list[Found], double: list[list[Found]]) -> Shape:
    """The shape of one and two calls, by their slots."""
    opens, closes, between = one[: single[0].start], one[single[-1].stop :], ""
    parts = _filled(one, single)
    if two and len(double[0]) == len(double[1]) == len(single):
        between = two[double[0][-1].stop : double[1][0].start]
        parts, opens, between = _counted(parts, _filled(two, double[1]), opens, between)
    tag = TAG.match(opens)
    mark = tag.group() if tag else opens.strip()
    return Shape(opens, parts, between, closes, mark if any(map(str.isalpha, mark)) else "")


def _filled(text: str, slots: list[Found]) -> tuple[str | Slot, ...]:
    """The slots with the literals between them."""
    made: list[str | Slot] = []
    for n, each in enumerate(slots):
        if n:
            made.append(text[slots[n - 1].stop : each.start])
        made.append(each.slot)
    return tuple(made)


def _counted(
    one: tuple[str | Slot, ...], two: tuple[str | Slot, ...], opens: str, between: str
) -> tuple[tuple[str | Slot, ...], str, str]:
    """The parts with what counts the calls as a slot, found as the number that the second call has one higher."""
    made: list[str | Slot] = []
    for a, b in zip(one, two, strict=True):
        if isinstance(a, str) and isinstance(b, str) and (numbered := _numbered(a, b)):
            made += [part for part in numbered if part]
        else:
            made.append(a)
    for number in re.finditer(r"[0-9]+", opens):
        first, rest = int(number.group()), opens[number.end() :]
        upto = between.removesuffix(rest)
        if between.endswith(rest) and (other := re.search(r"[0-9]+$", upto)) and int(other.group()) == first + 1:
            return (Slot(INDEX, first), rest, *made), opens[: number.start()], between[: other.start()]
    return tuple(made), opens, between


def _numbered(one: str, two: str) -> list[str | Slot] | None:
    """A literal around the number that differs."""
    for a in re.finditer(r"[0-9]+", one):
        b = re.compile(r"[0-9]+").match(two, a.start())
        same = b and one[: a.start()] == two[: b.start()] and one[a.end() :] == two[b.end() :]
        if b and same and int(b.group()) == int(a.group()) + 1:
            return [one[: a.start()], Slot(INDEX, int(a.group())), one[a.end() :]]
    return None


def _objects(text: str, upto: int) -> Iterator[tuple[int, int, Keys, bool]]:
    """Where a JSON object that holds the name and the arguments of the first call, or a list of it, begins and ends."""
    for match in re.finditer(r"[{\[]", text[:upto]):
        try:
            value, stop = json.JSONDecoder().raw_decode(text, match.start())
        except ValueError:
            continue
        call = value[0] if isinstance(value, list) and value else value
        name = next(_paths(call, NAMES[0]), None)
        arguments = next(_paths(call, CALLS[0].arguments), None)
        if name and arguments:
            yield match.start(), stop, (name, arguments), isinstance(value, list)


def _paths(value: Any, wanted: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys under which ``wanted`` lies in objects, as it is or as JSON in a string."""
    same = value == wanted
    if isinstance(value, str) and not same and value[:1] == "{":
        same = json.loads(value) == wanted
    if same:
        yield path
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _paths(each, wanted, (*path, key))


def _ended(probe: Probe, shape: Shape, one: str) -> tuple[Shape, tuple[int, ...]]:
    """The shape without the tokens that end an answer, and these."""
    control, tail = probe.template.control, shape.closes
    ends: list[str] = []
    end = next((each for each in (probe.template.form.end, probe.template.end) if each in tail), "")
    if end:
        closes = tail[: tail.find(end)]
    else:
        written = control.all(tail)
        last = written[-1] if written and tail.rstrip().endswith(written[-1]) else ""
        if last and last not in shape.between:
            closes = tail[: tail.rfind(last)]
            ends.append(last)
        else:
            closes = tail
    closes = closes.rstrip()
    body = one[: len(one) - len(tail)] + closes
    try:
        told = probe.turn(CALLS[:1], told=True)
        following = control.leading(told[told.find(body) + len(body) :].lstrip())[:1] if body in told else []
    except UserError:
        following = []
    ends += [each for each in following if each not in ends]
    cut = tail[len(closes) :].strip()
    stop = shape.stop.removesuffix(cut).rstrip() if cut else shape.stop
    ids = tuple(number for each in ends if (number := probe.template.id_of(each)) is not None)
    return replace(shape, closes=closes, stop=stop), ids
