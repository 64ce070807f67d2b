"""Foreign formats and proof: any model that is readable here, from any format into any other.

from convert import convert, open_model

opened = open_model("out/ckpt.pt")                 # recognised by content; no tensor is read yet
opened.config, opened.tensors["wte.weight"].read()
report = convert("out/ckpt.pt", "model")           # a Hugging Face folder
convert("model", "ckpt.pt", to="nanogpt")          # and back: the same bits
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from convert.model import Moments, Opened, Options, Tensor
from mlxgpt.common import checkpoint
from mlxgpt.common.errors import UserError

__all__ = ["FORMATS", "Moments", "Opened", "Options", "Tensor", "format_of", "open_model"]

# what --to calls a format -> its module, in the order in which a model is held against them
FORMATS = {
    "mlx-lm": "convert.mlx_lm",
    "npz": "convert.npz",
    "hf": "convert.hf",
    "gguf": "convert.gguf",
    "llama2c": "convert.llama2c",
    "nanogpt": "convert.nanogpt",
    "mingpt": "convert.mingpt",
    "gptmodel": "convert.gptmodel",
}


def format_of(name: str) -> ModuleType:
    """The module of a format: recognise, read, and where it can be written KIND and write.

    Raises:
        UserError: there is no such format.
    """
    if name not in FORMATS:
        raise UserError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
    return importlib.import_module(FORMATS[name])


def open_model(path: Path | str) -> Opened:
    """A model in whichever format it is; a run means its best, else its last checkpoint, and a hub id its download.

    Raises:
        UserError: there is nothing, no format recognises it, or the one that does finds it damaged.
    """
    place = Path(path).expanduser()
    reader = _reader(place)
    if reader is None and not place.is_file():
        place = checkpoint.resolve_model(path)
        reader = _reader(place)
    if reader is None:
        raise UserError(f"{place}: not recognised as one of {', '.join(FORMATS)}")
    return reader.read(place)


def _reader(place: Path) -> ModuleType | None:
    """The first format that recognises what is there."""
    if not place.exists():
        return None
    there = (name for name, module in FORMATS.items() if importlib.util.find_spec(module))
    return next((module for module in map(format_of, there) if module.recognise(place)), None)
