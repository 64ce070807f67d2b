"""What a task's YAML makes of a row: columns and jinja, rendered as lm-evaluation-harness does, but sandboxed."""

import ast
import functools
import re
from collections.abc import Collection
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxgpt.common.errors import UserError

_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip


def _shown(value: Any) -> Any:
    if value is None:
        raise ValueError("a value that is null would be written as None")
    return value


@functools.cache
def _environment() -> jinja2.Environment:
    made = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_shown)
    made.filters["regex_replace"] = _replaced
    return made


def _replaced(text: str, pattern: str, by: str, count: int = 0) -> str:
    return re.sub(pattern, by, text, count=count)


@functools.lru_cache(64)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def rendered(key: str, source: str, row: dict[str, Any], where: str) -> str:
    """A template with a row's values.

    Raises:
        UserError: not jinja, a column that the row has not, or what else goes wrong in the template.
    """
    try:
        return _compiled(source).render(**row)
    except _ERRORS as error:
        raise UserError(f"{where}: {key}: {' '.join(str(error).split())[:160]}") from None


def field(key: str, source: Any, row: dict[str, Any], where: str, columns: Collection[str], numbers: bool) -> Any:
    """What doc_to_text or doc_to_target is for a row: a number or a list, a column's value, or a template's text.

    A text of digits is a number if ``numbers``, and one in brackets a list, for doc_to_target.
    """
    if not isinstance(source, str):
        return source
    if source in columns:
        return row.get(source)
    text = rendered(key, source, row, where)
    if numbers and text.isdecimal():
        return int(text)
    if key == "doc_to_target" and text[:1] == "[" and text[-1:] == "]":
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text
    return text


def choices(source: Any, row: dict[str, Any], where: str, columns: Collection[str]) -> Any:
    """What doc_to_choice is for a row: a list, the values of an object, a column's value, or the list that a text is.

    Raises:
        UserError: a text that is no list.
    """
    if isinstance(source, dict):
        return list(source.values())
    if not isinstance(source, str):
        return source
    if source in columns:
        return row.get(source)
    text = rendered("doc_to_choice", source, row, where)
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise UserError(f"{where}: doc_to_choice: {text[:60]!r}: expected a list of texts") from None
