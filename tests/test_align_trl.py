"""Both engines against trl's curves, which tests/align_trl.py makes; what trl lacks against float64; power of both.

The first steps in the default suite, all 20 in the slow one.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import align_cases
import align_rollouts
import numpy as np
import pytest
from align_cases import CASES, CURVES, STEPS, UNTRIED, Case
from align_rollouts import METHODS

from mlxgpt.common.batch import Batch

FIRST, ALL = 1e-6, 1e-4  # of step 1, and of every step: of the loss, relative where that is over 1
SOME = 5  # steps of the default suite
HELD = json.loads(CURVES.read_text())["curves"]
BACKENDS = ("mlxgpt", "torch_ref")


def engine_of(case: Case, backend: str, clip: float = align_cases.OPTIM.clip, compile: str = "off") -> Any:
    made = align_cases.recipe(case)
    made = dataclasses.replace(
        made, optim=dataclasses.replace(made.optim, clip=clip), train=dataclasses.replace(made.train, compile=compile)
    )
    base = align_cases.weights(made)
    own = align_cases.adapter(case, made, base)
    return importlib.import_module(f"{backend}.engine").Engine(made, base | own, device="cpu")


def run(case: Case, backend: str, count: int, change: Callable[[Batch], Batch] | None = None) -> dict[str, list[float]]:
    steps = [change(batch) if change else batch for batch in align_cases.batches(case)[:count]]
    return align_cases.train(case, engine_of(case, backend), steps, count)


def off(found: dict[str, list[float]], expected: dict[str, list[float]]) -> tuple[float, float]:
    """The largest difference of step 1's loss, and of any step's loss, margin and (a tenth of its) norm."""
    worst = []
    for name in expected:
        ours = np.array(found[name])
        theirs = np.array(expected[name][: len(ours)])
        each = np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))
        worst.append(each * (0.1 if name == "norm" else 1.0))
    made = np.nan_to_num(np.stack(worst), nan=np.inf)
    return float(made[0, 0]), float(made.max())


def check(name: str, backend: str, count: int) -> None:
    first, worst = off(run(CASES[name], backend, count), HELD[name])
    print(f"{name} {backend}: step 1 {first:.1e}, {count} steps {worst:.1e}")
    assert first <= FIRST and worst <= ALL, (first, worst)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_curve_begins_as_trls(name: str, backend: str) -> None:
    check(name, backend, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_curve_is_trls(name: str, backend: str) -> None:
    check(name, backend, STEPS)


@pytest.mark.parametrize("name", ["dpo", "cut", "ipo", "sft", "kto", "orpo", "centered"])
def test_our_source_makes_these_rows(name: str, tmp_path: Path) -> None:
    found = align_cases.source(CASES[name], tmp_path)
    made = align_cases.train_from(found, CASES[name], engine_of(CASES[name], "torch_ref"), 3)
    first, worst = off(made, {key: HELD[name][key] for key in made})
    print(f"{name}: step 1 {first:.1e}, 3 steps {worst:.1e}")
    assert first <= FIRST and worst <= ALL, (first, worst)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_curve_of_our_source_is_trls(name: str, backend: str, tmp_path: Path) -> None:
    made = align_cases.train_from(align_cases.source(CASES[name], tmp_path), CASES[name],
                                  engine_of(CASES[name], backend, compile="auto"), STEPS)  # fmt: skip
    first, worst = off(made, {key: HELD[name][key] for key in made})
    print(f"{name} {backend}: step 1 {first:.1e}, all {worst:.1e}")
    assert first <= FIRST and worst <= ALL, (first, worst)


@pytest.mark.parametrize("name", ["reward", "orpo"])
def test_compiled_it_is_the_same(name: str) -> None:
    case = CASES[name]
    made = align_cases.train(case, engine_of(case, "mlxgpt", compile="on"), align_cases.batches(case), 2)
    assert off(made, HELD[name])[1] <= ALL


def run_method(name: str, backend: str, count: int, **rl: Any) -> dict[str, list[float]]:
    made = align_rollouts.recipe(METHODS[name])
    assert made.rl
    made = dataclasses.replace(made, rl=dataclasses.replace(made.rl, **rl))
    engine = importlib.import_module(f"{backend}.engine").Engine(made, align_cases.weights(made), device="cpu")
    return align_rollouts.train(METHODS[name], engine, count)


def check_method(name: str, backend: str, count: int) -> None:
    first, worst = off(run_method(name, backend, count), HELD[name])
    print(f"{name} {backend}: step 1 {first:.1e}, {count} steps {worst:.1e}")
    assert first <= FIRST and worst <= ALL, (first, worst)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", METHODS)
def test_recorded_rollouts_begin_as_trls(name: str, backend: str) -> None:
    check_method(name, backend, 4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", METHODS)
def test_recorded_rollouts_are_trls(name: str, backend: str) -> None:
    check_method(name, backend, STEPS)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dapo", {"temperature": 1.0}),
        ("dapo", {"mean": "sequence"}),
        ("dr_grpo", {"mean": "token"}),
        ("grpo", {"kl": 0.08}),
        ("grpo", {"clip": 0.02}),
        ("rloo", {"method": "grpo"}),
    ],
)
def test_other_settings_are_another_curve(name: str, wrong: dict[str, Any]) -> None:
    assert off(run_method(name, "torch_ref", 4, **wrong), HELD[name])[1] > 3 * ALL


@pytest.mark.slow
def test_trl_makes_these_curves_again() -> None:
    pytest.importorskip("trl")
    align_trl = importlib.import_module("align_trl")
    for name in align_trl.ALL:
        assert align_trl.again(name) <= 1e-5, name


# what trl does not have


def cdpo(x: np.ndarray, smoothing: float) -> np.ndarray:
    """Losses (P,) in float64 of beta times the pairs' differences: Mitchell 2023."""
    return (1 - smoothing) * np.logaddexp(0, -x) + smoothing * np.logaddexp(0, x)


def swapped(batch: Batch) -> Batch:
    """The better answer of each pair for the worse."""
    turn = np.arange(len(batch.tokens)).reshape(-1, 2)[:, ::-1].reshape(-1)
    held = {name: array[turn] for name, array in batch.beside.items()}
    whole = dataclasses.replace(batch, tokens=batch.tokens[turn], targets=batch.targets[turn], beside=held)
    return dataclasses.replace(whole, weights=batch.weights[turn])


@pytest.mark.parametrize("backend", BACKENDS)
def test_cdpo_is_the_papers(backend: str) -> None:
    case = UNTRIED["cdpo"]
    made, smoothing = align_cases.recipe(case).prefer, case.prefer["smoothing"]
    assert made
    engine, steps = engine_of(case, backend), align_cases.batches(case)[:3]
    first = [align_cases.logps(engine, batch) for batch in steps]
    for number, batch in enumerate(steps):
        each = align_cases.logps(engine, batch) - first[number]
        expected = cdpo(made.beta * (each[0::2] - each[1::2]), smoothing).mean()
        batch = dataclasses.replace(batch, beside={"reference": first[number].astype(np.float32)})
        stats = engine.train_step(number + 1, [batch], 1e-3)
        assert abs(stats.loss_sum / stats.weight - expected) <= FIRST

    def gradient(prefer: dict[str, Any], given: Batch) -> dict[str, np.ndarray]:
        """By the first moment after a step from 0."""
        engine = engine_of(dataclasses.replace(case, prefer=prefer), backend, clip=0.0)
        engine.train_step(1, [given], 1e-3)
        return engine.snapshot()["m"]

    batch = dataclasses.replace(steps[1], beside={"reference": (first[1] - np.arange(8) % 3).astype(np.float32)})
    whole = gradient(case.prefer, batch)
    right, wrong = gradient({}, batch), gradient({}, swapped(batch))
    for name, array in whole.items():
        expected = (1 - smoothing) * right[name] + smoothing * wrong[name]
        assert np.abs(array - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1e-6), name


# each must be seen


def without_the_prompt(batch: Batch) -> Batch:
    """ORPO's likelihood of the answer alone."""
    counted = np.array(batch.weights)
    counted[1::2] = 0
    return dataclasses.replace(batch, beside={"nll": counted * np.float32(align_cases.BATCH / counted.sum())})


def other_side(batch: Batch) -> Batch:
    """A score at the last column, as if rows were padded on the left."""
    held = np.zeros_like(batch.weights)
    held[:, -1] = 1
    return dataclasses.replace(batch, weights=held)


def shifted(batch: Batch) -> Batch:
    """Logits off by one."""
    return dataclasses.replace(batch, weights=np.roll(batch.weights, 1, axis=1))


def of_the_prompt(batch: Batch) -> Batch:
    """An answer that begins with its prompt's last token."""
    return dataclasses.replace(batch, weights=np.maximum(batch.weights, np.roll(batch.weights, -1, axis=1)))


def without_the_end(batch: Batch) -> Batch:
    """An answer whose end is not trained."""
    return dataclasses.replace(batch, weights=batch.weights * np.roll(batch.weights, -1, axis=1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("orpo", without_the_prompt),
        ("reward", other_side),
        ("dpo", shifted),
        ("ipo", of_the_prompt),  # elsewhere the two of a pair take it off each other
        ("dpo", without_the_end),
    ],
)
def test_other_rows_are_another_curve(name: str, change: Callable[[Batch], Batch]) -> None:
    assert off(run(CASES[name], "torch_ref", 3, change), HELD[name])[1] > 10 * ALL


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dpo", "simpo", "robust", "kto"])
def test_another_formula_is_another_curve(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preference = importlib.import_module(f"{backend}.preference")
    told, pairs, judge = preference.told, preference.pairs, preference.judge

    def mean_for_sum(*args: Any) -> Any:
        found, counts, each = told(*args)
        return found / counts, counts, each

    def scaled(model: Any, batch: Any, config: Any, *args: Any) -> Any:
        return pairs(model, batch, dataclasses.replace(config, gamma=config.gamma * config.beta), *args)

    def unscaled(model: Any, batch: Any, config: Any, *args: Any) -> Any:
        terms, sums = pairs(model, batch, config, *args)
        return terms * (1 - 2 * config.smoothing), sums

    def without_kl(model: Any, batch: Any, *args: Any) -> Any:
        return judge(model, batch._replace(beside=batch.beside | {"kl": batch.beside["kl"] * 0}), *args)

    broken = {"dpo": ("told", mean_for_sum), "simpo": ("pairs", scaled), "robust": ("pairs", unscaled),
              "kto": ("judge", without_kl)}  # fmt: skip
    monkeypatch.setattr(preference, *broken[name])
    assert off(run(CASES[name], backend, 3), HELD[name])[1] > 3 * ALL


def test_a_reference_that_drifts_is_another_curve() -> None:
    case = CASES["dpo"]
    engine = engine_of(case, "torch_ref")
    train = engine.train_step

    def drifting(step: int, parts: list[Batch], lr: float) -> Any:
        now = align_cases.logps(engine, parts[0]).astype(np.float32)
        return train(step, [dataclasses.replace(parts[0], beside={"reference": now})], lr)

    engine.train_step = drifting
    assert off(align_cases.train(case, engine, align_cases.batches(case), 3), HELD["dpo"])[1] > 10 * ALL
