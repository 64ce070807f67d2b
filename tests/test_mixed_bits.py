"""Mixed bits: the allocation is the best that fits, sensitivities order the matrices, and the result beats uniform."""

import itertools

import numpy as np
import pytest

from convert.quantize import allocation
from convert.quantize.allocation import allocate


def problem(seed: int, matrices: int = 5, choices: int = 4) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    sizes = np.cumsum(draw.integers(1, 40, (matrices, choices)), axis=1)
    losses = np.sort(draw.random((matrices, choices)), axis=1)[:, ::-1] * draw.exponential(size=(matrices, 1))
    return sizes, losses


def totals(chosen: list[int], *tables: np.ndarray) -> list[float]:
    return [float(sum(table[row, at] for row, at in enumerate(chosen))) for table in tables]


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    sizes, losses = problem(seed)
    least, most = sizes[:, 0].sum(), sizes[:, -1].sum()
    for budget in np.linspace(least, most, 7).astype(int):
        ways = [list(way) for way in itertools.product(range(4), repeat=5) if totals(list(way), sizes)[0] <= budget]
        best = min(totals(way, losses)[0] for way in ways)
        size, loss = totals(allocate(sizes.tolist(), losses.tolist(), int(budget)) or [], sizes, losses)
        assert size <= budget and loss == pytest.approx(best, rel=1e-12)


def test_nothing_fits_below_the_smallest() -> None:
    sizes, losses = problem(0)
    least = int(sizes[:, 0].sum())
    assert allocate(sizes.tolist(), losses.tolist(), least) == [0] * 5
    assert allocate(sizes.tolist(), losses.tolist(), least - 1) is None


def test_many_matrices_stay_within_the_budget_and_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, losses = problem(3, matrices=60)
    budget = int(sizes.mean() * 60)
    exact = allocate(sizes.tolist(), losses.tolist(), budget)
    assert exact == allocate(sizes.tolist(), losses.tolist(), budget)
    monkeypatch.setattr(allocation, "STATES", 300)  # fewer than there are sizes
    thinned = allocate(sizes.tolist(), losses.tolist(), budget)
    assert exact and thinned and thinned != [0] * 60
    (size, loss), (_, best) = (totals(each, sizes, losses) for each in (thinned, exact))
    assert size <= budget and best <= loss <= 1.02 * best
