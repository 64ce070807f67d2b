"""kill -9 at random moments loses nothing; tests/kills.py does the same at length."""

import json
import random
from pathlib import Path

import kills
import numpy as np
import pytest

from mlxgpt.common.folders import resolve, tensors
from mlxgpt.common.runs import metrics


def test_a_few_kills_of_a_training(tmp_path: Path) -> None:
    counted = kills.train(tmp_path, "mlx", 3, random.Random(5), print)
    assert counted["kills"] >= 3 and counted["runs finished, bit-equal"] >= 1


def test_a_few_kills_of_a_fine_tuning(tmp_path: Path) -> None:
    counted = kills.tune(tmp_path, "mlx", 2, random.Random(5), print)
    assert counted["kills"] >= 2 and counted["runs finished, bit-equal"] >= 1


def test_a_difference_is_located(tmp_path: Path) -> None:
    """What a failure of the tests below says: the first step, the tensor, by how much, and where it was resumed."""

    def made(name: str, loss: float, value: float) -> Path:
        checkpoint = resolve.path_of(tmp_path / name, kills.STEPS)
        checkpoint.mkdir(parents=True)
        arrays = {"a": np.zeros(2, np.float32), "b": np.array([1, value], np.float32)}
        tensors.write_tensors(checkpoint / "adapters.safetensors", arrays)
        lines = [{"step": step, "split": "train", "loss": 1.0, "grad_norm": 2.0} for step in (1, 2, 3)]
        lines[1]["loss"] = loss
        (tmp_path / name / metrics.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    reference = made("reference", 1.0, 4.0)
    assert kills.difference(made("same", 1.0, 4.0), reference, [3]) == ""
    said = kills.difference(made("other", 1.5, 4.25), reference, [1, 2])
    assert "apart: [2, 'train', 1.5, 2.0], expected [2, 'train', 1.0, 2.0]" in said
    assert "1 of 2 tensors differ, most b, by 0.25" in said and said.endswith("resumed from [1, 2]")


def test_a_kill_of_a_preparation(tmp_path: Path) -> None:
    assert kills.prepare(tmp_path, 1, random.Random(3), print)["shards equal"] >= 1


def test_a_checkpoint_that_is_not_whole_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: a kill that leaves a checkpoint cut short under its final name."""
    honest = kills.killed

    def cutting(arguments: list[str], cwd: Path, after: float) -> bool:
        done = not honest(arguments, cwd, after)
        for run in cwd.glob("run-*"):
            for step in resolve.steps_of(run)[-1:]:
                weights = resolve.path_of(run, step) / "model.safetensors"
                weights.write_bytes(weights.read_bytes()[:-4])
        return not done

    monkeypatch.setattr(kills, "killed", cutting)
    with pytest.raises(kills.Damage, match=r"model\.safetensors: damaged"):
        kills.train(tmp_path, "mlx", 3, random.Random(5), print)


def test_a_few_kills_of_a_conversion(tmp_path: Path) -> None:
    assert kills.convert(tmp_path, 2, random.Random(4), print)["results equal"] >= 2


def test_a_result_that_is_not_whole_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: a kill that leaves a folder cut short under its final name."""

    def cutting(arguments: list[str], cwd: Path, after: float) -> bool:
        kills.finish(arguments, cwd)
        out = cwd / arguments[2]
        found = sorted(out.rglob("*.safetensors")) if out.is_dir() else [out]
        found[0].write_bytes(found[0].read_bytes()[:-4])
        return True

    monkeypatch.setattr(kills, "killed", cutting)
    monkeypatch.setattr(kills, "interrupted", cutting)
    monkeypatch.setattr(kills, "_ROUTES", (("", "hf"),))
    with pytest.raises(kills.Damage, match="neither the old nor the new"):
        kills.convert(tmp_path, 1, random.Random(5), print)


@pytest.mark.slow
def test_many_kills_of_a_conversion(tmp_path: Path) -> None:
    counted = kills.convert(tmp_path, 40, random.Random(7), print)
    assert counted["while it was being written"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_many_kills_of_a_fine_tuning(backend: str, tmp_path: Path) -> None:
    counted = kills.tune(tmp_path, backend, 20, random.Random(8), print)
    assert counted["runs finished, bit-equal"] >= 1 and counted["while a checkpoint was being written"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_many_kills_of_a_training(backend: str, tmp_path: Path) -> None:
    assert kills.train(tmp_path, backend, 40, random.Random(6), print)["runs finished, bit-equal"] >= 1
