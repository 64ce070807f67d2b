"""Foreign formats and proof: any model that is readable here, from any format into any other.

The source's format is recognized by content, and no tensor is in memory before it is asked for:

    >>> from convert import convert, open_model
    >>> opened = open_model("ckpt.pt")
    >>> opened.format, opened.config.n_layer, opened.tensors["wte.weight"].shape
    ('nanogpt', 2, (80, 48))

A Hugging Face folder of it, with tokenizer, moments and provenance, and back, bit for bit:

    >>> convert("ckpt.pt", "model").format
    'hf'
    >>> convert("model", "back.pt", to="nanogpt").parameters
    62016
    >>> back = open_model("back.pt")
    >>> all((back.tensors[name].read() == tensor.read()).all() for name, tensor in opened.tensors.items())
    True
"""

from convert.conversion import Report, convert
from convert.formats.opened import Moments, Opened, Options, Tensor
from convert.formats.registry import FORMATS, format_of, open_model

__all__ = ["FORMATS", "Moments", "Opened", "Options", "Report", "Tensor", "convert", "format_of", "open_model"]
