"""What a classifier or a reward model says of texts, by the last token of each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.backend import Backend
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import model_folder
from mlxgpt.common.sft.pack import bucket
from mlxgpt.common.tokenizers.padding import own_padding
from mlxgpt.common.tokenizers.protocol import Tokenizer

BATCH = 4096  # tokens in one forward pass


def passed_over(model: Path, tokenizer: Tokenizer) -> int | None:
    """The token that transformers passes over at the end of a text: pad_token_id of a classifier's config.json."""
    own = own_padding(tokenizer)
    if own is not None or not model_folder.read_config(model).labels:
        return own
    return read_json(model / "config.json").get("pad_token_id")


def logits(backend: Backend, model: Any, texts: Sequence[np.ndarray]) -> np.ndarray:
    """(texts, labels) float64 of tokenized texts, of which none is empty; those of similar length are batched."""
    made = np.zeros((len(texts), len(model.config.labels)))
    order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
    while order:
        width = bucket(len(texts[order[0]]), model.config.block_size)
        group, order = order[: max(1, BATCH // width)], order[max(1, BATCH // width) :]
        tokens = np.zeros((len(group), width), np.int32)
        for b, n in enumerate(group):
            tokens[b, : len(texts[n])] = texts[n]
        lengths = np.array([len(texts[n]) for n in group], np.int32)
        made[group] = backend.generate.classify(model, tokens, lengths)
    return made
