"""The learning rate of every step: the documented formulas, at the ends and in between."""

import itertools
import math

import pytest

from mlxgpt.common.config import OptimConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.train import schedule

SCHEDULES = ["cosine", "linear", "constant", "wsd"]


def optim(name: str, **changes: object) -> OptimConfig:
    """A schedule with peak 0.3, floor 0.03 and 10 steps of warm-up."""
    return OptimConfig(**{"schedule": name, "lr": 0.3, "min_lr": 0.03, "warmup": 10} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_counts_from_one_and_reaches_the_peak(name: str) -> None:
    rates = [schedule.rate(optim(name), step, 100) for step in range(1, 11)]
    assert rates == [0.3 * step / 10 for step in range(1, 11)]
    assert rates[0] > 0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 3, 97, 1000])
def test_the_last_step_has_the_floor_and_no_step_rises_after_the_warm_up(name: str, steps: int) -> None:
    settings = optim(name, warmup=1, decay_fraction=0.3)
    rates = [schedule.rate(settings, step, steps) for step in range(1, steps + 1)]
    assert rates[-1] == (0.3 if name == "constant" else 0.03)
    assert max(rates) == rates[0] == 0.3
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert all(type(value) is float for value in rates)


def test_formulas_in_the_middle() -> None:
    assert schedule.rate(optim("cosine"), 55, 100) == pytest.approx(0.165, rel=1e-15)
    quarter = 0.03 + 0.27 * (1 + math.cos(math.pi / 3)) / 2
    assert schedule.rate(optim("cosine"), 40, 100) == pytest.approx(quarter, rel=1e-15)
    assert schedule.rate(optim("linear"), 40, 100) == pytest.approx(0.03 + 0.27 * 2 / 3, rel=1e-15)
    assert schedule.rate(optim("constant"), 40, 100) == 0.3


def test_wsd_is_flat_and_then_falls_over_its_share() -> None:
    settings = optim("wsd", decay_fraction=0.2)
    assert {schedule.rate(settings, step, 100) for step in range(10, 81)} == {0.3}
    assert schedule.rate(settings, 81, 100) == pytest.approx(0.03 + 0.27 * 19 / 20, rel=1e-15)
    assert schedule.rate(settings, 99, 100) == pytest.approx(0.03 + 0.27 / 20, rel=1e-15)


def test_a_schedule_without_warm_up_starts_below_its_peak_by_one_step() -> None:
    assert schedule.rate(optim("linear", warmup=0), 1, 100) == pytest.approx(0.03 + 0.27 * 0.99, rel=1e-15)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_warm_up_that_fills_the_run_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="optim.warmup = 10: expected fewer than train.steps = 10"):
        schedule.check_schedule(optim(name), 10)
    schedule.check_schedule(optim(name, decay_fraction=0.05), 11)
    schedule.check_schedule(optim("constant"), 5)


def test_wsd_whose_parts_overlap_is_refused() -> None:
    with pytest.raises(UserError, match="20 steps of decay do not fit into train.steps = 25"):
        schedule.check_schedule(optim("wsd", decay_fraction=0.8), 25)
