"""The formats, and which of them a file or folder has, recognized by content."""

import importlib
import importlib.util
import inspect
import shlex
from pathlib import Path
from types import ModuleType

from convert.formats import adapter as adapter_format
from convert.formats.opened import Opened
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, resolve

# name for --to -> module, in the order in which they are tried
FORMATS = {
    "mlx-lm": "convert.formats.mlx_lm",
    "npz": "convert.formats.npz",
    "pytorch": "convert.formats.torch_files.pytorch",
    "hf": "convert.formats.hf",
    "gguf": "convert.formats.gguf.model",
    "llama2c": "convert.formats.llama2c",
    "nanogpt": "convert.formats.torch_files.nanogpt",
    "mingpt": "convert.formats.torch_files.mingpt",
    "gptmodel": "convert.formats.torch_files.gptmodel",
}


def format_of(name: str) -> ModuleType:
    """The module of a format: ``recognize``, ``read`` and, if it can be written, ``KIND`` and ``write``.

    Raises:
        UserError: there is no such format.
    """
    if name not in FORMATS:
        raise UserError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
    return importlib.import_module(FORMATS[name])


def open_model(path: Path | str, n_head: int = 0, config: Path | str | None = None) -> Opened:
    """A model in whichever format it is; a run means its best, else its last checkpoint, and a hub id its download.

    ``n_head`` is the number of heads, for files that do not say it (mingpt, gptmodel). ``config`` is a config.json, for
    tensors by name without one (pytorch).

    Raises:
        UserError: there is nothing, no format recognizes it, or the one that does finds it damaged.
    """
    place = Path(path).expanduser()
    if config is not None:
        return _with_config(place, Path(config).expanduser())
    reader = _reader(place)
    if reader is None and not place.is_file():
        place = resolve.resolve_model(path)
        if adapter_folder.is_adapter(place):
            return adapter_format.read(place, open_model(adapter_folder.base_of(place)))
        reader = _reader(place)
    if reader is None:
        cure = f"; a GPT of your own: mlxgpt adopt {shlex.quote(str(path))} --out DIR"
        raise UserError(f"{place}: not recognized as one of {', '.join(FORMATS)}{cure}")
    if not n_head:
        return reader.read(place)
    if "n_head" not in inspect.signature(reader.read).parameters:
        raise UserError(f"--n-head {n_head}: {place} says itself how many heads it has")
    return reader.read(place, n_head=n_head)


def _with_config(place: Path, config: Path) -> Opened:
    """A state dict with the config.json that is given for it."""
    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    if not config.exists():
        raise UserError(f"--config {config}: no such file")
    reader = _reader(place)
    if reader not in (None, format_of("pytorch"), format_of("mingpt")):
        raise UserError(f"--config {config}: {place} says itself what model it is")
    return format_of("pytorch").read(place, config)


def _reader(place: Path) -> ModuleType | None:
    """The first format that recognizes what is there."""
    if not place.exists():
        return None
    there = (name for name, module in FORMATS.items() if importlib.util.find_spec(module))
    return next((module for module in map(format_of, there) if module.recognize(place)), None)
