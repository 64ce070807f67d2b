"""Rows of Arrow files: .arrow, and the folders that Hugging Face datasets writes with save_to_disk.

Such a folder holds state.json, which names its files in order; a folder of several splits holds dataset_dict.json and
a folder for each. Nothing of datasets is needed to read them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxgpt.common.data.corpus import open_parquet
from mlxgpt.common.errors import UserError

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_NAMES = {"train": ("train",), "valid": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}


def is_dataset(folder: Path) -> bool:
    """Whether datasets wrote the folder."""
    return is_split(folder) or (folder / _SPLITS).is_file()


def is_split(folder: Path) -> bool:
    """Whether datasets wrote the folder, of one split."""
    return (folder / _STATE).is_file()


def dataset_splits(folder: Path) -> dict[str, Path]:
    """Split -> its folder.

    Raises:
        UserError: there is no training split.
    """
    if is_split(folder):
        return {"train": folder}
    names = _json(folder / _SPLITS).get("splits", [])
    found = {split: next((name for name in known if name in names), None) for split, known in _NAMES.items()}
    if not found["train"]:
        raise UserError(f"{folder}: splits {', '.join(map(str, names)) or 'none'}: expected one called train")
    return {split: folder / name for split, name in found.items() if name}


def files_of(place: Path) -> list[Path]:
    """The files of a split, in order: a file itself, or those of a folder that datasets wrote."""
    if not place.is_dir():
        return [place]
    named = [entry.get("filename") for entry in _json(place / _STATE).get("_data_files", [])]
    if not named:
        raise UserError(f"{place / _STATE}: no _data_files: expected what datasets' save_to_disk writes")
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or not (place / name).is_file():
            raise UserError(f"{place / _STATE}: {name}: no such file in {place}")
    return [place / str(name) for name in named]


def read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow file, of the streaming or of the random access kind."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: reading .arrow needs pyarrow: pip install 'mlxgpt[parquet]'") from None
    try:
        with pyarrow.memory_map(str(path)) as source:
            whole = source.size() >= 6 and source.read(6) == b"ARROW1"
            source.seek(0)
            opened = pyarrow.ipc.open_file(source) if whole else pyarrow.ipc.open_stream(source)
            batches = (opened.get_batch(n) for n in range(opened.num_record_batches)) if whole else opened
            for batch in batches:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not an Arrow file that can be read: {' '.join(str(error).split())[:120]}") from None


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file."""
    with open_parquet(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def without_nulls(value: Any) -> Any:
    """``value`` without the keys whose value is null, at any depth: Arrow gives every object every key."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, as datasets' save_to_disk writes it")
    return value
