"""A model that tasks ask in tests: what it says follows from the text alone, or is given."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlxgpt.common.tasks.task import Continued


def from_text(*text: str) -> Continued:
    """A log-probability, a multiple of 1/8, that differs from text to text."""
    made = hashlib.sha256("\0".join(text).encode()).digest()
    return Continued(-1.0 - made[0] / 8 - made[1], made[2] % 3 == 0)


class Said:
    """A Scorer whose ids are characters: ``asked`` is what it was asked, in order."""

    context = 10**6
    chat = False

    def __init__(self, told: Mapping[str, float] | None = None, longest: int = 10**6, answer: str = "42"):
        self.asked: list[list[str]] = []
        self.cut, self._told, self._longest, self._answer = 0, told, longest, answer

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        self.asked.append([context, continuation])
        return [*map(ord, context)], [*map(ord, continuation)]

    def continuations(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], say: Callable[[str], None] = print
    ) -> list[Continued]:
        found = []
        for pair in pairs:
            context, continuation = ("".join(map(chr, ids)) for ids in pair)
            self.cut += len(context) + len(continuation) > self._longest
            told = self._told
            found.append(Continued(told[continuation], True) if told else from_text(context, continuation))
        return found

    def texts(self, texts: Sequence[str], say: Callable[[str], None] = print) -> list[float]:
        self.asked += [[text] for text in texts]
        return [from_text(text).logprob for text in texts]

    def answers(
        self, contexts: Sequence[str], stop: Sequence[str], sample: Any, say: Callable[[str], None] = print
    ) -> list[str]:
        self.asked += [[context] for context in contexts]
        return [self._answer for _ in contexts]
