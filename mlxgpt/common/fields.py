"""A setting with its help text, and the checks of settings that name what they found."""

import dataclasses
from typing import Any

from mlxgpt.common.errors import UserError


def field(default: Any, help: str) -> Any:
    """A field of a section; ``help`` is its line in the table of keys."""
    return dataclasses.field(default=default, metadata={"help": help})


def check(section: str, ok: bool, what: str, found: object, expected: str) -> None:
    """Refuses a setting that is not ``ok``.

    Raises:
        UserError: ``section.what = found: expected ...``.
    """
    if not ok:
        raise UserError(f"{section}.{what} = {found!r}: expected {expected}")


def one_of(section: str, config: Any, name: str, *allowed: str) -> None:
    """Refuses a setting that has none of the values that it may have."""
    check(section, getattr(config, name) in allowed, name, getattr(config, name), "one of " + ", ".join(allowed))
