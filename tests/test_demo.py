"""The demo's verdict: what it compares, and that it can fail."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import cli
from mlxgpt.commands import demo
from mlxgpt.common.doctor import answers
from mlxgpt.common.doctor.answers import Answer, Tie
from mlxgpt.common.errors import RunError


def curves(**changed: float) -> dict[str, dict[int, float]]:
    """Equal curves of 10 steps, the second from step 6; ``torch_7=0.1`` adds to one loss."""
    made = {leg: {step: 5 - step / 10 for step in range(1, 11)} for leg in (*demo.LEGS, *demo.TUNED)}
    for place, difference in changed.items():
        leg, _, step = place.rpartition("_")
        made[leg.replace("_", "-")][int(step)] += difference
    return made


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({}, []),
        ({"torch_1": 0.5e-6, "torch_7": 0.9e-4, "torch_resumed_8": -1.9e-5}, []),
        ({"torch_resumed_5": 1.0}, []),  # before it was resumed
        ({"torch_1": 2e-6}, [1]),
        ({"torch_10": -1.1e-4}, [10]),
        ({"torch_resumed_6": 2.1e-5}, [6]),
        ({"torch_2": math.nan}, [2]),
        ({"mlx_9": math.nan}, [9, 9]),
        ({"torch_resumed_10": math.inf}, [10]),
    ],
)
def test_each_gate_fails_on_its_own(changed: dict[str, float], fails: list[int]) -> None:
    found = demo.compare(curves(**changed), 10, 5, demo.Gates())
    assert [one.step for one in found if not one.agrees] == fails


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({}, []),
        ({"lora_mlx_1": 2e-6}, [1]),
        ({"lora_torch_7": 1.1e-4}, [7]),
        ({"lora_torch_7": math.nan}, [7]),
        ({"torch_7": 1.0}, []),
    ],
)
def test_the_gates_of_lora_fail_on_their_own(changed: dict[str, float], fails: list[int]) -> None:
    found = demo.compare_tuned(curves(**changed), 10, demo.Gates())
    assert [one.step for one in found if not one.agrees] == fails


def answered(*texts: str) -> list[Answer]:
    return [Answer(text, tuple(map(ord, text))) for text in texts]


def test_answers_that_differ_are_shown() -> None:
    same = answered("one", "two", "three", "four")
    tie, other = Tie(2, 1e-6, 2e-5), Tie(3, 1e-3, 2e-5)
    shown = demo.side_by_side(
        [*answered(""), *same[1:]], same, [*same[:2], *answered("thin", "for")], [None, None, tie, other]
    )
    lines = shown.splitlines()
    assert lines[1].endswith("(nothing)") and lines[2].endswith("one") and lines[3].endswith("the same")
    assert (
        lines[11].endswith("PyTorch         thin") and lines[12] == "    a tie at token 3: margin 1.0e-06, gate 2e-05"
    )
    assert (
        lines[16].endswith("PyTorch         for") and lines[17] == "    no tie at token 4: margin 1.0e-03, gate 2e-05"
    )


@pytest.mark.parametrize(
    ("ties", "word"),
    [
        ([None, None], "are the same in both"),
        ([None, Tie(2, 2e-5, 2e-5)], "are the same in both, up to ties"),
        ([Tie(2, 2.1e-5, 2e-5), Tie(2, 0.0, 2e-5)], "DIFFER"),
        ([Tie(0, math.nan, 2e-5)], "DIFFER"),
    ],
)
def test_answers_may_part_at_a_tie_alone(ties: list[Tie | None], word: str) -> None:
    assert demo._verdict([], True, ties)[-1] == f"verdict: the answers of the adapter {word}"


LOGITS = {"mlxgpt": [-3.0, 4.0, 4.0 - 4e-6, 1.0, -10.0], "torch_ref": [-3.0, 4.0 - 6e-6, 4.0, 1.0, -10.0]}


@pytest.mark.parametrize(
    ("mlx", "torch", "found"),
    [
        ((7, 1, 3), (7, 1, 3), None),
        ((7, 1, 3), (7, 2), Tie(1, 6e-7, 1e-6)),
        ((7, 1, 3), (7, 3), Tie(1, 0.3, 1e-6)),  # no second-best token at all
        ((7, 1, 3), (7, None), Tie(1, 6e-7, 1e-6)),  # 2 ends a text
        ((7, 1, 3), (7,), Tie(1, 6e-7, 1e-6)),  # whatever stopped it
    ],
)
def test_a_margin_is_that_of_the_first_other_token(
    mlx: tuple, torch: tuple, found: Tie | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(package: str, run: Path, ids: list[int]) -> np.ndarray:
        assert ids == [5, 6, 7]
        return np.array(LOGITS[package])

    monkeypatch.setattr(answers, "_logits", logits)
    got = answers.tie(tuple(LOGITS), Path("run"), [5, 6], Answer("", mlx), Answer("", torch), {0, 2}, 1e-6)
    assert (got is None) == (found is None)
    if got and found:
        assert (got.at, got.agrees) == (found.at, found.agrees) and got.margin == pytest.approx(found.margin, rel=1e-3)


@pytest.mark.parametrize(("device", "legs"), [("Apple M2 Pro", ["doctor --quick"]), ("cpu", ["train pydocs"])])
def test_on_a_gpu_doctor_comes_first_and_its_failure_ends_the_demo(
    device: str, legs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from mlxgpt import device as devices

    started = []

    class Failing(subprocess.Popen):
        def __init__(self, command: list[str]) -> None:
            started.append(" ".join(command[3:5]))
            super().__init__([sys.executable, "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(devices, "describe", lambda _: {"device": device})
    monkeypatch.setattr(subprocess, "Popen", Failing)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert started == legs and f"leg {0 if legs[0][0] == 'd' else 1} of the demo" in capsys.readouterr().err


def test_a_missing_step_is_no_agreement() -> None:
    short = curves()
    del short["torch"][10]
    with pytest.raises(RunError, match="no loss of step 10"):
        demo.compare(short, 10, 5, demo.Gates())


def test_a_skipped_step_reads_as_nan(tmp_path: Path) -> None:
    lines = [{"step": 1, "split": "train", "loss": None}, {"step": 1, "split": "val", "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert math.isnan(demo.losses(tmp_path, "train")[1])
    assert demo.losses(tmp_path, "val") == {1: 2.0}


def test_the_table_shows_all_three() -> None:
    shown = demo.table(curves(), {leg: {10: 4.5} for leg in demo.LEGS}, 10, 5).splitlines()
    assert shown[0].split() == ["step", "MLX", "1..10", "torch", "6..10", "torch", "1..10"]
    assert shown[2].split() == ["1", "4.900000", "4.900000", "4.900000"]
    assert shown[-1].split() == ["validation", "10", *["4.500000"] * 3]


def test_a_folder_that_is_no_run_stays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "thesis.txt").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "torch: exists and is not a run" in capsys.readouterr().err
    assert (tmp_path / "torch" / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "code"), [(None, 0), ("first", 1), ("answers", 1)])
def test_all_legs(tmp_path: Path, gate: str | None, code: int) -> None:
    """All of it, tiny; with a gate that nothing can pass; and with an adapter that answers otherwise in PyTorch."""
    program = f"""
import sys
from mlxgpt import cli
from mlxgpt.commands import demo
tiny = "model.n_layer=1 model.n_embd=16 optim.warmup=2 train.batch_size=2 train.eval_batches=1 train.keep=0"
demo.PRESET = demo.SLOW_PRESET = (6, tiny.split())
demo.TUNE_PRESET = (3, "optim.warmup=1 train.eval_batches=1 train.batch_size=1 sample.max_tokens=0".split())
if {gate!r} == "answers":
    told = demo.answers.ask
    def ask(package, *args):
        found = told(package, *args)
        return [demo.Answer(each.text, (len(package), *each.tokens)) for each in found]
    demo.answers.ask = ask
elif {gate!r}:
    impossible = demo.Gates(**{{{gate!r}: -1.0}})
    demo.Gates, demo.ACCELERATOR_GATES = lambda: impossible, impossible
sys.exit(cli.main(["demo", "--out", {str(tmp_path)!r}]))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    assert ("verdict: the curves agree" in run.stdout) == (gate != "first")
    assert ("over the gate" in run.stdout) == (gate == "first")
    assert ("are the same in both" in run.stdout) == (gate != "answers")
