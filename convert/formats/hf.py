"""Hugging Face folders: config.json, safetensors, tokenizer files; also a checkpoint of ours with its moments."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats import output, stream
from convert.formats.opened import Moments, Opened, Options, Tensor
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import model_folder, quantized, weight_files
from mlxgpt.common.folders.tensors import DTYPES, Entry, Stored, read_header, read_tensor
from mlxgpt.common.model import families, params, text_part
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.tokenizers.protocol import FILES, TEMPLATES, write_files

KIND = "folder"
NO_MOMENTS = "AdamW's moments are left behind: --to hf, nanogpt and gptmodel have a place for them"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NARROW = ("float16", "bfloat16")
COMPANIONS = (*FILES, "generation_config.json", "README.md", "LICENSE", "LICENSE.txt")
_MAP = ("map.toml", "map.npz")  # which convert --map asks for by its path
# keys that writers set themselves, or that would no longer be true
_REWRITTEN = ("dtype", "torch_dtype", "mlxgpt", "quantization", "quantization_config", "auto_map")


def recognize(path: Path) -> bool:
    """A folder with a config.json."""
    return (path / "config.json").is_file()


def read(path: Path) -> Opened:
    """Whatever mlxgpt.common.folders.model_folder reads.

    Raises:
        UserError: see ``model_folder.read_config`` and ``model_folder.locate``.
    """
    values = model_folder.read_values(path)
    config, extra = read_values(quantized.plain_values(path, values), str(path / "config.json"))
    return open_folder(path, "hf", values, config, model_folder.read_entries(path, values, config), extra)


class _Watched(dict[str, Any]):
    """Remembers which keys were asked for."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def read_values(values: Mapping[str, Any], where: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The model that a config.json describes, and its other keys.

    Raises:
        UserError: see ``families.config_from_hf``.
    """
    watched = _Watched(values)
    config = families.config_from_hf(watched, where)
    silent = watched.read | set(families.config_to_hf(config)) | set(_REWRITTEN)
    return config, {key: value for key, value in values.items() if key not in silent}


def open_folder(
    path: Path,
    name: str,
    values: Mapping[str, Any],
    config: ModelConfig,
    entries: Mapping[str, Stored],
    extra: dict[str, Any],
    file: Path | None = None,
) -> Opened:
    """A folder's model, from its config.json and where its tensors lie, see ``model_folder.read_entries``.

    ``file`` is the one that is meant where the folder is only what stands beside it.

    Raises:
        UserError: see ``model_folder.locate``; or a bias that config.json calls zero is not.
    """
    place = file or path
    config = model_folder.settle(place, values, config, entries)
    located = model_folder.locate(place, config, entries)
    wanted = params.table(config)
    for ours, (foreign, entry, _) in located.items():
        if ours not in wanted and entry.read().any():
            raise UserError(f"{entry.path}: {foreign} is not zero, but config.json says so under mlxgpt")
    places = {ours: (located[ours][1], located[ours][2]) for ours in wanted}
    notes = [f"{path}: {values.note}"] if isinstance(values, text_part.TextPart) else []
    if "auto_map" in values:
        notes.append(f"{path / 'config.json'}: auto_map is left out: the model is of a class that needs none")
    fp8 = sum(isinstance(entry, quantized.Fp8) for entry, _ in places.values())
    if fp8:
        said = "are read as float32 code * scale, exactly; scales of activations, if any, are left out"
        notes.append(f"{place}: {fp8} matrices of fp8 {said}")
    made = Opened(
        path=place,
        format=name,
        config=config,
        tensors={ours: stored_tensor(entry, transposed) for ours, (entry, transposed) in places.items()},
        files=tuple(sorted({entry.path for entry, _ in places.values()})),
        companions=companions(path),
        extra=extra,
        moments=None if file else _moments(path, config),
        notes=notes,
    )
    made.notes += [] if file else left_in_folder(path, made)
    return made


def companions(path: Path) -> dict[str, Path | bytes]:
    """The files of a folder that are copied unchanged, by name."""
    found = [*(path / file for file in COMPANIONS), *sorted((path / TEMPLATES).glob("*.jinja"))]
    return {file.relative_to(path).as_posix(): file for file in found if file.is_file()}


def stored_tensor(entry: Stored, transposed: bool = False) -> Tensor:
    """The tensor that lies at ``entry``, as our layout or as [in, out]."""
    shape = entry.shape[::-1] if transposed else entry.shape

    def read() -> np.ndarray:
        array = entry.read()
        return array.T if transposed else array

    return Tensor(shape, DTYPES[entry.dtype], read, entry if isinstance(entry, Entry) else None, transposed)


def left_in_folder(path: Path, made: Opened) -> Iterator[str]:
    """A note of the folder's files that are not converted."""
    names = {"config.json", weight_files.META, weight_files.INDEX, weight_files.PICKLED_INDEX, "training", *_MAP}
    names |= {*(file.partition("/")[0] for file in made.companions), *(file.name for file in made.files)}
    others = sorted(item.name for item in path.iterdir() if item.name not in names and not item.name.startswith("."))
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        yield f"{path}: left behind: {shown}"


def _moments(path: Path, config: ModelConfig) -> Moments | None:
    """AdamW's state of a checkpoint of ours.

    Raises:
        UserError: its files are damaged, or not of this model.
    """
    if not (path / checkpoint.OPTIMIZER).is_file():
        return None
    entries, _ = read_header(path / checkpoint.OPTIMIZER)
    where = path / checkpoint.OPTIMIZER
    groups: dict[str, dict[str, Tensor]] = {"m": {}, "v": {}}
    clock = entries.pop("t", None)
    if clock is None or clock.dtype != "I64" or clock.shape:
        raise UserError(f"{where}: t: expected one I64, the number of updates")
    for group, made in groups.items():
        for name, param in params.table(config).items():
            entry = entries.pop(f"{group}.{name}", None)
            if entry is None or entry.shape != param.shape or entry.dtype != "F32":
                found = f"{entry.dtype} {list(entry.shape)}" if entry else "nothing"
                raise UserError(f"{where}: {group}.{name}: found {found}, expected F32 {list(param.shape)}")
            made[name] = stored_tensor(entry)
    if entries:
        raise UserError(f"{where}: unexpected tensor {min(entries)}")
    state = read_json(path / checkpoint.STATE) if (path / checkpoint.STATE).is_file() else {}
    step = state.get("step", 0)
    if type(step) is not int:
        raise UserError(f"{path / checkpoint.STATE}: step {step!r}: expected a whole number")
    return Moments(groups["m"], groups["v"], int(read_tensor(clock)), step, state or None)


def write(opened: Opened, place: Path, options: Options) -> list[str]:
    """A folder as ``model_folder.write_model`` makes it, with everything of the source that travels.

    Raises:
        UserError: the family cannot say the model, or a value is not finite or does not fit.
    """
    values = families.config_to_hf(opened.config)
    return mlx_lm_warning(opened.config) + write_folder(opened, place, options, plain_parts(opened, options), values)


def mlx_lm_warning(config: ModelConfig) -> list[str]:
    """One line that lists how mlx-lm computes this model differently; empty if it does not."""
    return ["; ".join(families.mlx_lm_deviations(config))] if families.mlx_lm_deviations(config) else []


def plain_parts(opened: Opened, options: Options) -> list[stream.Part]:
    """The tensors of the family's files, by their names and in their layout."""
    return [
        stream.plain(foreign, tensor, stored_dtype(tensor, options), transposed, options)
        for foreign, tensor, transposed in in_file(opened)
    ]


def in_file(opened: Opened) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether as [in, out]) of what the family's files hold; a bias that only they ask for is zeros."""
    shapes = {name: param.shape for name, param in params.table(families.on_disk(opened.config)).items()}
    for foreign, (name, transposed) in families.from_foreign(opened.config).items():
        yield foreign, opened.tensors.get(name) or _zeros(shapes[name], main_dtype(opened)), transposed


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    return Tensor(shape, dtype, lambda: np.zeros(shape, dtype))


def stored_dtype(tensor: Tensor, options: Options) -> np.dtype:
    """The dtype that a tensor is written as."""
    return model_folder.DTYPES[options.dtype] if options.dtype else tensor.dtype


def main_dtype(opened: Opened) -> np.dtype:
    """The dtype of most of the model's values."""
    sizes: dict[np.dtype, int] = {}
    for tensor in opened.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def write_folder(
    opened: Opened,
    place: Path,
    options: Options,
    parts: list[stream.Part],
    values: dict[str, Any],
    metadata: dict[str, str] | None = None,
    index: bool = False,
) -> list[str]:
    """Writes these parts, config.json with ``values``, companion files, and AdamW's moments if there are any.

    ``index``: model.safetensors.index.json also where there is one file only.
    """
    values = with_ids(opened, values, options)
    place.mkdir()
    write_parts(place, parts, metadata, index, options, params.count(families.on_disk(opened.config)))
    write_companions(opened, place, values)
    output.write_json(place / "config.json", values)
    if not opened.moments:
        return []
    if metadata is not None:
        return [NO_MOMENTS]
    write_moments(opened, place, options)
    return [f"training/ resumes from weights rounded to {options.dtype}"] if options.dtype in NARROW else []


def with_ids(opened: Opened, values: dict[str, Any], options: Options) -> dict[str, Any]:
    """config.json with the dtype, the token ids, and what else the source's said."""
    name = options.dtype or main_dtype(opened).name
    values |= {"dtype": name, "torch_dtype": name} | dict.fromkeys(_IDS) | opened.extra
    return values


def write_companions(opened: Opened, place: Path, values: Mapping[str, Any]) -> None:
    """The files that travel, and a generation_config.json where the source has none."""
    files = {name: one if isinstance(one, bytes) else one.read_bytes() for name, one in opened.companions.items()}
    write_files(place, files)
    if "generation_config.json" not in opened.companions:
        tokens = {key: values[key] for key in _IDS if values[key] is not None}
        output.write_json(place / "generation_config.json", {"_from_model_config": True} | tokens)


def write_parts(
    place: Path, parts: list[stream.Part], metadata: dict[str, str] | None, index: bool, options: Options, count: int
) -> None:
    """One file of weights, or shards and their index."""
    by_first = {next(iter(part.specs)): part for part in parts}
    files = model_folder.shards({name: part.size for name, part in by_first.items()}, options.max_shard)
    for file, names in files.items():
        # parts of several tensors are aligned in themselves and keep the next one aligned
        group = sorted((by_first[name] for name in names), key=_place)
        stream.write_safetensors(place, file, group, metadata, options)
    if len(files) == 1 and not index:
        return
    weight_map = {name: file for file, names in files.items() for first in names for name in by_first[first].specs}
    total = {"total_parameters": count, "total_size": sum(part.size for part in parts)}
    output.write_json(place / model_folder.INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def _place(part: stream.Part) -> tuple[bool, int, str]:
    """Orders the parts of a file: wide types first, then by name, as the safetensors library writes them."""
    name, (dtype, _) = next(iter(part.specs.items()))
    return len(part.specs) == 1, -dtype.itemsize, name


def write_moments(opened: Opened, place: Path, options: Options) -> None:
    """training/optimizer.safetensors; its state.json is written last of all."""
    assert opened.moments
    (place / "training").mkdir()
    parts = [
        stream.plain(f"{group}.{name}", tensor, DTYPES["F32"], False, options)
        for group, tensors in (("m", opened.moments.m), ("v", opened.moments.v))
        for name, tensor in tensors.items()
    ]
    clock = np.array(opened.moments.t, dtype=np.int64)
    first = stream.Part({"t": (clock.dtype, ())}, lambda out: out.write(clock))
    stream.write_safetensors(place, checkpoint.OPTIMIZER, [first, *sorted(parts, key=_place)], {}, options)
