"""What a template says about tool calls, learned by rendering calls whose names and arguments no text contains.

Nothing is looked up by the model's name. Where a form cannot be learned, tools are refused with a line that says why.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mlxgpt.common.chat.turns import THOUGHTS, common
from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.tools import parameters
from mlxgpt.common.serve.tools.shape import ARGS, ID, INDEX, NAME, Keys, Shape, Slot
from mlxgpt.common.sft.template import Template

ASKED, SAID = "7c1e94b2 q", "3fa08d6e a"
NAMES = ("qzv_look_up", "qzw_send_it")
IDS = ("Xq7kZ2b6f", "Yw3mT8c1h")
KEYS = ("kx_one", "ky_two")
_ARGUMENTS: tuple[dict[str, Any], ...] = ({KEYS[0]: "vx one"}, {KEYS[0]: "vy one"})
_TAG = re.compile(r"<[^<>\s]+>|\[[A-Za-z_/]+\]")


class Asked(NamedTuple):
    """A call to be written."""

    name: str
    arguments: dict[str, Any]
    id: str


class Found(NamedTuple):
    """A slot in a text."""

    start: int
    stop: int
    slot: Slot


CALLS = tuple(Asked(*each) for each in zip(NAMES, _ARGUMENTS, IDS, strict=True))


class Probe:
    """Asks a template what it writes."""

    def __init__(self, template: Template) -> None:
        self.template = template
        properties = {key: {"type": "string", "description": "d"} for key in KEYS}
        schema = {"type": "object", "properties": properties, "required": list(KEYS)}
        self.tools = [
            {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}} for name in NAMES
        ]
        self.asked: list[dict[str, Any]] = [{"role": "user", "content": ASKED}]
        try:
            template.render(self.asked, self.tools)
        except UserError:  # some templates want a system prompt
            self.asked.insert(0, {"role": "system", "content": SAID[::-1]})
        self.whole = template.render(self.asked, self.tools, generation=True)
        self.prompt = self._behind(self.whole)
        self.plain = self.turn(content=SAID).partition(SAID)[0]

    def _behind(self, text: str) -> str:
        return text[text.rfind(ASKED) + len(ASKED) :]

    def turn(self, calls: Sequence[Asked] = (), content: str = "", told: bool = False) -> str:
        """What is written behind the question: the answer, and the results of its calls if ``told``."""
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [
                {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
                for one in calls
            ]
        results = [{"role": "tool", "tool_call_id": one.id, "name": one.name, "content": SAID[::-1]} for one in calls]
        return self._behind(self.template.render([*self.asked, message, *(results if told else ())], self.tools))

    def written(self, *calls: Asked) -> str:
        """An answer of calls alone, behind its header and its reasoning; "" where the template does not write all."""
        try:
            text = self.turn(calls)
        except UserError:
            return ""
        if not all(one.name in text for one in calls):
            return ""
        start = max(common(text, self.plain), common(text, self.prompt))
        cut = max(text.rfind("<", 0, start), text.rfind("[", 0, start))
        if cut >= 0 and (tag := _TAG.match(text, cut)) and tag.end() > start:
            start = cut  # both begin with tags that begin alike
        return _without_thought(text[start:])

    def short_ids(self) -> bool:
        """Whether the template refuses ids other than nine letters and digits (Mistral's do)."""
        long = (CALLS[0]._replace(id="call_" + IDS[0] * 2),)
        try:
            self.turn(long, told=True)
        except UserError:
            try:
                self.turn(CALLS[:1], told=True)
            except UserError:
                return False
            return True
        return False


def _without_thought(text: str) -> str:
    """Behind an empty reasoning."""
    text = text.lstrip()
    for opens, closes in THOUGHTS:
        rest = text.removeprefix(opens).lstrip()
        if rest.startswith(closes):
            return rest.removeprefix(closes).lstrip()
    return text


def learn(template: Template) -> tuple[Shape, tuple[int, ...], bool]:
    """How the template writes calls, the tokens that may end an answer of calls, and whether it wants short ids.

    Raises:
        UserError: it does not write tools, or its calls have a form that is not known.
    """
    probe = Probe(template)
    if NAMES[0] not in probe.whole:
        raise UserError(f"{template.name} does not write the tools of a request: expected a template that does")
    one, two = probe.written(CALLS[0]), probe.written(*CALLS)
    if not one:
        raise UserError(f"{template.name} writes tools and no tool calls: expected a template that writes both")
    shape = _as_json(one, two) or parameters.learn(one, two)
    if shape is None or (not shape.mark and shape.keys is None):
        raise UserError(f"{template.name} writes tool calls in a form that is not known here: {one[:80]!r}")
    return *_ended(probe, shape, one), probe.short_ids()


def _as_json(one: str, two: str) -> Shape | None:
    """Calls whose arguments are JSON; None where they are not."""
    slots = found(one, CALLS[0])
    if not any(each.slot.kind == ARGS for each in slots):
        return None
    shape = assembled(one, two, slots)
    inside = next(_objects(one, slots[0].start), None)
    if inside is None:
        return shape
    start, stop, keys, listed = inside
    return replaced(shape, one, start, stop, keys, listed)


def replaced(shape: Shape, one: str, start: int, stop: int, keys: Keys, listed: bool) -> Shape:
    """The shape of calls that are JSON objects, from ``start`` to ``stop``."""
    return replace(shape, mark=one[:start].strip(), stop=one[stop:].strip(), keys=keys, listed=listed)


def found(text: str, call: Asked) -> list[Found]:
    """The slots of a call in a text, in their order."""
    made = [Found(m.start(), m.end(), Slot(NAME)) for m in re.finditer(re.escape(call.name), text)]
    made += [Found(m.start(), m.end(), Slot(ID)) for m in re.finditer(re.escape(call.id), text)]
    decoder = json.JSONDecoder()
    for match in re.finditer(r'[{"]', text):
        try:
            value, stop = decoder.raw_decode(text, match.start())
            held = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            continue
        if held == call.arguments:
            made.append(Found(match.start(), stop, Slot(ARGS)))
            break
    return sorted(made, key=lambda each: each.start)


def assembled(one: str, two: str, slots: list[Found]) -> Shape:
    """The shape of one and two calls, of the first call's slots."""
    text = one[slots[0].start : slots[-1].stop]
    del text
    first, second = found(two, CALLS[0]), found(two, CALLS[1])
    opens, closes, between = one[: slots[0].start], one[slots[-1].stop :], ""
    parts = _filled(one, slots)
    if two and len(first) == len(second) == len(slots):
        between = two[first[-1].stop : second[0].start]
        parts, opens, between = _counted(parts, _filled(two, second), opens, between)
    tag = _TAG.match(opens.lstrip())
    mark = tag.group() if tag else opens.strip()
    if not any(map(str.isalpha, mark)):
        mark = ""
    asks = next(each for each in slots if each.slot.kind == ARGS) if any(s.slot.kind == ARGS for s in slots) else None
    text_form = asks is not None and one[asks.start] == '"'
    return Shape(opens, parts, between, closes, mark, text=text_form)


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
