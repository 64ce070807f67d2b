"""Which files of a folder hold a model's weights, and an index that must be true of them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders.tensors import Entry, Stored, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
META = "params.json"  # beside weights of Meta's names
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")
T = TypeVar("T", bound=Stored)
# what trainers leave beside weights in files of torch.save
_NO_WEIGHTS = re.compile(r"(optimizer|scheduler|rng_state.*|training_args|scaler|random_states.*)\.(bin|pt|pth)")


def find_tensors(folder: Path | str) -> dict[str, Entry]:
    """Where every tensor of a model folder lies, by the name in its files; headers are checked, data is not read.

    Raises:
        UserError: no safetensors weights, a damaged file, an index that is not true or points outside the folder.
    """
    folder = Path(folder)
    if (folder / SINGLE).exists():
        entries = read_header(folder / SINGLE)[0]
        _check_single(folder, entries)
        return entries
    if not (folder / INDEX).exists():
        found = pickled(folder)
        if found:
            raise UserError(
                f"{folder}: found {found[0].name}, expected {SINGLE} or {INDEX}: mlxgpt convert {folder} NEW makes them"
            )
        raise UserError(f"{folder}: expected {SINGLE} or {INDEX}")
    return read_shards(folder, INDEX, lambda path: read_header(path)[0])


def pickled(folder: Path) -> list[Path]:
    """The files of weights in ``torch.save``'s format: those of transformers, else all that may be some."""
    for name in (PICKLED, PICKLED_INDEX):
        if (folder / name).is_file():
            return [folder / name]
    there = (path for end in ("bin", "pth", "pt") for path in folder.glob(f"*.{end}"))
    return sorted(path for path in there if path.is_file() and not _NO_WEIGHTS.fullmatch(path.name))


def read_shards(folder: Path, index: str, read: Callable[[Path], Mapping[str, T]]) -> dict[str, T]:
    """The tensors of all files that ``index`` names; ``read`` gives those of one file.

    Raises:
        UserError: the index is not true of the files, leaves one of them out, or points outside the folder.
    """
    weight_map = _weight_map(folder / index)
    shards: dict[str, Mapping[str, T]] = {}
    for file in sorted(set(weight_map.values())):
        if file in ("", ".", "..") or "/" in file or "\\" in file or not file.isprintable():
            raise UserError(f"{folder / index}: weight_map names {file!r}: expected a file in the same folder")
        shards[file] = read(folder / file)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise UserError(f"{folder / file}: {name} is missing, which {index} says is there")
    for file, entries in shards.items():
        for name in entries:
            if weight_map.get(name) != file:
                said = repr(weight_map.get(name, "nothing"))
                raise UserError(f"{folder / file}: {name} is there, but {index} says {said}")
    kinds = {match.groups() for match in map(_SHARD.fullmatch, shards) if match}
    for path in sorted(folder.iterdir()):
        match = _SHARD.fullmatch(path.name)
        if not match or match.groups() not in kinds or path.name in shards:
            continue
        for name in sorted(set(read(path)) - set(weight_map)):
            raise UserError(f"{path}: {name} is there, but {index} says 'nothing'")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{path}: weight_map: expected file names by tensor name")
    return weight_map


def _check_single(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Refuses an index of the one file that is not true of it; one of other files is older, and nobody reads it."""
    if not (folder / INDEX).is_file():
        return
    weight_map = _weight_map(folder / INDEX)
    if set(weight_map.values()) != {SINGLE}:
        return
    for name in sorted(weight_map.keys() ^ entries.keys()):
        if name in entries:
            raise UserError(f"{folder / SINGLE}: {name} is there, but {INDEX} says 'nothing'")
        raise UserError(f"{folder / SINGLE}: {name} is missing, which {INDEX} says is there")
