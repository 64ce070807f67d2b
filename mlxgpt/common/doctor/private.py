"""Keeps out of a report what names its owner: paths, the user, the machine."""

import contextlib
import getpass
import re
import socket
from pathlib import Path
from typing import Any

_PATH = re.compile(r"(?:[A-Za-z]:\\|~?/)[^\s'\"(),;:]*[/\\]([^\s'\"(),;:/\\]+)")


def names() -> list[str]:
    """The user's name and home, and the machine's name: what no line may hold. The longest first."""
    found = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    with contextlib.suppress(KeyError, OSError, RuntimeError):  # a user whom the system does not know
        found |= {getpass.getuser(), str(Path.home()), Path.home().name}
    return sorted((name for name in found if len(name) > 1), key=len, reverse=True)


def clean(value: Any, hidden: list[str] | None = None) -> Any:
    """A text, or every text in a list or table: a path as its file's name, names as ``...``; keys stay."""
    hidden = names() if hidden is None else hidden
    if isinstance(value, dict):
        return {key: clean(each, hidden) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [clean(each, hidden) for each in value]
    if not isinstance(value, str):
        return value
    text = _PATH.sub(lambda found: found[1] if "." in found[1] else "(path)", value)
    for name in hidden:
        text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", "...", text, flags=re.IGNORECASE)
    return text
