"""What eval scores of rows: the tokens that fine-tuning trains on, each row seeing itself alone."""

import json
from collections.abc import Iterator
from pathlib import Path

from mlxgpt.common.batch import Batch
from mlxgpt.common.config import ModelConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows import files as row_files
from mlxgpt.common.rows import formats as row_formats
from mlxgpt.common.sft import encode, pack
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft.pack import Example
from mlxgpt.common.tokenizers.protocol import Tokenizer

ROWS = 8  # that pass through the model at once
_SPLITS = {"train": "train", "val": "valid", "test": "test"}


def is_rows(path: str, text_key: str) -> bool:
    """Whether a path holds rows of fine-tuning, not documents: a .jsonl does whose first line has no ``text_key``."""
    place = Path(path)
    if place.is_dir():
        return (place / "train.jsonl").is_file()
    if place.suffix.lower() != ".jsonl":
        return place.suffix.lower() in row_files.SUFFIXES and place.suffix.lower() != ".parquet"
    try:
        with open(place, encoding="utf-8-sig") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and text_key not in first


def examples(path: str, split: str, tokenizer: Tokenizer | None, config: ModelConfig) -> list[Example]:
    """The rows of a file, all of them, or of a folder's split; rendered with the tokenizer's own template.

    Raises:
        UserError: no tokenizer, no such split, or a row that cannot be rendered or fitted.
    """
    if tokenizer is None:
        raise UserError(
            f"{path}: rows need a tokenizer, and this model has none: mlxgpt convert MODEL NEW --tokenizer FILE"
        )
    tune = TuneConfig(source=path, overflow="truncate")  # every row is scored
    rows = row_formats.open_rows(tune)
    held = rows.splits[_SPLITS[split]]
    if Path(path).is_file():
        held = [*rows.splits["train"], *rows.splits["valid"]]
    if not held:
        raise UserError(f"{path}: no rows of --split {split}: expected {_SPLITS[split]}.jsonl with some")
    template, spelled, added = sft_source.choose_template(tune, rows, tokenizer)
    if added:
        raise UserError(f"{path}: conversations, and this model's tokenizer has no chat template; tuning would add one")
    return encode.Encoder(tune, spelled, template, config.block_size).examples(held)[0]


def batches(examples: list[Example], most: int) -> Iterator[Batch]:
    """The examples, each seeing itself alone; ``most``: the context."""
    for start in range(0, len(examples), ROWS):
        part = examples[start : start + ROWS]
        yield pack.padded_batch(part, [(n,) for n in range(len(part))], most)
