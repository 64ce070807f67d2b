"""The rows of a task's data files, with the types that the datasets library gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxgpt.common.data.corpus import parse_json
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.files import read_lines, read_values

_SUFFIXES = {"json": (".jsonl", ".json"), "csv": (".csv",), "parquet": (".parquet",), "arrow": (".arrow",)}
# what pandas takes for nothing in a table
_NOTHING = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip

Row = tuple[str, dict[str, Any]]
"""(file and row, every column and its value)"""


class Data:
    """The files of each split that ``dataset_path`` and ``dataset_kwargs`` name."""

    def __init__(self, path: Path, values: dict[str, Any]):
        builder, given = values.get("dataset_path"), values.get("dataset_kwargs", {})
        if not isinstance(given, dict):
            raise UserError(f"{path}: dataset_kwargs = {given!r}: expected data_files, with files on disk")
        kwargs = dict(given)
        if builder not in _SUFFIXES:
            raise UserError(f"{path}: dataset_path = {builder!r}: expected {', '.join(_SUFFIXES)}, with files on disk")
        files = kwargs.pop("data_files", None)
        kwargs.pop("trust_remote_code", None)  # there is no such code beside files
        if kwargs:
            raise UserError(f"{path}: dataset_kwargs.{next(iter(kwargs))}: not supported: expected data_files alone")
        files = files if isinstance(files, dict) else {"train": files}
        self._path, self._suffixes, self._files = path, _SUFFIXES[builder], files

    def rows(self, key: str, split: str) -> list[Row]:
        """The rows of the split that ``key`` names.

        Raises:
            UserError: there is no such split or file, or it is empty.
        """
        if split not in self._files:
            found = ", ".join(map(str, self._files))
            raise UserError(f"{self._path}: {key} = {split!r}: dataset_kwargs.data_files has {found}")
        named = self._files[split]
        found = [file for name in (named if isinstance(named, list) else [named]) for file in self._found(name)]
        made = [row for file in found for row in self._read(file)]
        if not made:
            files = ", ".join(map(str, found)) or f"{self._path}: dataset_kwargs.data_files.{split}"
            raise UserError(f"{files}: empty: expected the rows of {split}")
        names = list(dict.fromkeys(name for _, row in made for name in row))
        columns = {name: [row.get(name) for _, row in made] for name in names}
        columns = {name: _numbers(column) for name, column in columns.items()}
        return [(where, {name: columns[name][at] for name in names}) for at, (where, _) in enumerate(made)]

    def _found(self, name: Any) -> list[Path]:
        """The files of a name or a pattern, in the working directory or else beside the YAML."""
        if not isinstance(name, str) or not name.isprintable() or "://" in name:
            raise UserError(f"{self._path}: dataset_kwargs.data_files: {name!r}: expected files on disk")
        for place in (Path(), self._path.parent):
            file = place / Path(name).expanduser()
            pattern = any(letter in name for letter in "*?[") and not file.exists()
            found = sorted(place.glob(name)) if pattern and not Path(name).is_absolute() else [file]
            if found and all(each.is_file() for each in found):
                return found
        raise UserError(f"{self._path}: dataset_kwargs.data_files: {name}: no such file")

    def _read(self, file: Path) -> list[Row]:
        if file.suffix.lower() not in self._suffixes:
            raise UserError(f"{file}: expected {' or '.join(self._suffixes)}, as dataset_path says")
        if file.suffix.lower() == ".json" and not (lines := read_lines(file))[0].lstrip().startswith("["):
            return [_object(line, f"{file} row {number}") for number, line in enumerate(lines, 1) if line.strip()]
        made = list(read_values(file, drop_nulls="false"))
        if file.suffix.lower() != ".csv":
            return made
        columns = {name: _typed([row[name] for _, row in made]) for name in (made[0][1] if made else ())}
        return [(where, {name: column[at] for name, column in columns.items()}) for at, (where, _) in enumerate(made)]


def _object(line: str, where: str) -> Row:
    value = parse_json(line, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: {line[:40]!r}: expected an object with keys")
    return where, value


def _numbers(column: list[Any]) -> list[Any]:
    """A column as Arrow has it: of one type, so with whole numbers as floats where there are others."""
    if any(isinstance(value, float) for value in column) and all(type(value) in (int, float) for value in column):
        return [float(value) for value in column]
    return column


def _typed(cells: list[str]) -> list[Any]:
    """A column of a table as pandas has it: numbers and truth values where all cells are; empty cells are null."""
    known = [None if cell in _NOTHING else cell for cell in cells]
    filled = [cell for cell in known if cell is not None]
    truths = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
    kinds = (_number(int), _number(float)) if len(filled) == len(known) else (_number(float),)
    if filled and all(cell in truths for cell in filled) and len(filled) == len(known):
        return [truths[cell] for cell in cells]
    for kind in kinds:
        try:
            return [None if cell is None else kind(cell) for cell in known] if filled else known
        except ValueError:
            pass
    return known


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(cell: str) -> Any:
        if "_" in cell or not cell.isascii():  # Python's, not a table's
            raise ValueError
        return kind(cell)

    return read
