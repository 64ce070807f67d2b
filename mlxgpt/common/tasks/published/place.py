"""Where the files of a published task lie: as they were published, or as the Hugging Face hub has them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.files import read_values
from mlxgpt.common.rows.values import shown, unicode, value_at

Row = tuple[str, dict[str, Any]]
"""(file and row, its keys and values)"""


def hub(split: str, subset: str = "") -> list[str]:
    """What a split's files are called on the hub and as datasets writes them, those in the subset's folder first."""
    names = [f"{split}-*.parquet", f"{split}.parquet", f"{split}.jsonl"]
    return [f"{subset}/{name}" for name in names if subset] + names


def files(task: str, place: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of the first pattern that any file below ``place`` has, several only if they are parts of one.

    Raises:
        UserError: there is none, or files in several folders.
    """
    found = {pattern: sorted(file for file in place.glob(f"**/{pattern}") if file.is_file()) for pattern in patterns}
    pattern = next(filter(found.get, patterns), None)
    if pattern is None:
        raise UserError(f"--task {task}: {place}: no {patterns[0]}: expected it, or {', '.join(patterns[1:])}")
    chosen = found[pattern]
    if len({file.parent for file in chosen}) > 1:
        names = ", ".join(str(file.relative_to(place)) for file in chosen[:4])
        raise UserError(f"--task {task}: {place}: {len(chosen)} files may be meant ({names}): expected --data FILE")
    return chosen


def home(task: str, data: Path) -> Path:
    """The folder to look in: that of ``data``, if it is a file; its folder named after the task, if it has one."""
    if data.is_file():
        return data.parent
    if not data.is_dir():
        raise UserError(f"--data {data}: no such file or folder: expected the files of --task {task}")
    return data / task if (data / task).is_dir() else data


def rows(task: str, data: Path, patterns: Sequence[str], given: bool = True) -> list[Row]:
    """The rows of a split: of ``data`` itself, if it is a file and is ``given`` as this split's.

    Raises:
        UserError: no file of the split, or one without rows.
    """
    found = [data] if given and data.is_file() else files(task, home(task, data), patterns)
    made = read(found)
    if not made:
        raise UserError(f"{found[0]}: empty: expected the rows of {task}")
    return made


def read(found: Sequence[Path]) -> list[Row]:
    """The rows of files, one after another."""
    return [row for file in found for row in read_values(file)]


def index_at(row: dict[str, Any], key: str, where: str, count: int, first: int = 0) -> int:
    """The place from 0 that a number, or its text, names from ``first``.

    Raises:
        UserError: it names none of ``count``.
    """
    value = value_at(row, key, where)
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or not first <= number < first + count:
        raise UserError(f"{where}: {key} is {shown(value)}: expected {first} to {first + count - 1}")
    return number - first


def strings_at(row: dict[str, Any], key: str, where: str, least: int = 2) -> Iterator[str]:
    """The texts of a list, none empty."""
    values = value_at(row, key, where)
    if not isinstance(values, list) or len(values) < least:
        raise UserError(f"{where}: {key} is {shown(values)}: expected a list of at least {least} texts")
    for number, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {key}: number {number} is {shown(value)}: expected text")
        yield unicode(value, f"{where}: {key}: number {number}")
