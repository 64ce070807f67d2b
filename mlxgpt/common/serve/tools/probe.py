"""Asks a template what it writes for calls whose names and arguments no text contains."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlxgpt.common.chat.turns import THOUGHTS, common
from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.tools.shape import ARGS, ID, NAME, Slot
from mlxgpt.common.sft.template import Template

ASKED, SAID = "7c1e94b2 q", "3fa08d6e a"
NAMES = ("qzv_look_up", "qzw_send_it")
IDS = ("Xq7kZ2b6f", "Yw3mT8c1h")
KEYS = ("kx_one", "ky_two")
ARGUMENT = "vx one"
_ARGUMENTS: tuple[dict[str, Any], ...] = ({KEYS[0]: ARGUMENT}, {KEYS[0]: "vy one"})
TAG = re.compile(r"<[^<>\s]+>|\[[A-Za-z_/]+\]")


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

    @property
    def about(self) -> str:
        """What is written because of tools, without the tools themselves and the question."""
        alone = self.template.render(self.asked, generation=True)
        start = common(alone, self.whole)
        return self.whole[start : len(self.whole) - common(alone[start:][::-1], self.whole[start:][::-1])]

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
        if cut >= 0 and (tag := TAG.match(text, cut)) and tag.end() > start:
            start = cut  # both begin with tags that begin alike
        return without_thought(text[start:])

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


def without_thought(text: str) -> str:
    """Behind an empty reasoning."""
    text = text.lstrip()
    for opens, closes in THOUGHTS:
        rest = text.removeprefix(opens).lstrip()
        if rest.startswith(closes):
            return rest.removeprefix(closes).lstrip()
    return text


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
