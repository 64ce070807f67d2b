"""Validation rows that training rows give away: the same words, or nearly.

Rows are sets of three words in a row, without case and punctuation; near is a Jaccard similarity of at least NEAR. The
pairs are found exactly: of two sets that are near, the rarest |s| - ceil(NEAR |s|) + 1 members of each share one
(prefix filtering, Chaudhuri et al. 2006), so only pairs that do are compared.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.common.sft_rows import Row

NEAR = 0.8
_WORDS = 3
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Pair:
    """A validation row and the training row that is most like it; ``similarity`` is 1 where the words are the same."""

    valid: str
    train: str
    similarity: float

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"valid": self.valid, "train": self.train, "similarity": round(self.similarity, 3)}


def find(train: Sequence[Row], valid: Sequence[Row]) -> list[Pair]:
    """For each validation row that has a training row like it, the likest one, in the order of the rows."""
    sets = [[_shingles(row.words) for row in rows] for rows in (train, valid)]
    rarity = Counter(member for rows in sets for members in rows for member in members)
    by_member: dict[int, list[int]] = defaultdict(list)
    for place, members in enumerate(sets[1]):
        for member in _rarest(members, rarity):
            by_member[member].append(place)
    best: dict[int, tuple[float, int]] = {}
    for place, members in enumerate(sets[0]):
        for other in {v for member in _rarest(members, rarity) for v in by_member.get(member, ())}:
            similarity = _jaccard(members, sets[1][other])
            if similarity >= NEAR and similarity > best.get(other, (0.0, 0))[0]:
                best[other] = (similarity, place)
    return [Pair(valid[v].where, train[t].where, similarity) for v, (similarity, t) in sorted(best.items())]


def _shingles(text: str) -> list[int]:
    """Distinct hashes of every three words in a row, sorted; of all words where there are fewer."""
    words = _WORD.findall(text.casefold())
    count = max(1, len(words) - _WORDS + 1)
    return sorted({hash(tuple(words[i : i + _WORDS])) for i in range(count)})


def _rarest(members: list[int], rarity: Counter[int]) -> list[int]:
    """The members of which a near set shares at least one."""
    return sorted(members, key=lambda member: (rarity[member], member))[
        : len(members) - math.ceil(NEAR * len(members)) + 1
    ]


def _jaccard(a: list[int], b: list[int]) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
