"""Drafts from a smaller model of the same tokenizer (Leviathan et al. 2023; Chen et al. 2023).

It draws with the noise and the settings that the row itself will use, so it is right wherever both models' logits lead
to the same token, at every temperature.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.inference.drafting import Drawing
from mlxgpt.common.inference.drafts import worth
from mlxgpt.common.model import params, rotary

FIRST, WEIGHT = 0.7, 8  # how often a guess is right before anything was seen, and how many tries that weighs
WINDOW = 128  # tries, after which what was learned weighs half
PAUSES = (64, 1024)  # tokens a row without drafts after they did not pay, at first and at the most
LAYER = 1e6  # weights that take as long to read as a layer takes besides


@dataclass(eq=False)
class _Row:
    """What the draft model knows of a row."""

    draft: list[int] = field(default_factory=list)  # of the last pass, as far as nothing else was drawn
    known: int = 0  # tokens of the row that its cache holds or would read alike: ids up to here
    guesses: list[int] = field(default_factory=list)  # behind ``known``, that the cache holds
    inside: bool = False  # whether it is in the batch
    gone: bool = False  # beyond the draft model's context


class DraftModel:
    """A Drafter for the rows of a Batch.

    Args:
        backend: of both models.
        model: the smaller one, in evaluation mode.
        n_vocab: tokens that may be drawn.
        config: of the model that drafts are for.
    """

    def __init__(self, backend: Backend, model: Any, n_vocab: int, config: ModelConfig) -> None:
        self._backend, self._model, self._n_vocab = backend, model, n_vocab
        self._price = _weight(model.config) / _weight(config)
        self._limit = model.config.rope_original if rotary.by_length(model.config) else model.config.block_size
        self._rows: list[_Row] = []
        self._batch = backend.batching.Batch(model, n_vocab)
        self._order: list[_Row] = []  # of the batch
        self._right, self._tries = WEIGHT * FIRST, float(WEIGHT)
        self._pause, self._quiet = PAUSES[0], 0  # tokens a row until drafts are tried again

    @property
    def hot(self) -> bool:
        """Whether guesses are right so often that they pay, or it is time to try."""
        return bool(self._rows) and self._quiet <= 0 and not all(row.gone for row in self._rows)

    def join(self, rows: Sequence[Drawing]) -> None:
        """Rows that are read when they are to have drafts."""
        self._rows += [_Row() for _ in rows]

    def keep(self, rows: Sequence[int]) -> None:
        """The rows that stay."""
        self._rows = [self._rows[row] for row in rows]
        self._leave([row for row in self._order if row not in self._rows])

    def take(self, row: int, tokens: Sequence[int]) -> None:
        """Compares what was drawn with what was guessed."""
        mine = self._rows[row]
        for token in tokens:
            if mine.draft:
                right = mine.draft[0] == token
                self._right += right
                self._tries += 1
                mine.draft = mine.draft[1:] if right else []
            if mine.guesses:
                right = mine.guesses[0] == token
                mine.known += right
                mine.guesses = mine.guesses[1:] if right else []
        if self._tries > WINDOW:
            self._right, self._tries = self._right / 2, self._tries / 2
        if self._quiet > 0:
            self._quiet -= len(tokens) / len(self._rows)

    def propose(self, rows: Sequence[Drawing], most: Sequence[int]) -> list[list[int]]:
        """What the draft model draws behind each row."""
        drafts: list[list[int]] = [[] for _ in rows]
        width = min(self._width(), max(most))
        if width:
            self._catch_up([list(row.ids) for row in rows], width)
        if not width or not self._order:
            return drafts
        order = [self._rows.index(row) for row in self._order]
        for n in range(width):
            drawn = self._batch.draw([rows[row].after(drafts[row]) for row in order])
            if n + 1 < width:
                self._batch.go_on(drawn, range(len(order)))
            for row, chosen in zip(order, drawn.read(), strict=True):
                drafts[row].append(max(0, chosen.token))
        for row in order:
            mine, mine_drawn = self._rows[row], drafts[row]
            mine.guesses, drafts[row] = mine_drawn[:-1], mine_drawn[: most[row]]
            mine.draft = list(drafts[row])
        return drafts

    def _width(self) -> int:
        """Tokens of the drafts that pay most; 0 begins a pause."""
        rate, count = self._right / self._tries, len(self._rows)
        able = sum(not row.gone for row in self._rows)
        expected = [worth.drawn([rate] * worth.WIDTHS[-1])] * able
        width, _ = worth.best(expected, count, self._price)
        if width:
            if self._tries > WINDOW / 2:
                self._pause = PAUSES[0]
            return width
        self._quiet, self._pause = self._pause, min(2 * self._pause, PAUSES[1])
        self._right, self._tries = WEIGHT * FIRST, float(WEIGHT)  # the next try begins anew
        return 0

    def _leave(self, rows: Collection[_Row]) -> None:
        """Takes rows out of the batch."""
        stay = [place for place, row in enumerate(self._order) if row not in rows]
        self._batch.keep(stay)
        self._order = [self._order[place] for place in stay]

    def _catch_up(self, ids: Sequence[list[int]], width: int) -> None:
        """Reads what each row has that its draft has not; a row that lags far joins anew."""
        texts = dict(zip(self._rows, ids, strict=True))
        far: dict[_Row, Any] = {}  # with the keys and values that it has
        for row, text in texts.items():
            row.gone = row.gone or len(text) + width > self._limit
            row.known = min(row.known, len(text) - 1)  # a token is read for its logits
            if row not in self._order:
                far[row] = None
            elif len(text) - row.known > width:
                far[row] = self._batch.layers(self._order.index(row), row.known)
        self._leave([row for row in self._order if row.gone or row in far])
        if self._order:
            self._batch.cut([row.known for row in self._order])
            self._batch.read([texts[row][row.known :] for row in self._order])
        for row, held in far.items():
            if not row.gone:
                prompt = self._backend.batching.Prompt(self._model, texts[row], self._n_vocab, held)
                while prompt.left:
                    prompt.read(self._backend.generate.PREFILL)
                self._batch.join(prompt, 1)
                self._order.append(row)
        for row in self._order:
            row.known = len(texts[row])


def _weight(config: ModelConfig) -> float:
    """What a pass over a token takes, in weights that it reads."""
    return params.count(config) + LAYER * config.n_layer
