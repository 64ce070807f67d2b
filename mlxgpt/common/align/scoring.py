"""What a reward model scores: texts, conversations, answers behind their prompts, and pairs of answers.

A text is read as AutoTokenizer gives it; what has a prompt, and a conversation, as in training: rendered with the
model's chat template where it has one, and with the end of an answer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.config import ModelConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.inference import last_token
from mlxgpt.common.rows import files as row_files
from mlxgpt.common.rows import formats as row_formats
from mlxgpt.common.rows import preferences
from mlxgpt.common.rows.row import Row
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.padding import without_padding
from mlxgpt.common.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Item:
    """A text, or the two of a pair, the better one first."""

    where: str
    form: str  # text, completion or chat
    rows: tuple[Row, ...]


def read(path: str, tune: TuneConfig) -> list[Item]:
    """What a file holds, in its order.

    Raises:
        UserError: no such file, another kind of one, or a row that is none of these; names file and row.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(f"--data {place}: no such file")
    if place.suffix.lower() == ".txt":
        lines = enumerate(row_files.read_lines(place), 1)
        return [Item(f"{place} row {n}", "text", (Row(f"{place} row {n}", text=line),)) for n, line in lines]
    if place.suffix.lower() not in row_files.SUFFIXES:
        known = " ".join((".txt", *row_files.SUFFIXES))
        raise UserError(f"--data {place}: unknown format {place.suffix or 'without a suffix'}: expected {known}")
    items = [_item(row, where, tune) for where, row in row_files.read_values(place, tune.drop_nulls)]
    if not items:
        raise UserError(f"{place}: no rows: expected at least one")
    return items


def _item(row: dict[str, Any], where: str, tune: TuneConfig) -> Item:
    if any(key in row for key in preferences.ANSWERS):
        form, found = preferences.read_pair(row, where, tune)
        if found is None:
            raise UserError(f"{where}: chosen equals rejected: expected two different answers")
        return Item(where, "completion" if form == "text" else form, found.rows)
    form, made = row_formats.read_row({key: row[key] for key in row if key != tune.label_key}, where, tune)
    return Item(where, form, (made,))


def encode(
    items: Sequence[Item], tune: TuneConfig, tokenizer: Tokenizer, config: ModelConfig, pad: int | None
) -> tuple[list[np.ndarray], int]:
    """The ids of all rows of the items, in their order, and how many lost something to fit into the context.

    ``pad``: the token that is passed over at the end of a text.

    Raises:
        UserError: an empty text, a character that the tokenizer lacks, or a row that no shortening fits.
    """
    made: list[list[np.ndarray]] = [[] for _ in items]
    cut = 0
    for form in dict.fromkeys(item.form for item in items):
        numbers = [n for n, item in enumerate(items) if item.form == form]
        rows = [row for n in numbers for row in items[n].rows]
        if form == "text":
            found = [_text(row, tokenizer, config, pad) for row in rows]
            cut += sum(shorter for _, shorter in found)
            texts = iter([ids for ids, _ in found])
        else:
            listed, shorter = _rendered(rows, form, tune, tokenizer, config)
            texts, cut = iter(listed), cut + shorter
        for n in numbers:
            made[n] = [without_padding(next(texts), pad) for _ in items[n].rows]
    return [ids for each in made for ids in each], cut


def _text(row: Row, tokenizer: Tokenizer, config: ModelConfig, pad: int | None) -> tuple[np.ndarray, bool]:
    """A text's ids, and whether its end is cut off."""
    try:
        ids = np.asarray(tokenizer.encode(row.text), np.int32)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None
    if not len(ids):
        raise UserError(f"{row.where}: empty: expected text")
    whole = without_padding(beginning.wrap(tokenizer, ids), pad)
    longer = len(whole) > config.block_size
    return beginning.wrap(tokenizer, ids, config.block_size) if longer else whole, longer


def _rendered(
    rows: Sequence[Row], form: str, tune: TuneConfig, tokenizer: Tokenizer, config: ModelConfig
) -> tuple[list[np.ndarray], int]:
    """Rows as training reads them, one by one, and how many were shortened."""
    tune = dataclasses.replace(tune, task="reward", overflow="truncate", block_size=config.block_size)
    encoder, added = sft_source.encoder_of(tune, form, tokenizer, config)
    if added:
        raise UserError(
            f"{rows[0].where}: a conversation, and the model's tokenizer has no chat template: expected "
            "--set tune.template=chatml or a jinja file, if the model knows its tokens, or prompt and completion"
        )
    examples, counts = encoder.examples(rows)
    if counts.dropped:
        first = rows[min(set(range(len(rows))) - set(encoder.kept))]
        raise UserError(f"{first.where}: longer than the model's context of {config.block_size} tokens, its answer too")
    return [example.tokens for example in examples], counts.truncated + counts.cut


def score(backend: Any, model: Any, texts: Sequence[np.ndarray]) -> np.ndarray:
    """A reward model's scores (texts,) float64."""
    return last_token.logits(backend, model, texts)[:, 0]


def grouped(items: Sequence[Item], scores: np.ndarray) -> Iterator[tuple[Item, list[float]]]:
    """Each item with its scores."""
    listed, start = scores.tolist(), 0
    for item in items:
        yield item, listed[start : start + len(item.rows)]
        start += len(item.rows)
