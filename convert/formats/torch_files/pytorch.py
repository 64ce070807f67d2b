"""Weights without a folder of safetensors: pytorch_model.bin, whole or in shards, and a state dict in a bare file.

Names are those of transformers or Meta's, with or without what wrappers put before them. The file may be one of
``torch.save``, of any age, or of safetensors, and the tensors may lie in a training program's checkpoint. The sizes
come from config.json, or Meta's params.json, beside it or given.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats import hf
from convert.formats.opened import Opened
from convert.formats.torch_files import file as torch_file
from convert.formats.torch_files import gptmodel, meta, mingpt, nanogpt
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import quantized, weight_files
from mlxgpt.common.folders.tensors import Stored, read_header
from mlxgpt.common.model import module_names, text_part
from mlxgpt.common.tokenizers.protocol import FILES

# keys under which training programs save a model's tensors, and what is tried first comes first
_WRAPPED = ("state_dict", "model_state_dict", "model_state", "model", "module", "params", "net")
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\n")
_TABLES = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "embed_in.weight")


@dataclass(frozen=True)
class Held:
    """A tensor of a loaded file of ``torch.save``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    tensor: Any

    def read(self) -> np.ndarray:
        """Its values."""
        return torch_file.as_numpy(self.tensor)


def recognize(path: Path) -> bool:
    """A folder with sizes and no safetensors of a model; or a file of tensors with names of transformers or Meta's."""
    if path.is_dir():
        plain = (path / weight_files.SINGLE).is_file() or (path / weight_files.INDEX).is_file()
        sized = (path / "config.json").is_file() or (path / weight_files.META).is_file()
        return sized and not plain and bool(_candidates(path))
    names = _names(path) if path.is_file() else frozenset()
    if not any(name.endswith(_TABLES) for name in names):
        return False
    if nanogpt.recognize(path) or gptmodel.recognize(path):
        return False
    # GPT-2's names are minGPT's too, whose config.json says no model_type
    return not mingpt.recognize(path) or _beside(path.parent) is not None


def _names(path: Path) -> frozenset[str]:
    """What may be names of tensors in a file."""
    if path.suffix == ".safetensors":
        try:
            return frozenset(read_header(path)[0])
        except UserError:
            return frozenset()
    return torch_file.strings_in_pickle(path)


def _candidates(folder: Path) -> list[Path]:
    """The files of a folder that may be its weights."""
    found = weight_files.pickled(folder)
    if len(found) == 1 and found[0].name in (weight_files.PICKLED, weight_files.PICKLED_INDEX):
        return found
    made = [path for path in found if torch_file.strings_in_pickle(path)]
    return made or sorted(folder.glob("consolidated*.safetensors"))


def _beside(folder: Path) -> Path | None:
    """The file of a folder that says a model's sizes."""
    config = folder / "config.json"
    if config.is_file() and "model_type" in read_json(config):
        return config
    return folder / weight_files.META if (folder / weight_files.META).is_file() else None


def read(path: Path, config: Path | None = None) -> Opened:
    """The model in a folder or file; ``config`` is a config.json or params.json, or a folder that has one.

    Raises:
        UserError: nothing says the sizes, several files may be meant, the file is damaged or holds more than tensors
            and plain values, or see ``hf.open_folder``.
    """
    if path.is_file() and (experts := text_part.experts_among(sorted(_names(path)))):
        raise UserError(f"{path}: {experts}")
    where = _sizes(path, config)
    place, left = path, list[str]()
    if path.is_dir():
        candidates = _candidates(path)
        if len(candidates) != 1:
            shown = ", ".join(each.name for each in candidates) or "no weights"
            split = meta.is_split(candidates)
            cure = "the one file of an unsplit model" if split else "the path of one of them"
            raise UserError(f"{path}: found {shown}{', a model split over machines' * split}: expected {cure}")
        place = candidates[0]
    if place.name.endswith(".index.json"):
        entries: dict[str, Stored] = dict(weight_files.read_shards(path, place.name, lambda file: _read(file, left)))
    else:
        entries = dict(_read(place, left))
    values = text_part.of(read_json(where))
    entries = text_part.kept(values, entries)
    peeled = {module_names.peel(name): entry for name, entry in entries.items()}
    if meta.has_names(peeled) and len(peeled) == len(entries):
        values, notes = meta.config_json(where, values, peeled) if "model_type" not in values else (values, [])
        entries = meta.renamed(place, values, peeled)
        left += notes
    elif "model_type" not in values:
        raise UserError(f"{place}: tensors have not Meta's names, whose sizes {where} says: expected config.json")
    entries = quantized.resolve(where.parent, values, entries)
    plain, extra = hf.read_values(quantized.plain_values(where.parent, values), str(where))
    beside = None if where.parent == path else path
    opened = hf.open_folder(where.parent, "pytorch", values, plain, entries, extra, beside)
    opened.notes += left
    _take_tokenizer(opened, path if path.is_dir() else path.parent)
    return opened


def _take_tokenizer(opened: Opened, folder: Path) -> None:
    """The tokenizer of the weights' own folder, if it has one, in place of that beside the given config.json."""
    own = hf.companions(folder)
    if not opened.companions.keys() & set(FILES) or own.keys() & set(FILES):
        opened.companions = own
    ranks = opened.companions.get("tokenizer.model")
    if isinstance(ranks, Path) and _RANKS.match(ranks.read_bytes()[:200]):
        del opened.companions["tokenizer.model"]
        opened.notes.append(f"{ranks}: left behind: ranks of tiktoken, as Llama 3 has them; --tokenizer DIR adds one")


def _sizes(path: Path, given: Path | None) -> Path:
    """The file that says the model's sizes.

    Raises:
        UserError: there is none.
    """
    if given is not None and given.is_file():
        return given
    folder = given or (path if path.is_dir() else path.parent)
    found = _beside(folder)
    if found is None:
        where = f"in {folder}" if given or path.is_dir() else "beside it"
        raise UserError(
            f"{path}: tensors by name, which do not say the model's sizes: expected its config.json {where}, or "
            f"--config FILE; a GPT of your own: mlxgpt adopt {shlex.quote(str(path))} --out DIR"
        )
    return found


def _read(path: Path, left: list[str]) -> Mapping[str, Stored]:
    """The tensors of one file; notes of what else it holds are added to ``left``."""
    if path.suffix == ".safetensors":
        return read_header(path)[0]
    import torch

    content, keys = torch_file.load_file(path), list[str]()
    while isinstance(content, Mapping) and not any(isinstance(each, torch.Tensor) for each in content.values()):
        key = next((key for key in _WRAPPED if isinstance(content.get(key), Mapping)), None)
        if key is None:
            raise UserError(f"{path}: expected tensors by name, alone or under {', '.join(_WRAPPED)}")
        keys += [str(other) for other in content if other != key]
        content = content[key]
    if keys:
        left.append(f"{path}: left behind: {', '.join(sorted(keys)[:8])}")
    made = {}
    for name, tensor in torch_file.by_name(str(path), content).items():
        torch_file.check_held(f"{path}: {name}", tensor)
        made[name] = Held(path, torch_file.CODES.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape), tensor)
    return made
