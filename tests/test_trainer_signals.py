"""Signals, kills and a second process: the run stays whole and resumes bit for bit."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import fake_run
import pytest
from fake_train import Go, child, losses, weights

from mlxgpt.common.batch import Batch
from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.train.signals import Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(go: Go, number: int, code: int) -> None:
    assert go("--out", "whole") == 0
    process = child("./recipe.toml", "--out", "run", FAKE_DELAY="0.05", PYTHONUNBUFFERED="1")
    assert process.stdout
    while "first step" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.12)
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == code, rest
    process.stdout.close()
    step = max(losses("run"))
    assert 1 <= step < 12
    assert f"and saved at step {step}; resume with: mlxgpt train --resume run" in rest.splitlines()[-1]
    assert checkpoint.verify(resolve.path_of(Path("run"), step)).step == step
    assert go("--resume", "run") == 0
    assert losses("run") == losses("whole") and losses("run", "val") == losses("whole", "val")
    assert weights("run", 12) == weights("whole", 12)


def test_a_signal_in_a_validation_leaves_it_for_the_resumed_run(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (4, 12):
        assert go("--out", f"whole{where}") == 0
        real = fake_run.Engine.evaluate

        def interrupted(self: Any, batch: Batch, where: int = where, real: Any = real) -> dict[str, float]:
            if self.t == where:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, batch)

        monkeypatch.setattr(fake_run.Engine, "evaluate", interrupted)
        assert go("--out", f"run{where}") == 130
        monkeypatch.setattr(fake_run.Engine, "evaluate", real)
        assert where not in losses(f"run{where}", "val")
        assert checkpoint.verify(resolve.path_of(Path(f"run{where}"), where)).evaluated < where
        assert go("--resume", f"run{where}") == 0
        assert losses(f"run{where}", "val") == losses(f"whole{where}", "val")
        assert list(losses(f"run{where}", "val")) == [4, 8, 12]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_leaves_at_once_and_the_run_is_whole(go: Go) -> None:
    assert go("--out", "whole") == 0
    process = child("./recipe.toml", "--out", "run", "--set", "train.save_every=1", FAKE_DELAY="0.8")
    assert process.stdout
    while "first save" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)  # into the next step
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)  # the first is taken when a call returns; the save after it takes longer than this
    assert process.returncode == -signal.SIGINT  # by the signal itself: after a step it would be 130, and saved
    process.stdout.close()
    assert go("--resume", "run") == 0
    assert losses("run") == losses("whole")


@pytest.mark.parametrize(("ends", "next_one"), [(True, signal.SIG_DFL), (False, signal.default_int_handler)])
def test_the_second_ctrl_c_is_the_systems_or_pythons(ends: bool, next_one: Any) -> None:
    """The system ends a process in a long step too; in a notebook Python's handler leaves it alive."""
    with Signals(ends) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.came()
        assert signal.getsignal(signal.SIGINT) is next_one
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_at_any_moment_it_goes_on_bit_for_bit(go: Go) -> None:
    assert go("--out", "whole", "--set", "train.save_every=1", "--set", "train.keep=3") == 0
    first = ["./recipe.toml", "--out", "run", "--set", "train.save_every=1", "--set", "train.keep=3"]
    kills = 0
    while True:
        words = ["--resume", "run"] if Path("run/recipe.toml").exists() else first
        shutil.rmtree("run") if Path("run").exists() and words is first else None
        process = child(*words, FAKE_DELAY="0.06")
        assert process.stdout
        for line in process.stdout:
            if line.startswith("run: "):
                break
        time.sleep(0.25 + 0.15 * kills)
        process.kill()
        rest = process.stdout.read()
        process.stdout.close()
        if process.wait() == 0:
            break
        kills += 1
        assert kills < 30, rest
    assert kills >= 2
    assert losses("run") == losses("whole") and losses("run", "val") == losses("whole", "val")
    assert weights("run", 12) == weights("whole", 12)


def test_a_second_process_is_kept_out(go: Go) -> None:
    process = child("./recipe.toml", "--out", "run", FAKE_DELAY="0.2")
    assert process.stdout
    while "first step" not in process.stdout.readline():
        assert process.poll() is None
    second = child("--resume", "run")
    assert second.stdout
    assert f"run: in use by process {process.pid}" in second.stdout.read()
    assert second.wait() == 2
    second.stdout.close()
    process.kill()
    process.wait()
    process.stdout.close()
    assert go("--resume", "run") == 0
