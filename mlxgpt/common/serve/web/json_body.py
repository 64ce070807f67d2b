"""A request's body as JSON, strictly: what two readers could understand differently is refused."""

import json
import math
import re
from typing import Any

from mlxgpt.common.serve.api.errors import ApiError

MAX_DEPTH = 100  # of lists and objects in each other; schemas of tools need about 10
MAX_DIGITS = 308  # of a whole number: what a float can hold
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(NaN|-?Infinity)', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


class _Wrong(Exception):
    """Valid JSON, or nearly, that is not taken."""


def parse(body: bytes) -> dict[str, Any]:
    """The object that a body is.

    Raises:
        ApiError: 400: not UTF-8, not JSON, a constant that JSON has not, half a surrogate pair, each with its position;
            a key twice, a number out of range, too deep, not an object.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        found = body[error.start : error.start + 1].hex()
        raise _refusal(f"the body is not UTF-8: byte 0x{found} at position {error.start}") from None
    if not text.strip(" \t\r\n"):
        raise _refusal("the body is empty: expected a JSON object")
    try:
        value = json.loads(
            text, parse_constant=_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno} (character {error.pos})"
        raise _refusal(f"the body is not valid JSON: {error.msg} at {place}") from None
    except _Wrong as error:
        raise _refusal(f"{error}{_where_constant(text) if 'JSON has no' in str(error) else ''}") from None
    except RecursionError:
        raise _too_deep() from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(value):
        raise _too_deep()
    if "\\u" in text and (at := _half_pair(text)) is not None:
        raise _refusal(f"the body is not valid Unicode: half a surrogate pair, {text[at : at + 6]}, at character {at}")
    if not isinstance(value, dict):
        raise _refusal(f"the body is {_KINDS[type(value)]}: expected a JSON object")
    return value


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def _refusal(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _too_deep() -> ApiError:
    return _refusal(f"the body has lists and objects more than {MAX_DEPTH} deep in each other")


def _constant(name: str) -> None:
    raise _Wrong(f"the body is not valid JSON: JSON has no {name}")


def _float(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise _Wrong(f"the number {_short(digits)} is out of range: expected at most 1.8e308")
    return number


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Wrong(f"the number {_short(digits)} has {len(digits)} digits: expected at most {MAX_DIGITS}")
    return int(digits)


def _short(digits: str) -> str:
    return digits if len(digits) <= 24 else f"{digits[:20]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Wrong(f"the body has the key {json.dumps(twice[:64])} twice in an object: expected it once")
    return made


def _where_constant(text: str) -> str:
    at = next((match.start(1) for match in _CONSTANT.finditer(text) if match[1]), None)
    return "" if at is None else f" (character {at})"


def _half_pair(text: str) -> int | None:
    """Where an escape stands for one half of a character alone."""
    high = -1  # where the first half ended, if the escape before was one
    start = 0
    for match in _ESCAPE.finditer(text):
        code = int(match[1], 16) if match[1] else 0
        if high >= 0 and not (0xDC00 <= code < 0xE000 and match.start() == high):
            return start
        if high < 0 and 0xDC00 <= code < 0xE000:
            return match.start()
        if high < 0 and 0xD800 <= code < 0xDC00:
            start, high = match.span()
        else:
            high = -1
    return start if high >= 0 else None


def _deeper(value: Any) -> bool:
    """Whether lists and objects lie in each other more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
