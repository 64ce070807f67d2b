"""How many bits each matrix gets: the choice of the lowest sum of losses that fits into a budget."""

from collections.abc import Sequence

import numpy as np

STATES = 1 << 14  # kept after each matrix; with fewer the choice is the best there is


def allocate(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """For every matrix the index of its choice, so that the losses add up to the least; None: nothing fits.

    Exact up to STATES ways that no other beats in size and loss; of more, those of nearly the same size are one. What
    is returned never exceeds the budget.

    Args:
        sizes: of each choice of each matrix.
        losses: theirs.
        budget: what the sizes may add up to.
    """
    size, loss = np.zeros(1, np.int64), np.zeros(1)
    rest = sum(min(each) for each in sizes)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # after each matrix: the choice, and the state before
    for each, cost in zip(sizes, losses, strict=True):
        rest -= min(each)
        sums = (size[:, None] + np.asarray(each, np.int64)).ravel()
        totals = (loss[:, None] + np.asarray(cost, np.float64)).ravel()
        order = np.lexsort((totals, sums))
        order = order[sums[order] + rest <= budget]
        if not order.size:
            return None
        least = np.minimum.accumulate(totals[order])
        order = order[np.append(True, least[1:] < least[:-1])]  # no smaller one has as little loss
        order = _thinned(order, sums[order])
        trail.append((order % len(each), order // len(each)))
        size, loss = sums[order], totals[order]
    state, chosen = len(size) - 1, []
    for choice, before in reversed(trail):
        chosen.append(int(choice[state]))
        state = int(before[state])
    return chosen[::-1]


def _thinned(order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """At most STATES of those in order of size: the last, which has the least loss, of each range of sizes."""
    if len(order) <= STATES:
        return order
    place = (sizes - sizes[0]) * STATES // (sizes[-1] - sizes[0] + 1)
    return order[np.append(place[1:] != place[:-1], True)]
