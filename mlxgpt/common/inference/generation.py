"""The host's half of generation: prompts into token rows, drawn tokens into text that stops where it should.

No framework here; mlxgpt/generate.py and torch_ref/generate.py draw the tokens.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlxgpt.common.config import ModelConfig, SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.inference.choosing import Chosen
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.protocol import StreamDecoder, Tokenizer

CONTEXT = 16  # tokens of the prompt that the decoder is shown

OnText = Callable[[int, str], None]
"""Called with a prompt's index and each new piece of its text as soon as it is certain."""


@dataclass(frozen=True)
class Result:
    """What followed one prompt."""

    text: str  # without prompt, stop string and end-of-text token
    tokens: list[int]  # drawn, the end-of-text token left out
    prompt_tokens: int
    finish_reason: str  # eos: a token that ends texts; stop: a stop string; length: max_tokens; context: block_size
    logprobs: list[Chosen] = field(default_factory=list)  # of each token, if asked for


class Row:
    """One prompt on its way. ``reason`` is empty until it is done."""

    def __init__(self, index: int, prompt: list[int], copy: int, tokenizer: Tokenizer | None, stop: Sequence[str]):
        self.index, self.prompt, self.copy, self.stop = index, prompt, copy, stop
        self.tokens: list[int] = []
        self.logprobs: list[Chosen] = []
        self.text, self.reason = "", ""
        self.end: int | None = None  # the token that ended it
        self._held = ""  # may be the beginning of a stop string
        self.ends = {tokenizer.eos_id, *tokenizer.ends} if tokenizer else set()  # tokens that end the text
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        if self._decoder:
            # what follows is spelled as after the prompt: SentencePiece drops a space only at the start of a text
            for token in prompt[-CONTEXT:]:
                self._decoder.add(token)

    def add(self, token: int, limit: int, room: int) -> str:
        """Takes the next token and returns the text that is certain now; ``limit`` and ``room`` count drawn tokens."""
        if token < 0:
            raise RunError(f"prompt {self.index + 1}, token {len(self.tokens) + 1}: the model's logits are not finite")
        if token in self.ends:
            self.end = token
            return self._close("eos")
        self.tokens.append(token)
        if self._decoder:
            self._held += self._decoder.add(token)
        if self._cut():
            return self._emit(len(self._held))
        if len(self.tokens) >= limit:
            return self._close("length")
        if len(self.tokens) >= room:
            return self._close("context")
        return self._emit(len(self._held) - self._open())

    def finish(self) -> str:
        """Ends the row behind its last token, as a stop string would; returns the text that was held back."""
        text = "" if self.reason else self._close("stop")
        self.reason = "stop"
        return text

    def _cut(self) -> bool:
        """Drops a stop string and what follows it, and closes the row."""
        starts = [start for start in (self._held.find(stop) for stop in self.stop) if start >= 0]
        if starts:
            self._held, self.reason = self._held[: min(starts)], "stop"
        return bool(starts)

    def _open(self) -> int:
        """The length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self.stop), default=0)
        for size in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self.stop):
                return size
        return 0

    def _emit(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self.text += piece
        return piece

    def _close(self, reason: str) -> str:
        if self._decoder:
            self._held += self._decoder.flush()
        if not self._cut():
            self.reason = reason
        return self._emit(len(self._held))

    def result(self) -> Result:
        """What came of it."""
        return Result(self.text, self.tokens, len(self.prompt), self.reason or "length", self.logprobs)


def start_rows(
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str | Sequence[int]],
    stop: Sequence[str],
    ends: Collection[int] = (),
) -> list[Row]:
    """A row a prompt; text or token ids. A text begins with what its tokenizer puts before one, an empty one else
    with the end-of-text token. ``ends``: tokens that end a text besides the tokenizer's.

    Raises:
        UserError: a prompt that is empty, longer than the context, or has what the vocabulary does not.
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts = {prompts!r}: expected a list of prompts")
    if any(not text for text in stop):
        raise UserError("stop string '': expected at least one character")
    if stop and tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this model has none")
    rows: list[Row] = []
    for index, prompt in enumerate(prompts):
        where = f"prompt {index + 1}"
        if isinstance(prompt, str):
            if tokenizer is None:
                raise UserError(f"{where}: text needs a tokenizer, and this model has none; expected token ids")
            try:
                ids = beginning.start(tokenizer, prompt)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if not ids and tokenizer.eos_id is not None:
                ids = [tokenizer.eos_id]
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise UserError(f"{where}: empty; expected at least one token")
        if len(ids) > config.block_size:
            raise UserError(f"{where}: {len(ids)} tokens; expected at most model.block_size = {config.block_size}")
        wrong = [token for token in ids if not 0 <= token < config.vocab_size]
        if wrong:
            raise UserError(
                f"{where}: token id {wrong[0]}; expected 0 to {config.vocab_size - 1}, the model's vocabulary"
            )
        copy = sum(row.prompt == ids for row in rows)
        rows.append(Row(index, ids, copy, tokenizer, stop))
        rows[-1].ends |= set(ends)
    return rows


def seen(rows: list[Row], n_vocab: int) -> np.ndarray:
    """Which tokens stand in each prompt: (B, V) bool."""
    return np.stack([np.isin(np.arange(n_vocab), row.prompt) for row in rows])


def room(config: ModelConfig, row: Row) -> int:
    """How many tokens the context lets a row draw: the last one drawn need not fit into it."""
    return config.block_size - len(row.prompt) + 1


def steps(config: ModelConfig, rows: list[Row], sample: SampleConfig) -> int:
    """How many tokens the longest-running row can draw."""
    return min(sample.max_tokens, max((room(config, row) for row in rows), default=0))


def switches(config: ModelConfig, rows: list[Row], step: int) -> bool:
    """Whether a row goes beyond the original context of longrope with its drawn token number ``step``."""
    return config.rope_scaling == "longrope" and any(len(row.prompt) + step == config.rope_original + 1 for row in rows)


def advance(
    config: ModelConfig,
    rows: list[Row],
    tokens: list[int],
    sample: SampleConfig,
    on_text: OnText | None,
    names: Sequence[np.ndarray] = (),
) -> bool:
    """Gives each row that is not done its next token; True when all are done. ``names``: what ``logprobs`` said."""
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if not row.reason:
            before = len(row.tokens)
            piece = row.add(token, sample.max_tokens, room(config, row))
            if names and len(row.tokens) > before:
                logprob, *top = (each[index].tolist() for each in names)
                row.logprobs.append(Chosen(token, logprob, tuple(zip(*top, strict=True))))
            if piece and on_text:
                on_text(row.index, piece)
    return all(row.reason for row in rows)
