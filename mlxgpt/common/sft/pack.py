"""Examples into batches: several in one bin (packing), or one each, of similar length, padded.

Packed examples have segment ids (from 1; 0 is padding) and positions that start at 0 in each: an example attends to
itself only, and has the losses that it has alone. An epoch's plan is a pure function of (seed, epoch): a permutation,
cut into windows, each packed first-fit-decreasing, and the bins shuffled.

B bins of a batch, T tokens of a bin.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.batch import Batch

_WINDOW = 64  # bins per window: enough for a good fit, few enough to keep the order random
Plan = list[tuple[int, ...]]
"""The examples of each bin, by index."""


@dataclass(frozen=True)
class Example:
    """One row in tokens. Positions with weight 0 are not targets."""

    where: str  # file and row
    tokens: np.ndarray  # (n,) int32
    targets: np.ndarray  # (n,) int32
    weights: np.ndarray  # (n,) float32

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the first one that is trained on."""
        return self.tokens[: int(np.argmax(self.weights > 0)) + 1]

    @property
    def last_answer(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before the last answer, and the answer's tokens."""
        asked = np.flatnonzero(self.weights)
        gaps = np.flatnonzero(np.diff(asked) > 1)
        start, stop = int(asked[gaps[-1] + 1] if len(gaps) else asked[0]), int(asked[-1]) + 1
        return self.tokens[: start + 1], self.targets[start:stop]


def pack(lengths: np.ndarray, order: np.ndarray, size: int) -> Plan:
    """Examples in bins of ``size`` tokens: in each window of ``order``, longest first into the first bin with room."""
    plan: Plan = []
    filled = np.cumsum(lengths[order]) // (_WINDOW * size)
    for window in np.split(order, np.flatnonzero(np.diff(filled)) + 1):
        bins: list[list[int]] = []
        room = np.full(len(window), size)
        for row in window[np.argsort(-lengths[window], kind="stable")].tolist():
            place = int(np.argmax(room >= lengths[row]))
            if place == len(bins):
                bins.append([])
            bins[place].append(row)
            room[place] -= lengths[row]
        plan += [tuple(rows) for rows in bins]
    return plan


def packed_batch(examples: Sequence[Example], bins: Plan, size: int) -> Batch:
    """A batch of bins with ``size`` tokens each."""
    ints = np.zeros((4, len(bins), size), np.int32)
    weights = np.zeros((len(bins), size), np.float32)
    for b, rows in enumerate(bins):
        start = 0
        for number, row in enumerate(rows, 1):
            example = examples[row]
            stop = start + len(example)
            ints[0, b, start:stop], ints[1, b, start:stop] = example.tokens, example.targets
            ints[2, b, start:stop], ints[3, b, start:stop] = np.arange(len(example)), number
            weights[b, start:stop] = example.weights
            start = stop
    names = tuple(_named([examples[row].where for row in rows]) for rows in bins)
    return Batch(ints[0], ints[1], weights, positions=ints[2], segments=ints[3], row_ids=names)


def _named(places: list[str]) -> str:
    """``FILE rows 3, 17`` of places in one file."""
    file = places[0].rpartition(" row ")[0]
    numbers = [place.rpartition(" row ")[2] for place in places]
    return places[0] if len(places) == 1 else f"{file} rows {', '.join(numbers)}"


def padded_plan(lengths: np.ndarray, order: np.ndarray, rows: int) -> list[Plan]:
    """Batches of up to ``rows`` examples of similar length, one per bin: windows of ``order``, sorted by length."""
    made = []
    for start in range(0, len(order), _WINDOW * rows):
        window = order[start : start + _WINDOW * rows]
        window = window[np.argsort(-lengths[window], kind="stable")]
        made += [[(row,) for row in window[at : at + rows].tolist()] for at in range(0, len(window), rows)]
    return made


def bucket(length: int, most: int) -> int:
    """``length`` rounded up to 32, 48, 64, 96, 128, 192 ...: two shapes per doubling, so that compilations are few."""
    size = 32
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, most)


def padded_batch(examples: Sequence[Example], bins: Plan, most: int, placed: bool = False) -> Batch:
    """A batch of one example per bin, padded on the right to the bucket of the longest.

    ``placed``: with positions, by which a model sees where an example ends.
    """
    size = bucket(max(len(examples[row]) for (row,) in bins), most)
    batch = packed_batch(examples, bins, size)
    positions = batch.positions if placed else None
    return Batch(batch.tokens, batch.targets, batch.weights, positions, row_ids=batch.row_ids)


def shuffled(plan: list, seed: int, epoch: int) -> list:
    """The plan, shuffled for the epoch."""
    return [plan[n] for n in rng.permutation(seed, "sft bins", epoch, count=len(plan))]


def digest(examples: Sequence[Example], *plans: object) -> str:
    """sha256 of the examples and of their plans."""
    total = hashlib.sha256()
    for example in examples:
        for array in (example.tokens, example.targets, example.weights):
            total.update(len(array).to_bytes(8, "little"))
            total.update(array.tobytes())
    total.update(repr(plans).encode())
    return total.hexdigest()
