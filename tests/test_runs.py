"""mlxgpt runs and runs check: what state a run is in, and which byte of it is not as it was written."""

import fcntl
import json
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from test_report import make_run

import mlxgpt
from mlxgpt import cli
from mlxgpt.commands.look import runs as runs_command
from mlxgpt.common.batch import State
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import params
from mlxgpt.common.runs import checkpoint, plots, run_folder
from mlxgpt.common.runs import summary as run_summary
from mlxgpt.common.runs.checkpoint import RunState

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16)


def save(run: Path, step: int) -> Path:
    """A checkpoint of a tiny model."""
    weights = params.init_params(CONFIG, 1)
    zeros = {name: np.zeros_like(value) for name, value in weights.items()}
    state = RunState(1, {}, {}, "mlx", {}, step=step, best={"step": step, "loss": 1.0})
    return checkpoint.write(run, State(params=weights, m=zeros, v=zeros, t=step), CONFIG, None, state, keep=0)[0]


def listed(place: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    capsys.readouterr()
    assert cli.main(["runs", str(place), "--json"]) == 0
    return {line["name"]: line for line in json.loads(capsys.readouterr().out)}


def test_runs_are_listed_by_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("done", 12), ("early", 5), ("held", 5), ("bad", 5)):
        make_run(tmp_path / name, steps=steps)
    save(tmp_path / "early", 4)
    (tmp_path / "bad" / "metrics.jsonl").write_text("no\n{}\n")
    (tmp_path / "other").mkdir()
    with run_folder.locked(tmp_path / "held"):
        found = listed(tmp_path, capsys)
    assert {name: line["status"] for name, line in found.items()} == {
        "done": "finished", "early": "stopped", "held": "running", "bad": "damaged",
    }  # fmt: skip
    assert found["done"]["best_loss"] == pytest.approx(3.7) and found["done"]["best_step"] == 12
    assert (found["early"]["step"], found["early"]["steps"], found["early"]["why"]) == (5, 12, "at step 4")
    assert found["early"]["size"] > 10_000
    assert listed(tmp_path / "done", capsys).keys() == {"done"}
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "3.7000" in capsys.readouterr().out


def test_the_lock_is_seen_and_not_taken(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    with run_folder.locked(run):
        assert run_folder.holder(run)
    assert run_folder.holder(run) == ""
    with run_folder.locked(run):
        pass


def test_a_sound_run_passes_and_each_damage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "one")
    place = save(run, 12)
    assert cli.main(["runs", "check", str(run)]) == 0
    assert "nothing damaged" in capsys.readouterr().out

    for file in sorted(path for path in place.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(flipped) // 2] ^= 1
        file.write_bytes(flipped)
        assert cli.main(["runs", "check", str(run), "--json"]) == 1, file
        report = json.loads(capsys.readouterr().out)
        assert not report["sound"] and len(report["damage"]) == 1
        assert file.name in report["damage"][0] or file.name == "state.json", report
        file.write_bytes(whole)

    (place / "stray.bin").write_bytes(b"1")
    assert cli.main(["runs", "check", str(run)]) == 1
    assert "stray.bin: not in state.json" in capsys.readouterr().out
    (place / "stray.bin").unlink()

    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    assert cli.main(["runs", "check", str(run)]) == 1
    assert "found step 4, expected step 3" in capsys.readouterr().out


def test_whoever_looks_does_not_keep_the_run_from_starting(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    (run / ".lock").touch()
    looking = open(run / ".lock")  # noqa: SIM115  (closed by the timer)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.06, looking.close).start()
    with run_folder.locked(run):
        pass


def test_a_run_that_took_moments_along_begins_after_their_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] > 5))
    assert runs_command.find_damage(run)[0] == [f"{run / 'metrics.jsonl'}: found step 6, expected step 1"]
    (run / "environment.json").write_text('[{"from_step": 5}]')
    assert runs_command.find_damage(run)[0] == []
    first, second = plots.tokens_per_second(run_summary.read_run(run))[:2]
    assert np.isnan(first) and second == 200.0


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "check", str(tmp_path)]) == 2
    assert cli.main(["runs", str(tmp_path / "none")]) == 2
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "no runs" in capsys.readouterr().out


def test_asking_for_the_commit_writes_nothing_into_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "package" / "__init__.py"
    file.parent.mkdir()
    file.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    os.utime(file, (1, 1))  # status would refresh the index
    monkeypatch.setattr(mlxgpt, "__file__", str(file))
    index = (tmp_path / ".git" / "index").read_bytes()
    found = run_folder._commit()
    assert len(found["commit"]) == 40 and found["dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == index
