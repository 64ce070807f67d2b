"""Reads calls from a text that may still grow, as a template has them; other spacing and keys are taken, too."""

import json
import re
from collections.abc import Mapping
from typing import Any

from mlxgpt.common.serve.tools import values
from mlxgpt.common.serve.tools.literal import Partial, json_end, json_value, literal, matched, value_at, white
from mlxgpt.common.serve.tools.shape import ARGS, ID, INDEX, NAME, Call, Shape

_NAMES = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters", "args")
_WRITTEN = {
    NAME: re.compile(r"[A-Za-z0-9_.\-]+"),
    ID: re.compile(r"[^\s<>{}()\[\]\"'|,]+"),
    INDEX: re.compile(r"[0-9]+"),
}
_KEY = re.compile(r'\{\s*(?:"([^"]*)("?)|\}|$)')  # the beginning of an object, and of its first key
_STRING = re.compile(r'"([^"\\]+)"')


class Reader:
    """Reads the calls that begin at ``at``, with what announces them.

    Args:
        shape: of the template.
        schemas: of the arguments of each function.
        last: nothing follows the text, so that what closes calls may be missing.
    """

    def __init__(self, shape: Shape, schemas: Mapping[str, Any], text: str, at: int, last: bool) -> None:
        self._shape, self._schemas, self._text, self._at, self._last = shape, schemas, text, at, last
        self.calls: list[Call] = []
        self._name, self._begun = "", at  # of the call that is not whole, and where its arguments begin

    def read(self) -> int:
        """The place behind the calls, which are then in ``calls``.

        Raises:
            Partial: the text ends in a call.
            ValueError: no calls stand there.
        """
        return self._parts() if self._shape.keys is None else self._objects()

    def cut(self) -> list[Call]:
        """The calls behind a Partial; the last one has its arguments as far as they came."""
        if self._shape.keys is not None:
            return [*self.calls, *self._cut_object()]
        if not self._name:
            return self.calls
        begun = "" if self._shape.parameters else self._text[self._begun :].strip()
        return [*self.calls, Call(self._name, begun if begun.startswith("{") else "")]

    def may_begin(self) -> bool:
        """Whether the JSON object there may be a call, by its first key."""
        found = _KEY.match(self._text, self._at)
        known = {path[0] for path in self._shape.keys or ()} | {*_NAMES, *_ARGUMENTS, "type", "id"}
        if found is None or found.group(1) is None:
            return found is not None
        return found.group(1) in known if found.group(2) else any(key.startswith(found.group(1)) for key in known)

    def _parts(self) -> int:
        """Calls that are written part by part."""
        text, shape = self._text, self._shape
        at = literal(text, self._at, shape.opens.strip())
        while True:
            call, at = self._one(at)
            self.calls.append(call)
            try:
                following = literal(text, white(text, at), shape.between.strip()) if shape.between else -1
            except Partial:
                if not self._last:
                    raise
                following = -1
            except ValueError:
                following = -1
            if following < 0:
                return self._closed(shape.closes.strip(), at)
            at = following

    def _one(self, at: int) -> tuple[Call, int]:
        text, found = self._text, {NAME: "", ID: "", INDEX: "", ARGS: ""}
        self._name = ""
        for part in self._shape.parts:
            self._name, self._begun = found[NAME], at
            if isinstance(part, str):
                at = literal(text, at, part)
            elif part.kind != ARGS:
                value, at = matched(text, white(text, at), _WRITTEN[part.kind])
                found[part.kind] = found[part.kind] or value
            elif self._shape.parameters is not None:
                read, at = values.read(self._shape, self._schemas.get(found[NAME]) or {}, text, at, self._last)
                found[ARGS] = dumped(read)
            else:
                found[ARGS], at = _arguments(text, white(text, at))
        self._name = ""
        return Call(found[NAME], found[ARGS], found[ID]), at

    def _closed(self, closes: str, at: int) -> int:
        """Behind what closes calls."""
        try:
            return literal(self._text, white(self._text, at), closes) if closes else at
        except Partial:
            if not self._last:
                raise
            return len(self._text)

    def _objects(self) -> int:
        """Calls that are JSON objects: one, a list of them, or one behind the other."""
        text, shape = self._text, self._shape
        at = literal(text, self._at, shape.mark)
        while True:
            begins = white(text, at)
            if self.calls and text.startswith((",", ";"), begins):
                begins = white(text, begins + 1)
            if self.calls and not text.startswith("{", begins):
                break
            self._begun = begins
            at = json_end(text, begins)
            value = json_value(text[begins:at])
            self.calls += [self._called(each) for each in (value if isinstance(value, list) else [value])]
            if not shape.mark or isinstance(value, list):
                break
        if not self.calls:
            raise ValueError
        try:
            return self._closed(shape.stop, at)
        except ValueError:
            return at

    def _called(self, value: Any) -> Call:
        """The call of an object."""
        assert self._shape.keys is not None
        name, arguments = (_under(value, path) for path in self._shape.keys)
        inner = value
        if name is None and isinstance(value, dict):
            inner = value["function"] if isinstance(value.get("function"), dict) else value
            name = next((inner[key] for key in _NAMES if isinstance(inner.get(key), str)), None)
        if arguments is None and isinstance(inner, dict):
            arguments = next((inner[key] for key in _ARGUMENTS if inner.get(key) is not None), None)
        if isinstance(arguments, str):
            arguments = json_value(arguments) if arguments.strip() else {}
        if arguments is None and not self._shape.mark:  # any answer in JSON may have a name
            raise ValueError
        if not isinstance(name, str) or not name or not isinstance(arguments, dict | None):
            raise ValueError
        found = value.get("id")
        return Call(name, dumped(arguments or {}), found if isinstance(found, str) else "")

    def _cut_object(self) -> list[Call]:
        """The calls of the list or object that the text ends in."""
        assert self._shape.keys is not None
        text, at = self._text, self._begun
        made: list[Call] = []
        if text.startswith("[", at):
            try:
                while True:
                    at = white(text, at + 1)
                    stop = json_end(text, at)
                    made.append(self._called(json_value(text[at:stop])))
                    at = white(text, stop)
            except (Partial, ValueError):
                pass
        path = self._shape.keys
        names, arguments = {path[0][-1], *_NAMES}, {path[1][-1], *_ARGUMENTS}
        name = _after(names).search(text, at)
        called = name and _STRING.match(text, name.end())
        if called:
            begins = _after(arguments).search(text, at)
            held = text[begins.end() :] if begins else ""
            made.append(Call(called.group(1), held if held.startswith("{") else ""))
        return made


def _after(keys: set[str]) -> re.Pattern[str]:
    return re.compile(f'"(?:{"|".join(map(re.escape, sorted(keys)))})"\\s*:\\s*')


def _under(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def dumped(value: Any) -> str:
    """JSON; halves of surrogate pairs stay escaped."""
    made = json.dumps(value, ensure_ascii=False)
    try:
        made.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return made


def _arguments(text: str, at: int) -> tuple[str, int]:
    """The JSON object of the arguments, also inside a JSON string."""
    if at >= len(text):
        raise Partial
    if text[at] == '"':
        value, stop = value_at(text, at, ('"',))
        held = json_value(value) if value.strip() else {}
    else:
        stop = json_end(text, at)
        held = json_value(text[at:stop])
    if not isinstance(held, dict):
        raise ValueError
    return dumped(held), stop
