"""One choice of a request while it is drawn: its noise, its penalties, its constraint, and the text so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxgpt.common.inference import choosing, generation, sampling
from mlxgpt.common.inference.choosing import Choice, Chosen
from mlxgpt.common.inference.generation import Row
from mlxgpt.common.serve.work import Drawn, Piece, Work


class Slot:
    """A row of the batch."""

    def __init__(self, work: Work, index: int) -> None:
        served, sample = work.served, work.sample
        self.work, self.index = work, index
        self.row = Row(index, list(work.prompt), work.copies[index], served.tokenizer, work.stop)
        self.row.ends |= served.ends
        self.end = -1  # the token that ended the text
        self._room = generation.room(served.model.config, self.row)
        self._settings, self._keys = choosing.settings(sample), np.zeros(0, np.uint32)
        self._constraint = work.constrain() if work.constrain else None
        self._seen = self._counts = None
        if sample.repetition_penalty != 1:
            self._seen = generation.seen([self.row], served.n_vocab)[0]
        if sample.presence_penalty or sample.frequency_penalty:
            self._counts = np.zeros(served.n_vocab, np.float32)
        self._bias = sampling.biases(work.bias, served.n_vocab)

    @property
    def ids(self) -> list[int]:
        """Prompt and what was drawn."""
        return self.row.prompt + self.row.tokens

    @property
    def last(self) -> bool:
        """Whether the next token is the last, whatever it is."""
        return len(self.row.tokens) + 1 >= min(self.work.sample.max_tokens, self._room)

    @property
    def drafts(self) -> int:
        """How many tokens may be drawn ahead: none that would be the last, none that a constraint has to see first."""
        left = min(self.work.sample.max_tokens, self._room) - len(self.row.tokens)
        return 0 if self._constraint is not None else left - 1

    def next(self) -> Choice:
        """How the next token is drawn."""
        return self.after(())

    def after(self, tokens: Sequence[int]) -> Choice:
        """How the next token is drawn, supposing that ``tokens`` are drawn before it."""
        step, seen, counts, drawn = len(self.row.tokens) + len(tokens), self._seen, self._counts, list(tokens)
        while step >= len(self._keys):
            more = sampling.keys(self.work.sample.seed, self.row.copy, len(self._keys), sampling.KEYS)
            self._keys = np.concatenate([self._keys, more])
        if drawn and seen is not None:
            seen = seen.copy()
            seen[drawn] = True
        if drawn and counts is not None:
            counts = counts.copy()
            np.add.at(counts, drawn, 1)
        return Choice(self._settings, int(self._keys[step]), seen, self._added(counts), self.work.logprobs)

    def _added(self, counts: np.ndarray | None) -> np.ndarray | None:
        """Onto the logits: penalties by ``counts`` and bias, -inf where the constraint forbids a token."""
        sample, added = self.work.sample, self._bias
        if counts is not None:
            added = sampling.added(counts, self._bias, sample.presence_penalty, sample.frequency_penalty)
        if self._constraint is not None:
            added = np.where(self._constraint.allowed(), np.float32(0) if added is None else added, -np.inf)
            added = added.astype(np.float32)
        return added

    def take(self, chosen: Chosen) -> Piece:
        """What a drawn token makes of the text.

        Raises:
            RunError: the model's logits are not finite, or the constraint broke.
        """
        token = chosen.token
        text = self.row.add(token, self.work.sample.max_tokens, self._room)
        what, ended = Drawn(token, chosen.logprob, chosen.top), token in self.row.ends
        drawn = () if ended else (what,)
        if self._constraint is not None and not ended and self.row.reason != "stop":
            self._constraint.take(token)
            if self._constraint.over:
                text += self.row.finish()
        if not self.row.reason:
            if self._seen is not None:
                self._seen[token] = True
            if self._counts is not None:
                self._counts[token] += 1
        return Piece(
            self.index, text, drawn, self.row.reason, end=what if ended and chosen.logprob is not None else None
        )


@dataclass(eq=False)
class Task:
    """A request on its way to the batch: its prompt, and the choices that join it."""

    work: Work
    arrived: float
    ids: list[int]
    slots: list[Slot] = field(default_factory=list)
    prompt: Any = None  # the backend's Prompt, once it is read
    cached: int = 0
    again: bool = False  # a row that left the batch to be read anew
