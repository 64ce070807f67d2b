"""The padding token of a classifier, which stands in no text.

transformers' classifiers score the last token that is not pad_token_id. So a token that texts contain, such as the end
of text, cannot be it: a text that ends in one would be scored at another place.
"""

from pathlib import Path

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.adding import with_tokens
from mlxgpt.common.tokenizers.load import from_files
from mlxgpt.common.tokenizers.protocol import Tokenizer

_NAMES = ("[PAD]", "<|pad|>", "<|classifier_pad|>")


def own_padding(tokenizer: Tokenizer) -> int | None:
    """The id of a padding token that pads and nothing else; None where there is none."""
    name = tokenizer.named.get("pad_token")
    others = {text for role, text in tokenizer.named.items() if role != "pad_token"}
    found = tokenizer.id_of(name) if name in _NAMES and name not in others else None
    return None if found == tokenizer.eos_id else found


def with_padding(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer`` with a new token that pads; itself where it has one, or can take none."""
    if own_padding(tokenizer) is not None:
        return tokenizer
    name = next((name for name in _NAMES if tokenizer.id_of(name) is None), None)
    if name is None:
        return tokenizer
    try:
        made = with_tokens(tokenizer, [name], {"pad_token": name})
    except UserError:
        return tokenizer  # its tokenizer.model is of no class that transformers reads
    templates = {file: data for file, data in tokenizer.files.items() if file.endswith(".jinja")}
    made = from_files(made.files | templates, Path(".")) if templates else made
    made.ends = tokenizer.ends
    return made


def without_padding(ids: np.ndarray, pad: int | None) -> np.ndarray:
    """A text's ids up to the token that is scored: the last that is not ``pad``, as in transformers."""
    kept = np.flatnonzero(ids != pad) if pad is not None else np.arange(len(ids))
    return ids[: kept[-1] + 1] if len(kept) else ids[:1]
