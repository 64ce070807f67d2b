"""Faults around a run: it resumes bit for bit or is refused in one line; it never resumes from damage.

docs/reliability.md lists every fault with its outcome and test; kills are in test_kills.py.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_run
import pytest
from fake_train import child, losses, tree, weights

from mlxgpt import cli
from mlxgpt.commands.look import runs as runs_command
from mlxgpt.common import backend
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.train import pretrain

Go = Callable[..., int]
STOP = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nobody disturbed, ``whole``, and one stopped after step 8, ``run``."""
    place = tmp_path_factory.mktemp("faults")
    (place / "recipe.toml").write_text(fake_run.RECIPE.replace("steps = 12", "steps = 12\nsample_every = 2"))
    recipe = str(place / "recipe.toml")
    for words in (["--out", str(place / "whole")], ["--out", str(place / "run"), "--stop-after", str(STOP)]):
        process = child(recipe, *words)
        said, _ = process.communicate()
        assert process.returncode == 0, said
    assert resolve.steps_of(place / "run") == [5, 8]
    return place


@pytest.fixture
def go(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """``mlxgpt train`` with the fake framework, in a folder that holds both runs."""
    monkeypatch.setattr(backend, "load", fake_run.load_backend)
    monkeypatch.setattr(backend, "resolve", lambda name, device=None: "fake")
    monkeypatch.setattr(pretrain.token_source, "open_data", fake_run.open_data)
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return lambda *words: cli.main(["train", *([] if "--resume" in words else ["./recipe.toml"]), *words])


@pytest.fixture
def stopped(go: Go) -> Path:
    """The run resumed from step 8."""
    return Path("run")


def goes_on(go: Go) -> None:
    """Resuming gives the undisturbed run's curve and bits, and a folder in which nothing is damaged."""
    assert go("--resume", "run") == 0
    assert losses("run") == losses("whole") and losses("run", "val") == losses("whole", "val")
    assert weights("run", 12) == weights("whole", 12)
    assert runs_command.find_damage(Path("run"))[0] == []


def refused(go: Go, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """Resuming ends with 2 and one line that has these parts, and changes nothing but the lock."""
    before = tree(Path("run"))
    assert go("--resume", "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error
    after = tree(Path("run"))
    assert {name: after.get(name) for name in before if name != ".lock"} == {
        name: content for name, content in before.items() if name != ".lock"
    }


@pytest.mark.parametrize("jump", [-86400.0, 86400.0 * 365, -2e9])
def test_a_clock_that_jumps_changes_nothing(
    go: Go, stopped: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + jump * calls[0]

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    for number, file in enumerate(sorted(stopped.rglob("*"))):
        at = max(0.0, real() + jump * number)
        os.utime(file, (at, at), follow_symlinks=False)
    goes_on(go)


def test_the_monotonic_clock_may_stand_still_or_leap(go: Go, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept: only ``seconds`` in metrics.jsonl tell."""
    ticks = iter([0.0] * 20 + [1e6] * 10_000)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    goes_on(go)


def flip(file: Path, share: float) -> None:
    """A bit of the byte at this share of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    file.write_bytes(content)


FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training/optimizer.safetensors",
    "training/state.json",
)  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_checkpoint_costs_that_checkpoint(
    go: Go, stopped: Path, capsys: pytest.CaptureFixture[str], name: str, share: float
) -> None:
    place = resolve.path_of(stopped, STOP)
    assert sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()) == sorted(FILES)
    flip(place / name, share)
    assert go("--resume", "run") == 0
    said = capsys.readouterr().out
    assert f"{place / name}: " in said and "resumes from step 5" in said
    assert weights("run", 12) == weights("whole", 12) and losses("run") == losses("whole")


def test_without_the_sums_a_flipped_bit_would_be_trained_on(
    go: Go, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: what the tests above hold against the undisturbed run does differ."""

    def believe(place: Path) -> checkpoint.RunState:
        content = read_json(place / checkpoint.STATE)
        return checkpoint.RunState(
            **{k: v for k, v in content.items() if k not in ("sha256", "format_version", "files")}
        )

    monkeypatch.setattr(checkpoint, "verify", believe)
    flip(resolve.path_of(stopped, STOP) / "model.safetensors", 0.7)
    assert go("--resume", "run") == 0
    assert weights("run", 12) != weights("whole", 12)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("name", ["recipe.toml", "metrics.jsonl", "environment.json", "samples.jsonl", ".lock"])
def test_a_flipped_bit_in_a_file_of_the_run_is_harmless_or_refused(
    go: Go, stopped: Path, capsys: pytest.CaptureFixture[str], name: str, share: float
) -> None:
    """recipe.toml is held against the checkpoint's copy; a digit of a loss in metrics.jsonl has no second copy."""
    flip(stopped / name, share)
    code = go("--resume", "run")
    error = capsys.readouterr().err
    assert code in (0, 2) and error.count("\n") == (code == 2) and "Traceback" not in error
    if code == 0:
        assert weights("run", 12) == weights("whole", 12)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [cut, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_file_of_a_checkpoint_cut_or_gone_costs_that_checkpoint(
    go: Go, stopped: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], object]
) -> None:
    harm(resolve.path_of(stopped, STOP) / name)
    assert go("--resume", "run") == 0
    assert "resumes from step 5" in capsys.readouterr().out
    assert weights("run", 12) == weights("whole", 12)


def by_a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("not a folder")


def by_an_empty_folder(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()


def by_an_older_one(place: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(resolve.path_of(Path("run"), 5), place)


def by_a_link_to_nowhere(place: Path) -> None:
    shutil.rmtree(place)
    place.symlink_to("nowhere")


@pytest.mark.parametrize("harm", [by_a_file, by_an_empty_folder, by_an_older_one, by_a_link_to_nowhere])
def test_a_checkpoint_replaced(go: Go, stopped: Path, harm: Callable[[Path], None]) -> None:
    harm(resolve.path_of(stopped, STOP))
    assert go("--resume", "run") == 0
    assert weights("run", 12) == weights("whole", 12) and losses("run") == losses("whole")


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("target", [None, "checkpoints/step-0000099", "/etc/passwd", ""])
def test_links_are_hints(go: Go, stopped: Path, name: str, target: str | None) -> None:
    (stopped / name).unlink()
    if target:
        (stopped / name).symlink_to(target)
    elif target == "":
        (stopped / name).write_text("")
    goes_on(go)


@pytest.mark.parametrize(
    "holder",
    [str(os.getpid()), "1", "999999999", "", "not a number\n\x00"],
    ids=["own", "first", "none", "empty", "text"],
)
def test_a_lock_that_a_dead_process_left_is_no_lock(go: Go, stopped: Path, holder: str) -> None:
    """Its number may be of another process by now, or of another host: the system's lock counts, not the text."""
    (stopped / ".lock").write_text(holder)
    goes_on(go)


def test_two_that_start_at_once_are_one(go: Go, stopped: Path) -> None:
    processes = [child("--resume", "run", FAKE_DELAY="0.2") for _ in range(3)]
    codes = [process.wait() for process in processes]
    said = "".join(process.communicate()[0] for process in processes)
    # on a busy machine one may start only after the first has ended
    assert said.count("in use by process") == codes.count(2) and said.count("nothing to do") == codes.count(0) - 1, said
    assert said.count("resumes from step") == 1 and set(codes) == {0, 2}, said
    assert weights("run", 12) == weights("whole", 12) and losses("run") == losses("whole")


@pytest.mark.parametrize(
    ("old", "new"), [("lr = 0.05", "lr = 0.06"), ("batch_size = 4", "batch_size = 5"), ("n_embd = 8", "n_embd = 16")]
)
def test_an_edited_recipe_is_refused_by_its_key(
    go: Go, stopped: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    text = (stopped / "recipe.toml").read_text()
    assert old in text
    (stopped / "recipe.toml").write_text(text.replace(old, new))
    refused(go, capsys, new.partition(" ")[0], f"{new.rpartition(' ')[2]}")


def test_a_recipe_that_is_gone_is_said(go: Go, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / "recipe.toml").unlink()
    refused(go, capsys, "recipe.toml is missing")


def test_other_data_is_refused(
    go: Go, stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CONTENT", "1")
    refused(go, capsys, "train-00000.bin has sha256")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond ``size`` bytes, as a full disk or a quota does in mid-file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("size", [0, 100, 1500, 2500])
def test_a_disk_that_is_full_anywhere_ends_the_run_and_costs_nothing(
    go: Go, stopped: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    with largest_file(size):
        code = go("--resume", "run")
    error = capsys.readouterr().err
    assert code in (1, 2) and error.count("\n") == 1 and "File too large" in error
    assert checkpoint.newest_valid(Path("run"), pytest.fail)
    goes_on(go)


def test_a_small_file_system_that_fills_up(go: Go, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real one of 64 KiB where mounting is allowed; elsewhere the limit on files above stands for it."""
    place = Path("small")
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        with largest_file(0):
            assert go("--out", "small/run") in (1, 2)
        return
    try:
        # space for a checkpoint is asked for before anything is made
        assert go("--out", "small/run") == 2
        assert "No space left on device" in capsys.readouterr().err
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere: it becomes somebody else for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_is_read_only_is_said(go: Go, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--resume", "whole") == 0  # all that is imported at first use is
    opened = [Path.cwd(), *Path.cwd().parents]
    modes = {place: place.stat().st_mode for place in [*opened, *stopped.rglob("*"), stopped]}
    try:
        for place in opened:
            if place.stat().st_uid == os.geteuid():
                place.chmod(modes[place] | 0o055)
        for place in (stopped, *stopped.rglob("*")):
            if not place.is_symlink():
                place.chmod(0o555 if place.is_dir() else 0o444)
        capsys.readouterr()
        with as_nobody():
            refused(go, capsys, "run/.lock: Permission denied")
    finally:
        for place, mode in modes.items():
            if not place.is_symlink():
                place.chmod(mode)
    goes_on(go)
