"""Files and folders that appear under their name complete and on disk, or not at all; and JSON files."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlxgpt.common.errors import UserError

# how a file system, such as one over a network, says that it has no F_FULLFSYNC
_LACKING = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}


def flush(descriptor: int) -> None:
    """Returns when the bytes are on the disk. macOS' fsync leaves them in the drive's cache, its F_FULLFSYNC does not.

    Raises:
        OSError: the system refuses.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:
            if error.errno not in _LACKING:
                raise
    os.fsync(descriptor)


def sync(place: Path) -> None:
    """Returns when a file's bytes, or a folder's list of names, are on disk.

    Raises:
        OSError: the system refuses.
    """
    descriptor = os.open(place, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def aside(final: Path) -> Path:
    """Where a folder waits that is being replaced; after a crash it may be the only complete one."""
    return final.with_name(f".{final.name}.old")


def put(made: Path, final: Path, replace: bool = True) -> None:
    """Flushes ``made`` and renames it to ``final``; what it replaces is removed once the new name is on disk.

    Of a folder only its list of names is flushed: the caller flushes what is in it. Without ``replace`` a folder at
    ``final`` that is not empty is an error.

    Raises:
        OSError: the system refuses.
    """
    sync(made)
    if replace and os.path.lexists(final):
        old = aside(final)
        remove(old)
        if made.is_dir() or (final.is_dir() and not final.is_symlink()):
            os.rename(final, old)  # a folder cannot be replaced in one step
        os.replace(made, final)
        sync(final.parent)
        remove(old)
    else:
        os.rename(made, final)
        sync(final.parent)


def remove(place: Path) -> None:
    """Removes whatever is there, without following a link."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A hidden path beside ``path`` to write a file at, which gets its name when the block ends without an error.

    Raises:
        UserError: the system refuses to write, such as with no space left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file opened for writing that appears at ``path`` complete and on disk, or not at all.

    Raises:
        UserError: the system refuses to write, such as with no space left.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically.

    Raises:
        UserError: the system refuses to write.
    """
    with atomic_write(path) as file:
        file.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """``value`` as the indented JSON of all our files, in UTF-8."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def parse_json(text: str, unique: bool = False) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON; it has half a surrogate pair (an escape such as \\ud800), which no file can
            hold; or, with ``unique``, an object has a name twice.
        RecursionError: it is nested too deep.
    """
    value = json.loads(text, object_pairs_hook=_unique if unique else None)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, or holds anything but one JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value
