"""Checkpoints: written whole or not at all, verified byte by byte, retired and found by the rules."""

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt.common.batch import State
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import resolve, tensors
from mlxgpt.common.model import params
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.runs.checkpoint import RunState
from mlxgpt.common.train.saver import Writer

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=11)


class Words:
    """A tokenizer as far as a checkpoint is concerned."""

    eos_id, ends = 3, frozenset()

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"words": true}')


def snapshot(seed: int = 0) -> State:
    """Weights and moments that differ everywhere."""
    weights = params.init_params(CONFIG, seed)
    m = {name: np.full(array.shape, 0.25 + seed, np.float32) for name, array in weights.items()}
    v = {name: np.square(array) for name, array in weights.items()}
    return State(params=weights, m=m, v=v, t=7 + seed)


def state(step: int, best: int = 0) -> RunState:
    """The state after ``step``."""
    found = {"step": best, "loss": 1.5} if best else None
    return RunState(
        1337,
        {"train": "ab"},
        {"train": {"steps": 9}},
        "fake",
        {"version": "1"},
        step=step,
        best=found,
    )  # type: ignore[arg-type]


def save(run: Path, step: int, best: int = 0, keep: int = 0) -> Path:
    """A checkpoint of ``step`` in ``run``."""
    run.mkdir(exist_ok=True)
    return checkpoint.write(run, snapshot(step), CONFIG, Words(), state(step, best), keep)[0]


def everything(folder: Path) -> list[str]:
    """Every path below ``folder``."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_was_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    place = save(tmp_path / "run", 500)
    assert place.name == "step-0000500"
    assert everything(place) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training",
        "training/optimizer.safetensors", "training/state.json",
    ]  # fmt: skip
    assert checkpoint.verify(place) == state(500)
    read, written = checkpoint.read_snapshot(place, CONFIG), snapshot(500)
    assert read["t"] == 507
    for group in ("params", "m", "v"):
        assert list(read[group]) and set(read[group]) == set(written[group])
        for name, array in written[group].items():
            assert read[group][name].tobytes() == array.tobytes(), name
    stored = tensors.read_tensors(place / "training/optimizer.safetensors")
    assert set(stored) == {"t"} | {f"{group}.{name}" for group in "mv" for name in written["m"]}
    assert set(read_json(place / checkpoint.STATE)["files"]) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training/optimizer.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_found_and_named_and_the_older_checkpoint_taken(tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    save(run, 1)
    place = save(run, 2)
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        whole = file.read_bytes()
        if damage == "remove":
            file.unlink()
        elif damage == "truncate":
            file.write_bytes(whole[:-1])
        else:
            middle = len(whole) // 2
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
        said: list[str] = []
        found = checkpoint.newest_valid(run, said.append)
        assert found and found[1].step == 1, file
        assert len(said) == 1 and file.name in said[0] and "\n" not in said[0]
        if damage == "flip" and file.name != "state.json":
            assert "damaged: sha256" in said[0]
        file.write_bytes(whole)
    assert checkpoint.newest_valid(run, pytest.fail) == (place, state(2))


def test_every_byte_of_the_state_counts(tmp_path: Path) -> None:
    file = save(tmp_path / "run", 1) / checkpoint.STATE
    text = file.read_text()
    changed = text.replace('"step": 1', '"step": 2')
    assert changed != text
    file.write_text(changed)
    with pytest.raises(UserError, match="state.json: damaged: sha256"):
        checkpoint.verify(file.parent.parent)


def test_a_run_of_damaged_checkpoints_is_refused_and_one_of_none_is_not(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert checkpoint.newest_valid(run, pytest.fail) is None
    (save(run, 1) / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.newest_valid(run, lambda text: None)


def test_the_damaged_ones_are_set_aside_for_the_run_that_goes_on(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save(run, step)
    checkpoint.set_aside(run, 1, lambda text: None)
    assert resolve.steps_of(run) == [1]
    assert (run / "checkpoints/damaged-step-0000003/config.json").is_file()


def test_a_run_that_goes_back_has_its_links_pointed_back(tmp_path: Path) -> None:
    run, said = tmp_path / "run", []
    for step in (1, 2, 3, 4):
        save(run, step, best=step, keep=0)
    there = checkpoint.verify(resolve.path_of(run, 2))
    assert (
        checkpoint.set_aside(run, 2, said.append, "decayed") and "decayed, renamed to decayed-step-0000004" in said[1]
    )
    checkpoint.point_back(run, there)
    assert (run / "checkpoints/decayed-step-0000003").is_dir()
    assert resolve.follow(run, "last") == resolve.follow(run, "best") == resolve.path_of(run, 2)
    assert not checkpoint.set_aside(run, 2, said.append)


def test_newest_best_and_last_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(1, 7):
        save(run, step, best=2 if step >= 2 else 0, keep=2)
    assert resolve.steps_of(run) == [2, 5, 6]
    assert resolve.follow(run, "best") == resolve.path_of(run, 2)
    assert resolve.follow(run, "last") == resolve.path_of(run, 6)
    assert os.readlink(run / "best") == "checkpoints/step-0000002"
    for step in range(7, 10):
        save(run, step, best=8 if step >= 8 else 2, keep=0)
    assert resolve.steps_of(run) == [2, 5, 6, 7, 8, 9]
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_where_links_cannot_be_made_a_file_of_one_line_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run = tmp_path / "run"
    save(run, 3)
    assert (run / "last").read_text() == "checkpoints/step-0000003\n"
    assert resolve.follow(run, "last") == resolve.path_of(run, 3)


def test_no_space_is_seen_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    save(run, 1)
    before = everything(run)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(RunError, match=r"step-0000002: not written: .*No space left.*1 MiB free") as error:
        save(run, 2)
    assert "\n" not in str(error.value)
    assert everything(run) == before


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_no_space_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    run = tmp_path / "run"
    save(run, 1)
    before, real = everything(run), os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == file:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="step-0000002: not written: .*No space left on device"):
        save(run, 2)
    assert everything(run) == before
    assert checkpoint.newest_valid(run, pytest.fail) == (
        resolve.path_of(run, 1),
        state(1),
    )


@pytest.mark.parametrize("group", ["params", "m", "v"])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, group: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    broken = snapshot()
    broken[group]["ln_f.weight"][3] = np.nan
    with pytest.raises(RunError, match="ln_f.weight.*not finite"):
        checkpoint.write(run, broken, CONFIG, Words(), state(1), 2)
    assert everything(run) in ([], ["checkpoints"])


def test_a_checkpoint_whose_removal_was_cut_short_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save(run, 1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda place, **_: (Path(place) / "config.json").unlink(True))
    save(run, 2, keep=1)
    monkeypatch.undo()
    checkpoint.sweep(run)
    assert resolve.steps_of(run) == [2]
    assert not list((run / "checkpoints").glob(".*"))


def test_a_process_killed_while_it_saves_leaves_whole_checkpoints_only(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    save(run, 1)
    code = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
import test_checkpoint as t
step = 2
print("go", flush=True)
while True:
    t.save(pathlib.Path(sys.argv[1]), step, keep=3)
    step += 1
"""
    for round in range(4):
        # -u: the line must arrive at once
        child = subprocess.Popen(
            [sys.executable, "-u", "-c", code, str(run), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
        )
        assert child.stdout and child.stdout.readline() == b"go\n"
        time.sleep(0.05 + 0.013 * round)
        child.kill()
        child.wait()
        child.stdout.close()
        checkpoint.sweep(run)
        steps = resolve.steps_of(run)
        assert steps
        for step in steps:
            assert checkpoint.verify(resolve.path_of(run, step)).step == step
        assert not list((run / "checkpoints").glob(".*"))


def test_a_checkpoint_whose_successor_was_not_put_in_place_comes_back(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    place = save(run, 4)
    os.rename(place, place.with_name(".step-0000004.old"))
    place.with_name(".step-0000004.tmp").mkdir()
    checkpoint.sweep(run)
    assert everything(run / "checkpoints")[0] == "step-0000004"
    assert checkpoint.verify(place).step == 4


def test_a_step_is_written_again_over_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, 4)
    place, _ = checkpoint.write(run, snapshot(99), CONFIG, Words(), dataclasses.replace(state(4), stale=2), 2)
    assert checkpoint.verify(place).stale == 2
    assert checkpoint.read_snapshot(place, CONFIG)["t"] == 106
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000004"]


def test_what_a_model_argument_means(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save(run, step, best=2 if step > 1 else 0)
    (run / "recipe.toml").write_text("")
    best = run / "checkpoints/step-0000002"
    assert resolve.resolve_model(run) == best
    assert resolve.resolve_model(best) == best
    (run / "best").unlink()
    assert resolve.resolve_model(str(run)).name == "step-0000003"
    os.remove(run / "last")
    (run / "last").symlink_to("checkpoints/step-0000099")
    assert resolve.resolve_model(run).name == "step-0000003"
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        resolve.resolve_model(run)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="neither a model folder"):
        resolve.resolve_model(tmp_path / "other")
    with pytest.raises(UserError, match="no such folder"):
        resolve.resolve_model(tmp_path / "missing")
    with pytest.raises(UserError, match="a file; expected a model folder"):
        resolve.resolve_model(run / "recipe.toml")


def test_a_hub_id_is_taken_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        if name == "some/absent":
            raise OSError("offline\nand more lines")
        return str(save(tmp_path / "cache", 1))

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve.resolve_model("some/model").name == "step-0000001"
    assert asked == [("some/model", True)]
    with pytest.raises(
        UserError,
        match=r"some/absent: no such folder, and not to be had from the Hugging Face hub: offline$",
    ):
        resolve.resolve_model("some/absent")
    assert asked[1:] == [("some/absent", True), ("some/absent", False)]


def test_the_hubs_errors_are_said_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    from types import SimpleNamespace

    import huggingface_hub
    from huggingface_hub import errors

    def answer(kind: type[Exception], status: int) -> Exception:
        error = kind.__new__(kind)
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
        return error

    cases = [
        (answer(errors.GatedRepoError, 403), "gated: accept its terms on its page there, then hf auth login"),
        (answer(errors.RepositoryNotFoundError, 404), "no such repository, or a private one"),
        (answer(errors.HfHubHTTPError, 401), "the hub did not accept the token: hf auth login"),
        (answer(errors.HfHubHTTPError, 503), "the hub answers 503: try again later"),
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError("Got: ConnectError\nAn error happened"), "no connection to it, and not in the"),
        (OSError(errno.ENOSPC, "No space left", "/cache"), "no space left on disk (/cache): set HF_HOME"),
    ]
    for error, text in cases:

        def download(*_: object, error: Exception = error, **__: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(UserError) as found:
            resolve.resolve_model("some/model")
        assert text in str(found.value) and "\n" not in str(found.value)


def test_at_most_one_save_is_in_flight_and_its_failure_surfaces() -> None:
    writer, gate, order = Writer(background=True), threading.Event(), []

    def first() -> None:
        gate.wait(10)
        order.append("first")

    writer.submit(first)
    writer.check()
    assert order == []
    threading.Timer(0.05, gate.set).start()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]

    def fail() -> None:
        raise RunError("disk gone")

    writer.submit(fail)
    with pytest.raises(RunError, match="disk gone"):
        while True:
            writer.check()
    writer.wait()
    with pytest.raises(RunError, match="disk gone"):
        Writer(background=False).submit(fail)
