"""Mixed bits: the allocation is the best that fits, sensitivities order the matrices, and the result beats uniform."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantizing

from convert.quantize import allocation, mixed
from convert.quantize.allocation import allocate
from convert.quantize.run import Report, quantize
from mlxgpt.common.errors import UserError


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


def made(place: Path, name: str, bits: str, method: str = "rtn", dtype: str = "float32", **more: Any) -> Report:
    source, data, held = quantizing.model(place, name, dtype), quantizing.text(place), quantizing.text(place, 8, 5)
    words = {"group_size": 32, "data": data, "eval_data": held, "backend": "torch", "force": True} | more
    return quantize(source, place / "q", bits, method, **words)


@pytest.mark.parametrize("name", quantizing.NAMES)
def test_mixed_bits_beat_uniform_ones_of_the_same_size(name: str, tmp_path: Path) -> None:
    methods = ("gptq", "rtn") if name == "llama" else ("rtn",)
    reports = {}
    for method in methods:
        uniform = made(tmp_path, name, "4", method)
        best = reports[method] = made(tmp_path, name, f"mixed:{uniform.bits_per_weight}", method)
        assert best.bits_per_weight <= uniform.bits_per_weight
        assert best.kl and uniform.kl and best.kl < uniform.kl
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]
    own = [each["bits"] for each in said.values() if isinstance(each, dict)]
    assert own and all(bits != said["bits"] for bits in own)
    assert sorted(own) == sorted(bits for bits in reports[methods[-1]].matrix_bits.values() if bits != said["bits"])


@pytest.mark.parametrize("target", [3.7, 5.25])
def test_the_target_is_never_exceeded(target: float, tmp_path: Path) -> None:
    """With scales in 16 bits, of which a group of 32 has two: 1 bit a weight."""
    report = made(tmp_path, "qwen3", f"mixed:{target}", dtype="bfloat16")
    assert target - 0.25 < report.bits_per_weight <= target


def test_the_choice_is_the_same_with_mlx(tmp_path: Path) -> None:
    chosen = [made(tmp_path, "llama", "mixed:5.5", backend=backend) for backend in ("torch", "mlx")]
    assert chosen[0].matrix_bits == chosen[1].matrix_bits
    assert len(set(chosen[0].matrix_bits.values())) > 1


def test_less_than_two_bits_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "expected_losses", None)
    with pytest.raises(UserError, match=r"--bits mixed:3: all matrices at 2 bits make 4\.\d+ bits per weight"):
        made(tmp_path, "llama", "mixed:3")
    assert not (tmp_path / "q").exists()


def test_sensitivities_turned_round_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: what can bear the least gets the fewest bits."""
    right = made(tmp_path, "llama", "mixed:6")
    measured = mixed.expected_losses

    def turned(*args: Any) -> dict[str, dict[int, float]]:
        found = measured(*args)
        return {name: {bits: loss / each[3] ** 2 for bits, loss in each.items()} for name, each in found.items()}

    monkeypatch.setattr(mixed, "expected_losses", turned)
    wrong = made(tmp_path, "llama", "mixed:6")
    assert right.kl and wrong.kl and wrong.kl > 1.2 * right.kl
