"""Types of a request's fields: strict (no "5" for 5, no true for 1), finite, and null is as if it were not there."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

STOPS, STOP_SIZE = 16, 1024  # stop strings of a request; characters of one
CHOICES = 16  # of a prompt
TOP = 20  # likeliest tokens that a place may name
SEEDS = (-(2**63), 2**64 - 1)
NAME = r"^[a-zA-Z0-9_.:-]{1,64}$"


class Body(BaseModel):
    """An object of a request; keys that it does not know are kept in ``model_extra``."""

    model_config = ConfigDict(strict=True, extra="allow", populate_by_name=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


def wrong(expected: str, param: str = "") -> PydanticCustomError:
    """What a validator raises; ``param``: the field of the object, where the object is what is validated."""
    return PydanticCustomError("expected", "expected {what}", {"what": expected, "param": param})


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_whole(value: object) -> bool:
    """Whether it is a whole number; True is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _stops(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if isinstance(found, list) and any(is_whole(each) for each in found):
        raise wrong("texts: a stop is compared with the text that is written, not with token ids")
    if not isinstance(found, list) or not all(isinstance(each, str) and 0 < len(each) <= STOP_SIZE for each in found):
        raise wrong(f"a text, or a list of texts, of 1 to {STOP_SIZE} characters each")
    if len(found) > STOPS:
        raise wrong(f"at most {STOPS} texts, found {len(found)}")
    return found


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise wrong('an object, such as {"50256": -100}')
    made = {}
    for key, one in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10):
            raise wrong('token ids as keys, such as {"50256": -100}')
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not -100 <= one <= 100:
            raise wrong(f"numbers from -100 to 100; found {str(one)[:40]} at {key}")
        made[int(key)] = float(one)
    return made


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, a list of ids, or a list of either, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        value = [_whole(each) for each in value]
        if all(map(is_whole, value)):
            return [_ids(value)]
        if all(isinstance(each, str) for each in value):
            return value
        if all(isinstance(each, list) and each for each in value):
            return [_ids([_whole(one) for one in each]) for each in value]
    raise wrong("a text, a list of texts, a list of token ids, or a list of such lists, none of them empty")


def _ids(value: list[Any]) -> list[int]:
    if not all(is_whole(each) and 0 <= each < 2**31 for each in value):
        raise wrong("token ids, which are whole numbers from 0")
    return value


_TEXT = {"type": "string", "minLength": 1, "maxLength": STOP_SIZE}
ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_IDS = {"type": "array", "items": ID, "minItems": 1}
_NULL = {"type": "null"}

Whole = BeforeValidator(_whole)
Float = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": STOPS}]}),
]
Bias = Annotated[
    dict[int, float],
    BeforeValidator(_bias),
    WithJsonSchema(
        {
            "type": "object",
            "patternProperties": {"^[0-9]{1,9}$": {"type": "number", "minimum": -100, "maximum": 100}},
            "additionalProperties": False,
        }
    ),
]
Prompts = Annotated[
    list[Any],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _IDS,
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]
Ids = Annotated[
    list[int],
    BeforeValidator(lambda value: _ids([_whole(one) for one in value] if isinstance(value, list) else [None])),
    WithJsonSchema({"type": "array", "items": ID}),
]
