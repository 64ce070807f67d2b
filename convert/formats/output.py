"""Results are written beside their destination, by one process at a time, and renamed into place when complete.

Files are flushed to disk only if they replace something; otherwise the source is still there, as after cp.
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
    """The path to write ``dst`` at, in a hidden folder beside it that is removed afterwards, with what a kill left.

    Raises:
        UserError: another process is writing it, or it exists and ``force`` is not set.
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
    """Restores what was set aside by a replacement that was killed between its two renames."""
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
        raise UserError(f"{dst}: exists; --force replaces it")


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
