"""The values of a row, each of the type that is expected, or an error that names file, row and key."""

from typing import Any

from mlxgpt.common.data.corpus import parse_json
from mlxgpt.common.errors import UserError, nearest


def value_at(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        found = ", ".join(map(repr, list(row)[:8]))
        raise UserError(f"{where}: no key {key!r}{nearest(key, row)}: found {found}")
    return row[key]


def string_at(row: dict[str, Any], key: str, where: str, empty: bool = False) -> str:
    """The text at ``key``, which holds more than white space unless ``empty``."""
    value = value_at(row, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {shown(value)}: expected a string")
    if not empty and not value.strip():
        raise UserError(f"{where}: {key} is empty: expected text")
    return unicode(value, f"{where}: {key}")


def unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise UserError(f"{where}: {found!r} at character {error.start}: half of a surrogate pair") from None
    return text


def shown(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def list_at(row: dict[str, Any], key: str, where: str) -> list[Any]:
    value = value_at(row, key, where)
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a table
        value = parse_json(value, f"{where}: {key}")
    if not isinstance(value, list):
        raise UserError(f"{where}: {key} is {shown(value)}: expected a list of messages")
    if not value:
        raise UserError(f"{where}: {key} is empty: expected messages")
    return value
