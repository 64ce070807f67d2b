"""Drafts from the text itself: what followed the latest place that ends alike (Saxena 2023, prompt lookup decoding).

While no draft is asked for, it only watches: it knows what it would have guessed and what was drawn, so it learns for a
few lookups a token how often a match of some length goes on.
"""

from collections.abc import Sequence

from mlxgpt.common.inference.drafting import Drawing
from mlxgpt.common.inference.drafts import worth

SIZES = (4, 3, 2)  # tokens that two places must share at their ends, longest first
LATEST = 2**16  # places of each size that are remembered at least, and half of those at most
LONGEST = 12  # matches that are longer go on as often as those
# how often a match of 2, 3, ... tokens goes on, before anything was seen, and how many tries that weighs
FIRST = (0.2, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.85, 0.9, 0.9)
WEIGHT = 4
WINDOW = 64  # tries, after which what was learned weighs half
SURE = 0.4  # a match must be as likely to go on before anything is computed
PAYS = 1.5  # times the speed, expected, below which a match is not tried: chance matches promise less


class Lookup:
    """A Drafter for the rows of a Batch."""

    def __init__(self) -> None:
        self._rows: list[_Text] = []
        self._rates = _Rates()

    @property
    def hot(self) -> bool:
        """Whether matches are so long, and so many of the rows have one, that drafts pay."""
        return self._width() > 0

    def join(self, rows: Sequence[Drawing]) -> None:
        """Reads what stands in the rows."""
        for row in rows:
            text = _Text()
            for token in row.ids:
                text.add(token, None)
            self._rows.append(text)

    def keep(self, rows: Sequence[int]) -> None:
        """The rows that stay."""
        self._rows = [self._rows[row] for row in rows]

    def take(self, row: int, tokens: Sequence[int]) -> None:
        """Compares what was drawn with what was expected."""
        for token in tokens:
            self._rows[row].add(token, self._rates)

    def propose(self, rows: Sequence[Drawing], most: Sequence[int]) -> list[list[int]]:
        """What followed each row's match, as many tokens as pay."""
        width = self._width()
        return [text.draft(min(width, room)) for text, room in zip(self._rows, most, strict=True)]

    def _width(self) -> int:
        """Tokens of the drafts that pay most."""
        lengths = [text.length for text in self._rows if text.length and self._rates.of(text.length) >= SURE]
        if not lengths or not worth.may(len(lengths), len(self._rows)):
            return 0
        expected = [worth.drawn([self._rates.of(length + n) for n in range(worth.WIDTHS[-1])]) for length in lengths]
        width, speed = worth.best(expected, len(self._rows))
        return width if speed >= PAYS else 0


class _Rates:
    """How often matches of each length went on."""

    def __init__(self) -> None:
        self._right = [WEIGHT * first for first in FIRST]
        self._tries = [float(WEIGHT)] * len(FIRST)

    def of(self, length: int) -> float:
        """The share that went on."""
        at = min(length, LONGEST) - SIZES[-1]
        return self._right[at] / self._tries[at]

    def add(self, length: int, right: bool) -> None:
        """A match of this length went on, or did not."""
        at = min(length, LONGEST) - SIZES[-1]
        self._right[at] += right
        self._tries[at] += 1
        if self._tries[at] > WINDOW:
            self._right[at] /= 2
            self._tries[at] /= 2


class _Text:
    """A row's tokens, where each few of them stood last, and the place that goes on as the end does."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._new: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in SIZES)
        self._old = self._new
        self._place = 0  # of the token that is expected
        self.length = 0  # tokens before it that stand at the end, too; 0: nothing is expected

    def add(self, token: int, rates: _Rates | None) -> None:
        """The next token; ``rates`` learn whether it was expected."""
        ids = self._ids
        right = self.length > 0 and ids[self._place] == token
        if rates and self.length:
            rates.add(self.length, right)
        ids.append(token)
        if right:
            self._place, self.length = self._place + 1, self.length + 1
        else:
            self.length = 0
        for n, size in enumerate(SIZES):
            if len(ids) < size:
                continue
            end = tuple(ids[-size:])
            if not self.length and (place := self._new[n].get(end, self._old[n].get(end))) is not None:
                self._place, self.length = place, size
            self._new[n][end] = len(ids)
        if len(self._new[-1]) >= LATEST:
            self._old, self._new = self._new, tuple({} for _ in SIZES)

    def draft(self, count: int) -> list[int]:
        """So many tokens behind the match; one that reaches the end of the text goes on with what it gave itself."""
        if not self.length:
            return []
        made = self._ids[self._place : self._place + count]
        while len(made) < count:
            made.append(made[self._place - len(self._ids) + len(made)])
        return made
