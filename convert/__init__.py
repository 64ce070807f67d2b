"""Foreign formats and proof: any model that is readable here, from any format into any other.

from convert import convert, open_model

opened = open_model("out/ckpt.pt")             # recognised by content; no tensor is in memory yet
opened.config, opened.tensors["wte.weight"].read()
report = convert("out/ckpt.pt", "model")       # a Hugging Face folder, with tokenizer, moments and provenance
convert("model", "back.pt", to="nanogpt")      # and back: the same bits
"""

from convert.conversion import Report, convert
from convert.formats import FORMATS, format_of, open_model
from convert.model import Moments, Opened, Options, Tensor

__all__ = ["FORMATS", "Moments", "Opened", "Options", "Report", "Tensor", "convert", "format_of", "open_model"]
