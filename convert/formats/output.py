"""Where a result is made and how it gets its name: beside it, by one process at a time, and at once or not at all.

The disk is waited for only where something is replaced: the source of a new result is still there, as it is for cp.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.common import files
from mlxgpt.common.errors import UserError


@contextlib.contextmanager
def workplace(dst: Path, force: bool) -> Iterator[Path]:
    """The path to make ``dst`` at: in a hidden folder beside it, which is gone afterwards, also what a kill left there.

    Raises:
        UserError: another process is making it, or it is there and there is no ``force``.
    """
    place = dst.with_name(f".{dst.name}.partial")
    place.mkdir(exist_ok=True)
    lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{dst}: another process is converting to it ({place})") from None
    try:
        for left in place.iterdir():
            files.remove(left)
        _restore(dst)
        check_free(dst, force)
        yield place / dst.name
    finally:
        files.remove(place)
        os.close(lock)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file of a result in the making, which nobody reads before it has its name."""
    path.write_bytes(files.json_bytes(values))


def _restore(dst: Path) -> None:
    """Puts back what a replacement had set aside that was killed between its two renames."""
    old = files.aside(dst)
    if not os.path.lexists(dst) and os.path.lexists(old):
        os.rename(old, dst)
    files.remove(old)


def check_free(dst: Path, force: bool) -> None:
    """Refuses a path where something is, unless ``force`` is set.

    Raises:
        UserError: a file or folder is there without ``force``; or a device, pipe or socket is.
    """
    if dst.exists() and not (dst.is_file() or dst.is_dir()):
        raise UserError(f"{dst}: is neither a file nor a folder: nothing can take its place")
    if not force and os.path.lexists(dst):
        raise UserError(f"{dst}: is there already; --force replaces it")


def put(made: Path, dst: Path, force: bool) -> None:
    """Gives the complete result its name; what it replaces is removed once the result is on disk.

    Raises:
        UserError: something is there by now, and ``force`` is not set.
    """
    check_free(dst, force)
    if not os.path.lexists(dst):
        os.rename(made, dst)
        return
    for item in made.rglob("*") if made.is_dir() else ():
        files.sync(item)
    files.put(made, dst)
