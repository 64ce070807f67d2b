"""The files of fine-tuning data, and the values of their rows.

A folder is mlx-lm's: train.jsonl, and valid.jsonl and test.jsonl where they exist. Every message names file and row;
rows of .csv, .tsv, .json, .parquet and .arrow count from 1 without a header.
"""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlxgpt.common.data.corpus import decoded, parse_json
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows import arrow
from mlxgpt.common.rows.arrow import without_nulls
from mlxgpt.common.rows.values import shown

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SPLITS = ("train", "valid", "test")
csv.field_size_limit(1 << 30)


def find_files(path: Path) -> dict[str, Path]:
    """Split -> file, or the folder of a split that datasets wrote."""
    if path.is_dir() and arrow.is_dataset(path):
        return arrow.dataset_splits(path)
    if path.is_dir():
        for name in ("train.jsonl", "train.json", "train.csv", "train.tsv", "train.parquet"):
            if (path / name).is_file():
                suffix = Path(name).suffix
                others = {split: path / f"{split}{suffix}" for split in SPLITS}
                return {split: file for split, file in others.items() if file.is_file()}
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise UserError(f"{path}: found {found}: expected train.jsonl, and optionally valid.jsonl and test.jsonl")
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder: expected data to fine-tune on")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: unknown format {path.suffix or 'without a suffix'}: expected {' '.join(SUFFIXES)}")
    return {"train": path}


def read_values(path: Path, drop_nulls: str = "auto") -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and row, its keys and values) of one file, or of a folder that datasets wrote.

    Keys whose value is null are left out, at any depth, where ``drop_nulls`` is true, or auto and the file is Arrow's:
    there every row has every key, and null says that it had none.
    """
    suffix = ".arrow" if path.is_dir() else path.suffix.lower()
    read = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow}
    drop = drop_nulls == "true" or (drop_nulls == "auto" and suffix in (".parquet", ".arrow"))
    for number, value in read.get(suffix, _read_table)(path):
        where = f"{path} row {number}"
        value = without_nulls(value) if drop else value
        if not isinstance(value, dict):
            raise UserError(f"{where}: {shown(value)}: expected an object with keys")
        if not value:
            raise UserError(f"{where}: empty: expected keys and values")
        yield where, value


def _text(path: Path) -> str:
    text, _ = decoded(path.read_bytes(), 0, str(path), final=True)
    return text.removeprefix("\ufeff")


def read_lines(path: Path) -> list[str]:
    """The lines of a text: newlines alone end one, as in Python's files; U+2028, U+0085 and form feeds do not."""
    return [line.removesuffix("\n") for line in io.StringIO(_text(path), newline=None)]


def _read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_text(path).rstrip(" \t\r\n").split("\n") if path.stat().st_size else [], 1):
        if not line.strip():
            raise UserError(f"{path} row {number}: an empty line: expected a JSON object")
        yield number, parse_json(line, f"{path} row {number}")


def _read_json(path: Path) -> Iterator[tuple[int, object]]:
    value = parse_json(_text(path), str(path))
    if not isinstance(value, list):
        raise UserError(f"{path}: {shown(value)}: expected a list of objects")
    yield from enumerate(value, 1)


def _read_table(path: Path) -> Iterator[tuple[int, object]]:
    """Rows as Python's csv and pandas read them: newlines alone end one, outside of quotes; blank lines are none."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    number, names = 0, None
    try:
        for fields in reader:
            if not fields or (len(fields) == 1 and not fields[0].strip() and len(names or fields) > 1):
                continue
            if names is None:
                names = _names(fields, path)
                continue
            number += 1
            yield number, dict(zip(names, _fitted(fields, names, f"{path} row {number}"), strict=True))
    except csv.Error as error:
        raise UserError(f"{path} row {number + 1}: not {path.suffix[1:]}: {error}") from None


def _names(fields: list[str], path: Path) -> list[str]:
    """The names of the columns; one without a name gets pandas' ``Unnamed: 2``."""
    names = [name or f"Unnamed: {place}" for place, name in enumerate(fields)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: duplicate column names: {', '.join(twice[:8])}")
    return names


def _fitted(fields: list[str], names: list[str], where: str) -> list[str]:
    """A row's fields, one a column: delimiters at the end of a line add none, and a column without a name may lack."""
    found, fields = len(fields), list(fields)
    while len(fields) > len(names) and not fields[-1]:
        fields.pop()
    while len(fields) < len(names) and names[len(fields)] == f"Unnamed: {len(fields)}":
        fields.append("")
    if len(fields) != len(names):
        raise UserError(f"{where}: {found} columns: expected {len(names)} as in the header")
    return fields


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    yield from enumerate(arrow.read_parquet(path), 1)


def _read_arrow(path: Path) -> Iterator[tuple[int, object]]:
    yield from enumerate((row for file in arrow.files_of(path) for row in arrow.read_arrow(file)), 1)


def digests(files: Iterable[Path]) -> dict[str, str]:
    """sha256 of each file by its name; of a split that datasets wrote, by its folder's and the file's."""
    found = {}
    for place in files:
        for file in arrow.files_of(place):
            name = f"{place.name}/{file.name}" if place.is_dir() else file.name
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found
