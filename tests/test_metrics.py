"""metrics.jsonl: a function of the run, not of how often it was stopped; and its optional copies."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import full_disk
import pytest

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.runs import metrics
from mlxgpt.common.runs.metrics import Metrics


def lines(run: Path) -> list[dict[str, Any]]:
    """What is in the file."""
    return list(metrics.read_lines(run / metrics.FILE))


def fill(run: Path, first: int, last: int) -> None:
    """A line a step."""
    writer = Metrics(run, [])
    for step in range(first, last + 1):
        writer.write(step=step, split="train", loss=1 / 3 + step)
    writer.sync()
    writer.close()


def test_numbers_come_back_exactly_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    writer = Metrics(tmp_path, [])
    writer.write(step=1, split="train", loss=0.1 + 0.2, grad_norm=float("inf"), skipped=True)
    writer.close()
    assert lines(tmp_path) == [{"step": 1, "split": "train", "loss": 0.1 + 0.2, "grad_norm": None, "skipped": True}]
    assert "Infinity" not in (tmp_path / metrics.FILE).read_text()


@pytest.mark.parametrize(
    "tail", ["", '{"step": 6, "spl', '{"step": 6, "split": "train", "loss": 2.0}', "\x00\x00\x00", "5\n"]
)
def test_a_half_written_last_line_is_tolerated_and_cut(tmp_path: Path, tail: str) -> None:
    fill(tmp_path, 1, 5)
    with open(tmp_path / metrics.FILE, "a") as file:
        file.write(tail)
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3, 4, 5]
    metrics.cut(tmp_path / metrics.FILE, 9)
    fill(tmp_path, 6, 7)
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_cutting_leaves_what_the_checkpoint_stands_for_and_no_duplicates(tmp_path: Path) -> None:
    fill(tmp_path, 1, 8)
    whole = (tmp_path / metrics.FILE).read_bytes()
    metrics.cut(tmp_path / metrics.FILE, 5)
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3, 4, 5]
    fill(tmp_path, 6, 8)
    assert (tmp_path / metrics.FILE).read_bytes() == whole


def test_damage_in_the_middle_is_refused_with_its_line(tmp_path: Path) -> None:
    fill(tmp_path, 1, 3)
    text = (tmp_path / metrics.FILE).read_text().splitlines(keepends=True)
    (tmp_path / metrics.FILE).write_text(text[0] + "garbage\n" + text[2])
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: found 'garbage'"):
        lines(tmp_path)


def test_damage_after_the_checkpoint_goes_with_what_is_cut(tmp_path: Path) -> None:
    fill(tmp_path, 1, 5)
    text = (tmp_path / metrics.FILE).read_text().splitlines(keepends=True)
    (tmp_path / metrics.FILE).write_text("".join(text[:3]) + "\x00\x00\n" + text[4])
    with pytest.raises(UserError, match="line 4"):
        metrics.cut(tmp_path / metrics.FILE, 5)
    assert metrics.cut(tmp_path / metrics.FILE, 3) == 3
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3]


def test_a_missing_file_is_refused_for_reading_and_made_for_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        lines(tmp_path)
    assert metrics.cut(tmp_path / metrics.FILE, 5) == 0
    assert lines(tmp_path) == []


def test_a_killed_process_has_every_line_it_wrote(tmp_path: Path) -> None:
    code = """
import sys, pathlib
from mlxgpt.common.runs.metrics import Metrics
writer = Metrics(pathlib.Path(sys.argv[1]), [])
step = 0
while True:
    step += 1
    writer.write(step=step, split="train", loss=1.0)
    print(step, flush=True)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    said = [child.stdout.readline() for _ in range(50)]
    child.kill()
    said += child.stdout.read().splitlines()
    child.wait()
    child.stdout.close()
    assert lines(tmp_path)[-1]["step"] >= int(said[-2])


@pytest.mark.parametrize("stand_in", [False, True])
def test_a_full_disk_is_one_clear_line(stand_in: bool, tmp_path: Path) -> None:
    writer = Metrics(tmp_path, [])
    writer._file.close()
    raw = full_disk.Full() if stand_in else full_disk.opened()
    writer._file = io.TextIOWrapper(io.BufferedWriter(raw))
    with pytest.raises(RunError, match=r"metrics\.jsonl: No space left on device"):
        writer.write(step=1, split="train", loss=1.0)
    writer.close()


def test_what_is_not_installed_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    metrics.check_sinks(False, "")
    with pytest.raises(UserError, match=r"train.tensorboard: .* pip install 'mlxgpt\[tensorboard\]'"):
        metrics.check_sinks(True, "")
    with pytest.raises(UserError, match=r"train.wandb: .* pip install 'mlxgpt\[wandb\]'"):
        metrics.check_sinks(False, "project")


def test_tensorboard_gets_the_lines_and_purges_those_of_an_abandoned_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    def record(**fields: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(**fields)

    class Log(types.SimpleNamespace):
        START = 1

    summary = type("Summary", (types.SimpleNamespace,), {"Value": staticmethod(record)})
    writer = types.SimpleNamespace(add_event=events.append, close=lambda: events.append("closed"))
    modules = {
        "tensorboard.compat.proto.event_pb2": {"Event": record, "SessionLog": Log},
        "tensorboard.compat.proto.summary_pb2": {"Summary": summary},
        "tensorboard.summary.writer.event_file_writer": {"EventFileWriter": lambda folder: writer},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    metrics_file = Metrics(tmp_path, metrics.open_sinks(tmp_path, True, "", {}, 5))
    metrics_file.write(step=6, split="train", loss=2.5)
    metrics_file.close()
    start, line, closed = events
    assert start.step == 6 and start.session_log.status == Log.START
    assert line.step == 6 and [(value.tag, value.simple_value) for value in line.summary.value] == [("train/loss", 2.5)]
    assert closed == "closed"


def test_wandb_gets_the_lines_and_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    module = types.ModuleType("wandb")
    module.init = lambda **settings: calls.append(settings) or fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = tmp_path / "shake"
    run.mkdir()
    writer = Metrics(run, metrics.open_sinks(run, False, "project", {"train": {"seed": 1}}, 0))
    writer.write(step=3, split="val", loss=2.5, skipped=False)
    writer.close()
    assert calls[0]["project"] == "project" and calls[0]["id"] == "shake" and calls[0]["resume"] == "allow"
    assert calls[1:] == [(3, {"val/loss": 2.5}), "finished"]
    assert json.loads((run / metrics.FILE).read_text())["loss"] == 2.5
