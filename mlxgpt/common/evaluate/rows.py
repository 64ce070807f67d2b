"""What eval scores of rows: the tokens that fine-tuning trains on, each row seeing itself alone."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from mlxgpt.common import recipes
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import ModelConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows import arrow
from mlxgpt.common.rows import files as row_files
from mlxgpt.common.rows import formats as row_formats
from mlxgpt.common.sft import encode, pack
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft.pack import Example
from mlxgpt.common.tokenizers.protocol import Tokenizer

ROWS = 8  # that pass through the model at once
_SPLITS = {"train": "train", "val": "valid", "test": "test"}


def is_rows(path: str, text_key: str) -> bool:
    """Whether a path holds rows of fine-tuning, not documents: .jsonl and .parquet without ``text_key`` do."""
    place = Path(path)
    if place.is_dir():
        return (place / "train.jsonl").is_file() or arrow.is_dataset(place)
    if place.suffix.lower() == ".parquet":
        try:
            from pyarrow import parquet

            return text_key not in parquet.read_schema(place).names
        except (ImportError, OSError, ValueError):
            return False  # the reader of documents says what is wrong
    if place.suffix.lower() != ".jsonl":
        return place.suffix.lower() in row_files.SUFFIXES
    try:
        with open(place, encoding="utf-8-sig") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and text_key not in first


def settings(path: str, sets: list[str]) -> TuneConfig:
    """How the rows are read: ``sets`` are those of --set, all of tune.

    Raises:
        UserError: a setting that is none of tune.
    """
    sections = recipes.apply_sets({"tune": {"source": path, "overflow": "truncate"}}, sets)  # every row is scored
    other = next((name for name in sections if name != "tune"), None)
    if other:
        raise UserError(f"--set {other}: expected a key of tune: {path} is only scored")
    tune = recipes.build(sections).tune
    assert tune
    if tune.task != "lm":
        raise UserError(f"--set tune.task={tune.task}: expected lm: mlxgpt classify scores classifiers")
    return tune


def examples(tune: TuneConfig, split: str, tokenizer: Tokenizer | None, config: ModelConfig) -> list[Example]:
    """The rows of tune.source, all of them, or of a folder's split; rendered with the tokenizer's own template.

    A row longer than the context is shortened as tune.overflow = truncate does, or left out, which a line says.

    Raises:
        UserError: no tokenizer, no such split, or a row that cannot be rendered or fitted.
    """
    path = tune.source
    if tokenizer is None:
        raise UserError(
            f"{path}: rows need a tokenizer, and this model has none: mlxgpt convert MODEL NEW --tokenizer FILE"
        )
    rows = row_formats.open_rows(tune)
    held = rows.splits[_SPLITS[split]]
    if Path(path).is_file() or arrow.is_split(Path(path)):
        held = [*rows.splits["train"], *rows.splits["valid"]]
    if not held:
        raise UserError(f"{path}: no rows of --split {split}: expected {_SPLITS[split]}.jsonl with some")
    template, spelled, added = sft_source.choose_template(tune, rows.format, tokenizer)
    if added:
        raise UserError(f"{path}: conversations, and this model's tokenizer has no chat template; tuning would add one")
    try:
        found, counts = encode.Encoder(tune, spelled, template, config.block_size).examples(held)
    except UserError:  # a template that rewrites history: each answer is scored behind what chat would give
        if template is None:
            raise
        unrolled = dataclasses.replace(tune, unroll=True)
        found, counts = encode.Encoder(unrolled, spelled, template, config.block_size).examples(held)
    if not found:
        raise UserError(f"{path}: no row fits into the model's context of {config.block_size} tokens with its question")
    if counts.dropped:
        print(
            f"{path}: {counts.dropped:,} of {len(held):,} rows are not scored: longer than {config.block_size} tokens, "
            "their answers would lose their questions",
            file=sys.stderr,
        )
    return found


def batches(examples: list[Example], most: int) -> Iterator[Batch]:
    """The examples, each seeing itself alone; ``most``: the context."""
    for start in range(0, len(examples), ROWS):
        part = examples[start : start + ROWS]
        yield pack.padded_batch(part, [(n,) for n in range(len(part))], most, placed=True)
