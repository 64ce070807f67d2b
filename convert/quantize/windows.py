"""The tokens that quantizing reads: windows of a text to calibrate on, and others, held out, to measure on."""

from dataclasses import dataclass

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.evaluate.text import open_text
from mlxgpt.common.tokenizers.protocol import Tokenizer

LENGTH = 2048  # of a window at most
HELD_OUT = 10  # every so many windows one is not calibrated on


@dataclass(frozen=True)
class Windows:
    """Rows (N, T + 1) of ids; one begins with the token that the row before ends with.

    ``calibration`` is empty where none is asked for; ``notes`` say what was left.
    """

    calibration: np.ndarray
    evaluation: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens that a row gives, T."""
        return self.evaluation.shape[1] - 1


def read(
    data: str,
    held_out: str | None,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    text_key: str,
    most: int,
    fit: bool,
) -> Windows:
    """Windows of the text ``data``: the last tenth is held out, or ``held_out`` is another text.

    Args:
        data: a text as ``mlxgpt eval`` reads one.
        held_out: a text to measure on.
        tokenizer: the model's.
        config: its context bounds a window.
        text_key: see evaluate.text.
        most: tokens of calibration, and of measuring, at most.
        fit: whether there is something to calibrate.

    Raises:
        UserError: a text that is not there, or shorter than a window; an id that the vocabulary lacks.
    """
    length = min(config.block_size, LENGTH)
    most = max(1, most // length)
    if held_out is not None and not fit:
        others, notes = _rows(held_out, tokenizer, config, text_key, length)
        notes += (f"{data}: is not read, for nothing is fitted to it",) if data != held_out else ()
        return _limited(others[:0], others, most, notes, data, held_out)
    rows, notes = _rows(data, tokenizer, config, text_key, length)
    if held_out is not None:
        others, more = _rows(held_out, tokenizer, config, text_key, length)
        return _limited(rows, others, most, (*notes, *more), data, held_out)
    if not fit:
        return _limited(rows[:0], rows, most, notes, data, data)
    if len(rows) < 2:
        found = f"{len(rows)} windows of {length} tokens"
        raise UserError(f"{data}: {found}: expected 2, one to calibrate on and one held out, or --eval-data FILE")
    kept = len(rows) - max(1, len(rows) // HELD_OUT)
    return _limited(rows[:kept], rows[kept:], most, notes, data, data)


def _rows(
    path: str, tokenizer: Tokenizer | None, config: ModelConfig, text_key: str, length: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """All whole windows of a text, and a note of what is left over."""
    tokens = np.asarray(open_text(path, tokenizer, text_key, "train").tokens[:])
    if len(tokens) <= length:
        raise UserError(f"{path}: {len(tokens):,} tokens: expected at least {length + 1:,}, a window and its targets")
    if tokens.max() >= config.vocab_size:
        raise UserError(f"{path}: token id {tokens.max()}: expected below {config.vocab_size}, the model's vocabulary")
    count = (len(tokens) - 1) // length
    places = np.arange(count)[:, None] * length + np.arange(length + 1)
    rest = len(tokens) - 1 - count * length
    notes = (f"{path}: the last {rest:,} tokens fill no window of {length:,} and are not read",) if rest else ()
    return tokens[places].astype(np.int32), notes


def _limited(
    fitted: np.ndarray, held: np.ndarray, most: int, notes: tuple[str, ...], data: str, held_out: str
) -> Windows:
    for rows, path, what in ((fitted, data, "calibrate on"), (held, held_out, "measure on")):
        if len(rows) > most:
            notes += (f"{path}: {most:,} of {len(rows):,} windows to {what}; --tokens takes more",)
    return Windows(fitted[:most], held[:most], notes)
