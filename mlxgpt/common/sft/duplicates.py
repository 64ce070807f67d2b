"""Validation rows that training rows give away: the same words, or nearly.

Rows are sets of three words in a row, without case and punctuation; near is a Jaccard similarity of at least NEAR. The
pairs are found exactly: of two sets that are near, the rarest |s| - ceil(NEAR |s|) + 1 members of each share one
(prefix filtering, Chaudhuri et al. 2006), so only pairs that do are compared.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.common.sft.rows import Row

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


def near_duplicates(train: Sequence[Row], valid: Sequence[Row]) -> list[Pair]:
    """For each validation row that has a training row like it, the likest one, in the order of the rows."""
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
    """Distinct hashes of every three words in a row; of all words where there are fewer."""
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
