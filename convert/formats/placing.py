"""Where a result is made and how it gets its name: beside it, by one process at a time, and at once or not at all.

The disk is waited for only where something is replaced: the source of a new result is still there, as it is for cp.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
            remove(left)
        _restore(dst)
        check(dst, force)
        yield place / dst.name
    finally:
        remove(place)
        os.close(lock)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A file of a result in the making, which nobody reads before it is complete and has its name."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _aside(dst: Path) -> Path:
    """Where what is replaced waits until the new one has its name."""
    return dst.with_name(f".{dst.name}.old")


def _restore(dst: Path) -> None:
    """Puts back what a replacement had set aside that was killed between its two renames."""
    old = _aside(dst)
    if not os.path.lexists(dst) and os.path.lexists(old):
        os.rename(old, dst)
    remove(old)


def check(dst: Path, force: bool) -> None:
    """Refuses a path where something is, without ``force``; a device, pipe or socket always."""
    if dst.exists() and not (dst.is_file() or dst.is_dir()):
        raise UserError(f"{dst}: is neither a file nor a folder: nothing can take its place")
    if not force and os.path.lexists(dst):
        raise UserError(f"{dst}: is there already; --force replaces it")


def put(made: Path, dst: Path, force: bool) -> None:
    """Gives the complete result its name; what it replaces goes once that is on the disk.

    Raises:
        UserError: something is there by now, and there is no ``force``.
    """
    check(dst, force)
    if not os.path.lexists(dst):
        os.rename(made, dst)
        return
    for item in [*(made.rglob("*") if made.is_dir() else ()), made]:
        _sync(item)
    old = _aside(dst)
    if made.is_dir() or (dst.is_dir() and not dst.is_symlink()):
        os.rename(dst, old)  # a folder cannot be replaced in one go
    os.replace(made, dst)
    _sync(dst.parent)
    remove(old)


def _sync(place: Path) -> None:
    """A file's bytes, or a folder's list of names, onto the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(place: Path) -> None:
    """Whatever is there, without following a link."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
