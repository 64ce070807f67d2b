"""Drafts: what rows may draw next, guessed cheaply, so that the model reads several tokens in one pass and keeps those
that it draws itself (Leviathan et al. 2023; n-grams of the text: Saxena 2023).

A token is drawn from logits and noise that has an address, so what is kept is what would have been drawn one by one, at
every temperature.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from mlxgpt.common.inference.choosing import Choice


class Drawing(Protocol):
    """A row that draws, as a drafter knows it."""

    @property
    def ids(self) -> Sequence[int]:
        """Prompt and what was drawn."""
        ...

    def after(self, tokens: Sequence[int]) -> Choice:
        """How the next token is drawn, supposing that ``tokens`` are drawn before it."""
        ...


class Drafter(Protocol):
    """Guesses for the rows of a Batch, which join and leave with them, in their order."""

    @property
    def hot(self) -> bool:
        """Whether guesses are worth a pass now; where not, rows draw one by one, and ``take`` tells what."""
        ...

    def join(self, rows: Sequence[Drawing]) -> None:
        """Rows that were added at the end."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """The rows that stay."""
        ...

    def take(self, row: int, tokens: Sequence[int]) -> None:
        """What a row drew; of a draft as well."""
        ...

    def propose(self, rows: Sequence[Drawing], most: Sequence[int]) -> list[list[int]]:
        """What each row may draw next, () for nothing, at most so many tokens each; ``take`` told all of ``ids``."""
        ...


def room(config: Any, lengths: Sequence[int], left: Sequence[int], border: int | None) -> list[int]:
    """How many tokens of a draft each row may have.

    Args:
        config: ModelConfig.
        lengths: of the rows, the token that is read now included.
        left: how many tokens a draft of each may have at all.
        border: where the rotary frequencies change with the length, None where they do not.
    """
    common = config.block_size - max(lengths)
    made = []
    for length, rest in zip(lengths, left, strict=True):
        inside = common if border is None else min(common, border - length)
        made.append(max(0, min(inside, rest)))
    return made
