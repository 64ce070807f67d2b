"""Values as models write them, read from a text that may still grow: JSON, Python's literals, and other quotes.

``Partial`` says that the text ends too early to tell; ``ValueError`` that what stands there is no value.
"""

import json
import math
import re
import sys
from typing import Any

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z_]+")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}
_SCANNED = re.compile(r'[^"{}\[\]]+|[{}\[\]]|"(?:[^"\\]|\\.)*"', re.DOTALL)
DEPTH = 100  # values may lie in one another this deep


class Partial(Exception):
    """The text so far may be the beginning of what is read."""


def white(text: str, at: int) -> int:
    """The place behind the white space at ``at``."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def literal(text: str, at: int, written: str) -> int:
    """The place behind ``written`` at ``at``, where white space in it stands for any or none.

    Raises:
        Partial, ValueError: see above.
    """
    for part in re.findall(r"\s+|\S", written):
        if part.isspace():
            at = white(text, at)
            continue
        if at >= len(text):
            raise Partial
        if text[at] != part:
            raise ValueError
        at += 1
    return at


def json_end(text: str, at: int) -> int:
    """The place behind the JSON object or list that begins at ``at``; it may still be wrong inside.

    Raises:
        Partial, ValueError: see above.
    """
    if at >= len(text):
        raise Partial
    if text[at] not in "{[":
        raise ValueError
    depth = 0
    while found := _SCANNED.match(text, at):
        at = found.end()
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found.group(), 0)
        if depth > DEPTH:
            raise ValueError
        if not depth:
            return at
    raise Partial


def json_value(text: str) -> Any:
    """A JSON value; NaN, infinities and numbers beyond a double are none.

    Raises:
        ValueError: it is no JSON.
    """

    def refuse(name: str) -> Any:
        raise ValueError(name)

    def finite(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else refuse(digits)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def value_at(text: str, at: int, quotes: tuple[str, ...] = ('"', "'"), depth: int = 0) -> tuple[Any, int]:
    """The value at ``at`` and the place behind it: JSON, Python's literals, keys without quotes, strings in ``quotes``.

    Raises:
        Partial, ValueError: see above.
    """
    at = white(text, at)
    if at >= len(text):
        raise Partial
    if depth > DEPTH:
        raise ValueError
    for quote in quotes:
        if text.startswith(quote, at):
            return _string(text, at + len(quote), quote)
        if quote.startswith(text[at:]):
            raise Partial
    if text[at] in "[(":
        return _items(text, at + 1, quotes, depth, "]" if text[at] == "[" else ")")
    if text[at] == "{":
        return _object(text, at + 1, quotes, depth)
    found = _NUMBER.match(text, at) or _WORD.match(text, at)
    if found is None and text[at] != "-":
        raise ValueError
    if found is None or found.end() == len(text):
        raise Partial
    if found.re is _NUMBER:
        if text[found.end()] in ".eE" and len(text) < found.end() + 3:
            raise Partial
        return json_value(found.group()), found.end()
    if found.group() not in _WORDS:
        raise ValueError
    return _WORDS[found.group()], found.end()


def _string(text: str, at: int, quote: str) -> tuple[str, int]:
    """The string up to ``quote``; a quote of several characters is a mark, inside which nothing is escaped."""
    if len(quote) > 1:
        stop = text.find(quote, at)
        if stop < 0:
            raise Partial
        return text[at:stop], stop + len(quote)
    made = []
    while at < len(text):
        stop = next((n for n in range(at, len(text)) if text[n] in (quote, "\\")), len(text))
        made.append(text[at:stop])
        if stop == len(text):
            break
        if text[stop] == quote:
            whole = "".join(made).encode("utf-16", "surrogatepass")  # joins the halves of \\uXXXX\\uXXXX
            return whole.decode("utf-16", "replace"), stop + 1
        kind = text[stop + 1 : stop + 2]
        if not kind:
            break
        size = _CODES.get(kind, 0)
        digits = text[stop + 2 : stop + 2 + size]
        if len(digits) < size:
            break
        code = int(digits, 16) if size else 0
        if code > sys.maxunicode:
            raise ValueError
        made.append(chr(code) if size else _ESCAPES.get(kind, kind))
        at = stop + 2 + size
    raise Partial


def _items(text: str, at: int, quotes: tuple[str, ...], depth: int, close: str) -> tuple[list[Any], int]:
    made: list[Any] = []
    while True:
        at = white(text, at)
        if at >= len(text):
            raise Partial
        if text[at] == close:
            return made, at + 1
        value, at = value_at(text, at, quotes, depth + 1)
        made.append(value)
        at = _comma(text, at, close)


def _comma(text: str, at: int, close: str) -> int:
    """Behind the comma, or at what closes."""
    at = white(text, at)
    if at >= len(text):
        raise Partial
    if text[at] != "," and text[at] != close:
        raise ValueError
    return at + (text[at] == ",")


def _object(text: str, at: int, quotes: tuple[str, ...], depth: int) -> tuple[dict[str, Any], int]:
    made: dict[str, Any] = {}
    while True:
        at = white(text, at)
        if at >= len(text):
            raise Partial
        if text[at] == "}":
            return made, at + 1
        key, at = _key(text, at, quotes)
        at = white(text, at)
        if at >= len(text):
            raise Partial
        if text[at] != ":":
            raise ValueError
        made[key], at = value_at(text, at + 1, quotes, depth + 1)
        at = _comma(text, at, "}")


def _key(text: str, at: int, quotes: tuple[str, ...]) -> tuple[str, int]:
    for quote in quotes:
        if text.startswith(quote, at):
            return _string(text, at + len(quote), quote)
        if quote.startswith(text[at:]):
            raise Partial
    found = re.compile(r"[^\s:{}\[\],]+").match(text, at)
    if found is None:
        raise ValueError
    if found.end() == len(text):
        raise Partial
    return found.group(), found.end()


def matched(text: str, at: int, pattern: re.Pattern[str]) -> tuple[str, int]:
    """What the pattern matches at ``at``, and the place behind it.

    Raises:
        Partial, ValueError: see above.
    """
    found = pattern.match(text, at)
    if at >= len(text) or (found and found.end() == len(text)):
        raise Partial
    if not found:
        raise ValueError
    return found.group(), found.end()
