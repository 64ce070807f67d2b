"""Data sets for fine-tuning: conversations of words, and a source of them."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import templates
from models import tiny

from mlxgpt.common.config import TrainConfig, TuneConfig
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

WORDS = templates.TEXT.split()
LONG = {"instruction": " ".join(WORDS[:40]), "output": "He goes to the park."}


def chat_rows(count: int, turns: int = 1, longest: int = 40) -> list[dict[str, Any]]:
    """Conversations of words, of many lengths."""
    made = []
    for n in range(count):
        messages = []
        for k in range(2 * turns):
            size = 1 + (7 * n + 5 * k) % longest
            content = " ".join(WORDS[(n + k + w) % len(WORDS)] for w in range(size))
            messages.append({"role": "assistant" if k % 2 else "user", "content": f"{n} {content}"})
        made.append({"messages": messages})
    return made


@functools.cache
def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 tokens."""
    return train_tokenizer("bpe", [templates.TEXT + "0123456789"], 300)


def opened(
    folder: Path, tokenizer: Tokenizer, rows: list[Any], train: dict[str, Any] | None = None, **tune: Any
) -> SftSource:
    """A source of ``rows``, a tenth of which validates."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny(family="llama", block_size=256, vocab_size=400)
    settings: dict[str, Any] = {"batch_size": 4, "seed": 5} | (train or {})
    return sft_source.open_source(
        TuneConfig(source=str(path), **tune), TrainConfig(**settings), tokenizer, config, lambda line: None
    )


def only(source: SftSource) -> tuple[str, str]:
    """The one training row: all its text, and what of it is trained."""
    (row,) = source.rows("train")
    ids, mask = np.append(row.tokens, row.targets[-1]), np.append(False, row.weights > 0)
    return source.tokenizer.decode(ids.tolist()), source.tokenizer.decode(ids[mask].tolist())
