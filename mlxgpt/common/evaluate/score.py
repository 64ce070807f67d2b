"""Loss, perplexity and bits per byte of a text, every token scored once, sums in float64."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mlxgpt.common.batch import Batch
from mlxgpt.common.data.token_source import windows
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.evaluate.text import Text

Score = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
"""(tokens, targets, positions), each (B, T) -> losses (B, T)."""
BATCH = 4096  # tokens that pass through the model at once


@dataclass(frozen=True)
class Evaluation:
    """Sums over every scored token. ``size``: bytes of UTF-8 that they spell, None where nobody knows."""

    loss_sum: float  # nats
    tokens: int
    size: int | None

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte of text: what does not depend on the tokenizer."""
        return self.loss_sum / math.log(2) / self.size if self.size else None


def evaluate(
    score: Score, text: Text, vocab_size: int, block_size: int, stride: int, say: Callable[[str], None]
) -> Evaluation:
    """Scores ``text``; ``say`` is told the progress.

    Raises:
        UserError: fewer than two tokens, or one outside the model's vocabulary.
        RunError: a loss that is not finite.
    """
    if len(text.tokens) <= text.context:
        raise UserError(f"{text.name}: {len(text.tokens)} tokens; expected at least {text.context + 1}")
    loss_sum, count, total = 0.0, 0, len(text.tokens) - text.context * len(text.starts)
    rows = max(1, BATCH // block_size)
    for batch in windows(text.tokens, block_size, rows, stride, text.starts, text.context):
        largest = int(max(batch.tokens.max(), batch.targets.max()))
        if largest >= vocab_size:
            raise UserError(f"{text.name}: token id {largest}; expected below {vocab_size}, the model's vocabulary")
        losses = score(batch.tokens, batch.targets, batch.positions).astype(np.float64)
        scored = batch.weights > 0
        loss_sum, count = loss_sum + float(losses[scored].sum()), count + int(scored.sum())
        if not math.isfinite(loss_sum):
            raise RunError(f"{text.name}: the loss is not finite within the first {count} tokens")
        say(f"{count} of {total} tokens, loss {loss_sum / count:.4f}")
    return Evaluation(loss_sum, count, text.size)


def evaluate_rows(score: Score, batches: Iterator[Batch], name: str, say: Callable[[str], None]) -> Evaluation:
    """The losses of what rows ask for; the bytes that it spells are not counted.

    Raises:
        RunError: the loss is not finite.
    """
    loss_sum, count = 0.0, 0
    for batch in batches:
        losses = score(batch.tokens, batch.targets, batch.positions).astype(np.float64)
        loss_sum += float((losses * batch.weights).sum())
        count += int(np.count_nonzero(batch.weights))
        if not math.isfinite(loss_sum):
            raise RunError(f"{name}: the loss is not finite within the first {count} tokens")
        say(f"{count} tokens, loss {loss_sum / count:.4f}")
    return Evaluation(loss_sum, count, None)
