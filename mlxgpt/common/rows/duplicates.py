"""Near-duplicates: validation rows that also occur, nearly or exactly, in the training split.

Rows are compared as sets of word trigrams, without case and punctuation; near means a Jaccard similarity of at least
NEAR. The search is exact: the rarest |s| - ceil(NEAR |s|) + 1 members of two near sets have one in common (prefix
filtering, Chaudhuri et al. 2006), so only such pairs are compared.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

NEAR = 0.8
_WORDS = 3
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Pair:
    """A validation row and the most similar training row; ``similarity`` is 1 if the words are the same."""

    valid: str
    train: str
    similarity: float

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"valid": self.valid, "train": self.train, "similarity": round(self.similarity, 3)}


class Worded(Protocol):
    """What is compared: a row, or what holds several."""

    @property
    def where(self) -> str:
        """File and row."""
        ...

    @property
    def words(self) -> str:
        """All its text."""
        ...


def near_duplicates(train: Sequence[Worded], valid: Sequence[Worded]) -> list[Pair]:
    """The most similar training row of each validation row that has one, in row order."""
    if not train or not valid:
        return []
    known, asked = ([_shingles(row.words) for row in rows] for rows in (train, valid))
    rarity = np.unique(np.concatenate([*known, *asked]), return_counts=True)
    by_member: dict[int, list[int]] = defaultdict(list)
    for place, members in enumerate(asked):
        for member in _rarest(members, *rarity):
            by_member[member].append(place)
    best: dict[int, tuple[float, int]] = {}
    for place, members in enumerate(known):
        for other in {v for member in _rarest(members, *rarity) for v in by_member.get(member, ())}:
            similarity = _jaccard(members, asked[other])
            if similarity >= NEAR and similarity > best.get(other, (0.0, 0))[0]:
                best[other] = (similarity, place)
    return [Pair(valid[v].where, train[t].where, similarity) for v, (similarity, t) in sorted(best.items())]


def _shingles(text: str) -> np.ndarray:
    """Distinct hashes of the word trigrams; of the whole text if it has fewer words."""
    words = _WORD.findall(text.casefold())
    count = max(1, len(words) - _WORDS + 1)
    return np.unique(np.array([hash(tuple(words[i : i + _WORDS])) for i in range(count)], np.int64))


def _rarest(members: np.ndarray, hashes: np.ndarray, counts: np.ndarray) -> list[int]:
    """The members of which a near set shares at least one."""
    order = np.argsort(counts[np.searchsorted(hashes, members)], kind="stable")
    return members[order[: len(members) - math.ceil(NEAR * len(members)) + 1]].tolist()


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
