"""The loop's policies under a framework of plain numpy: guards, stopping, saving, what a resumed run may change."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest

from mlxgpt import cli
from mlxgpt.commands import train as train_command
from mlxgpt.common import backend
from mlxgpt.common.batch import Batch
from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import checkpoint, metrics, samples
from mlxgpt.common.train import guards, loop, session
from mlxgpt.common.train.progress import Progress

Go = Callable[..., int]


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """``mlxgpt train`` with the fake framework, in an empty folder that holds recipe.toml."""
    monkeypatch.setattr(backend, "load", fake_run.load_backend)
    monkeypatch.setattr(backend, "resolve", lambda name: "fake")
    monkeypatch.setattr(train_command.token_source, "open_data", fake_run.open_data)
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(fake_run.RECIPE)

    def run(*words: str, recipe: str = "./recipe.toml") -> int:
        fresh = [] if "--resume" in words else [recipe]
        return cli.main(["train", *fresh, *words])

    return run


def losses(run: str, split: str = "train") -> dict[int, float]:
    """Step -> loss; a step that is there twice fails."""
    found: dict[int, float] = {}
    for entry in metrics.read(Path(run) / metrics.FILE):
        if entry["split"] == split:
            assert entry["step"] not in found, f"step {entry['step']} is there twice"
            found[entry["step"]] = entry["loss"]
    return found


def weights(run: str, step: int) -> bytes:
    """The bytes of weights and moments after ``step``."""
    place = resolve.path_of(Path(run), step)
    return b"".join((place / name).read_bytes() for name in ("model.safetensors", "training/optimizer.safetensors"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(*argv: str, **environment: str) -> "subprocess.Popen[str]":
    """The same in a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = [sys.executable, "-u", fake_run.__file__, *argv]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_whole_run(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--out", "run") == 0
    assert list(losses("run")) == list(range(1, 13))
    assert list(losses("run", "val")) == [4, 8, 12]
    assert losses("run")[12] < losses("run")[1]
    end = checkpoint.verify(resolve.path_of(Path("run"), 12))
    assert (end.t, end.tokens, end.evaluated) == (12, 12 * 4 * 8, 12)
    out = capsys.readouterr().out
    for part in ("32 of 32 tokens are targets (100.0%)", "first step: ", "first save: run/checkpoints/step-0000004"):
        assert out.count(part) == 1, part
    last = out.splitlines()[-1]
    assert "best validation loss" in last and "model: run/checkpoints/step-00000" in last
    assert "mlxgpt generate --model run" in last
    assert "sample at step 12:\nbcd 12" in out
    assert samples.read(Path("run"))[-1] == samples.Sample(12, "bcd 12")
    environment = json.loads(Path("run/environment.json").read_text())
    assert len(environment) == 1 and {"framework", "version", "device", "threads", "python", "commit", "dirty"} <= set(
        environment[0]
    )
    assert {path.name for path in Path("run").iterdir()} == {
        "recipe.toml", "metrics.jsonl", "samples.jsonl", "environment.json", "plan.json", "checkpoints", "best", "last",
        ".lock",
    }  # fmt: skip


def test_the_loss_of_a_step_is_the_one_before_its_update(go: Go) -> None:
    assert go("--out", "run") == 0
    source = fake_run.Source(1337, 4, 8)
    recipe = train_command.build(train_command.read_toml(Path("run/recipe.toml")))
    engine = fake_run.Engine(recipe, train_command.params.init_params(recipe.model, 1337))
    sums = engine.evaluate(source.batch(1))
    assert losses("run")[1] == sums["loss"] / sums["weight"]


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_run_stopped_after_any_step_goes_on_bit_for_bit(go: Go, stop: int) -> None:
    assert go("--out", "whole", "--set", "train.keep=0") == 0
    assert go("--out", "parts", "--set", "train.keep=0", "--stop-after", str(stop)) == 0
    assert resolve.follow(Path("parts"), "last") == resolve.path_of(Path("parts"), stop)
    assert max(losses("parts")) == stop
    assert go("--resume", "parts") == 0
    assert losses("parts") == losses("whole")
    assert losses("parts", "val") == losses("whole", "val")
    assert weights("parts", 12) == weights("whole", 12)
    whole, parts = (checkpoint.verify(resolve.path_of(Path(run), 12)) for run in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize("what", ["m", "v", "t", "step", "seed"])
def test_each_piece_of_the_state_matters(go: Go, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The comparison above must be able to fail: leave out one piece and the curve differs."""
    assert go("--out", "whole") == 0
    assert go("--out", "parts", "--stop-after", "7") == 0
    real = checkpoint.read

    def forgetful(place: Path, config: Any) -> Any:
        snapshot: Any = real(place, config)
        if what in ("m", "v"):
            snapshot[what] = {name: np.zeros_like(array) for name, array in snapshot[what].items()}
        if what == "t":
            snapshot["t"] = 1
        return snapshot

    monkeypatch.setattr(checkpoint, "read", forgetful)
    if what == "seed":
        monkeypatch.setattr(fake_run.Source, "batch", lambda self, step: self._batch(np.arange(4) * 7 + step))
    if what == "step":
        step = fake_run.Engine.train_step
        monkeypatch.setattr(fake_run.Engine, "train_step", lambda self, s, batches, lr: step(self, s - 7, batches, lr))
    assert go("--resume", "parts") == 0
    assert losses("parts")[7] == losses("whole")[7]
    assert losses("parts")[12] != losses("whole")[12]


def test_micro_batches_change_the_curve_by_rounding_only(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    assert go("--out", "whole") == 0
    seen, real = set(), fake_run.Engine._loss
    monkeypatch.setattr(fake_run.Engine, "_loss", lambda self, batch: seen.add(len(batch.tokens)) or real(self, batch))
    assert go("--out", "micro", "--set", "train.micro_batch_size=3") == 0
    assert seen == {3, 1}  # also where it validates
    assert losses("whole", "val")[12] == pytest.approx(losses("micro", "val")[12], abs=1e-6)
    one, other = losses("whole"), losses("micro")
    assert one != other
    assert max(abs(one[step] - other[step]) for step in one) < 1e-6


def test_metrics_line_that_was_half_written_when_it_was_killed(go: Go) -> None:
    assert go("--out", "whole") == 0
    assert go("--out", "parts", "--stop-after", "6") == 0
    with open("parts/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "split": "train", "loss": 1.0}\n{"step": 8, "sp')
    assert go("--resume", "parts") == 0
    assert losses("parts") == losses("whole")


def test_metrics_that_were_deleted_are_missed(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--out", "run", "--stop-after", "6") == 0
    capsys.readouterr()
    Path("run/metrics.jsonl").unlink()
    assert go("--resume", "run") == 0
    assert "metrics.jsonl: the lines up to step 6 are not all there any more" in capsys.readouterr().out
    assert list(losses("run")) == list(range(7, 13))


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--out", "whole") == 0
    assert go("--out", "parts", "--stop-after", "6") == 0
    file = Path("parts/checkpoints/step-0000006/model.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    capsys.readouterr()
    assert go("--resume", "parts") == 0
    out = capsys.readouterr().out
    assert "step-0000006/model.safetensors: damaged: sha256" in out and "goes on from step 5" in out
    assert losses("parts") == losses("whole") and weights("parts", 12) == weights("whole", 12)
    assert Path("parts/checkpoints/damaged-step-0000006").is_dir()


def test_resuming_a_finished_run_prints_one_line(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--out", "run") == 0
    before = tree(Path("run"))
    capsys.readouterr()
    assert go("--resume", "run") == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert tree(Path("run")) == before


def test_early_stopping_and_best(go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = iter([3.0, 3.5, 2.0, 2.5, 2.2, 2.1, 1.0])
    monkeypatch.setattr(fake_run.Engine, "evaluate", lambda self, batch: {"loss": next(fixed) * 64, "weight": 64.0})
    monkeypatch.setattr(fake_run.Source, "validation", lambda self: iter([self.batch(1)]))
    settings = ["--set", "train.eval_every=1", "--set", "train.early_stop=3", "--set", "train.keep=1"]
    assert go("--out", "run", *settings) == 0
    assert "at step 6: 3 validations without a better loss" in capsys.readouterr().out
    assert losses("run", "val") == {1: 3.0, 2: 3.5, 3: 2.0, 4: 2.5, 5: 2.2, 6: 2.1}
    assert resolve.steps_of(Path("run")) == [3, 6]
    assert resolve.resolve_model("run").name == "step-0000003"
    assert go("--resume", "run") == 0
    assert "nothing to do: stopped early at step 6" in capsys.readouterr().out
    # patience is counted across a stop
    fixed = iter([3.0, 3.5, 2.0, 2.5, 2.2, 2.1])
    assert go("--out", "parts", *settings, "--stop-after", "5") == 0
    assert go("--resume", "parts") == 0
    assert losses("parts", "val") == losses("run", "val")


@pytest.mark.parametrize("steps", ["5", "5,6", "9,10"])
def test_steps_that_are_not_finite_are_skipped_and_said(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: str
) -> None:
    monkeypatch.setenv("FAKE_NAN", steps)
    assert go("--out", "whole") == 0
    out = capsys.readouterr().out
    for step in steps.split(","):
        assert f"step {step}: loss nan is not finite; update skipped; rows: train token" in out
    assert list(losses("whole")) == list(range(1, 13))
    assert checkpoint.verify(resolve.path_of(Path("whole"), 12)).t == 12 - len(steps.split(","))
    assert go("--out", "parts", "--stop-after", "5") == 0
    assert go("--resume", "parts") == 0
    assert losses("parts") == losses("whole")


def test_three_steps_in_a_row_that_are_not_finite_end_the_run(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_NAN", "9,10,11")
    assert go("--out", "run") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 steps in a row" in error
    assert "the last good checkpoint is run/checkpoints/step-0000008" in error
    # none was saved while the numbers were bad, though step 10 was due
    assert resolve.steps_of(Path("run"))[-1] == 8
    monkeypatch.setenv("FAKE_NAN", "")
    assert go("--resume", "run") == 0
    assert list(losses("run")) == list(range(1, 13))


def test_a_tensor_without_a_gradient_is_an_error_that_names_it(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fake_run.Engine.__init__

    def broken(field: str, exempt: bool) -> Callable[..., None]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            real(self, *args, **kwargs)
            getattr(self, field).add("h.0.mlp.c_fc.weight")

        return init

    monkeypatch.setattr(fake_run.Engine, "__init__", broken("frozen", False))
    assert go("--out", "frozen") == 1
    assert "h.0.mlp.c_fc.weight: the gradient of update 1 is exactly zero" in capsys.readouterr().err
    monkeypatch.setattr(fake_run.Engine, "__init__", broken("stuck", False))
    assert go("--out", "stuck") == 1
    assert "h.0.mlp.c_fc.weight: not a bit has changed after two updates" in capsys.readouterr().err
    assert list(losses("stuck")) == [1, 2]


def test_a_gradient_that_is_zero_by_design_may_be_so_once() -> None:
    param = train_command.params.Param((2,), zero_grad_at_init=True)
    engine = fake_run.SimpleNamespace(t=0, snapshot=lambda: {"params": {"a": np.full(2, engine.t, np.float32)}})
    watch = guards.FirstUpdates(engine, {"a": param})  # type: ignore[arg-type]
    stats = guards.StepStats(1.0, 1.0, 1.0, True, zero_grads=("a",))
    engine.t = 1
    watch.check(stats, 1e-3)
    engine.t = 2
    with pytest.raises(guards.RunError, match="a: the gradient of update 2 is exactly zero"):
        watch.check(stats, 1e-3)
    engine.t = 3
    watch.check(stats, 1e-3)


@pytest.mark.parametrize(("rate", "moment", "accused"), [(1e-8, 0.1, False), (1e-6, 0.1, True), (1e-8, 0.0, True)])
def test_an_update_too_small_to_show_is_not_taken_for_none(rate: float, moment: float, accused: bool) -> None:
    """A norm's 1.0 keeps its bits in a long warm-up to 1e-6."""
    state = {"params": {"a": np.ones(2, np.float32)}, "m": {"a": np.full(2, moment, np.float32)}}
    engine = fake_run.SimpleNamespace(t=0, snapshot=lambda: state)
    watch = guards.FirstUpdates(engine, {"a": train_command.params.Param((2,))})  # type: ignore[arg-type]
    engine.t = 2
    with pytest.raises(guards.RunError, match="a: not a bit") if accused else contextlib.nullcontext():
        watch.check(guards.StepStats(1.0, 1.0, 1.0, True), rate)


def test_a_batch_without_targets_is_refused() -> None:
    tokens = np.zeros((2, 3), np.int32)
    with pytest.raises(guards.RunError, match="none of the 6 tokens"):
        guards.targets(Batch(tokens, tokens, np.zeros((2, 3), np.float32)))
    half = Batch(tokens, tokens, np.array([[0, 0, 1], [0, 1, 0]], np.float32))
    assert guards.targets(half) == "step 1: 2 of 6 tokens are targets (33.3%)"


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_save_that_fails_ends_the_run(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], background: str
) -> None:
    real = checkpoint.model_folder.write_model

    def full(place: Path, *args: Any, **kwargs: Any) -> None:
        if "0000008" in str(place):
            raise OSError(28, "No space left on device")
        real(place, *args, **kwargs)

    monkeypatch.setattr(checkpoint.model_folder, "write_model", full)
    assert go("--out", "run", "--set", f"train.background={background}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step-0000008: not written: No space left on device" in error
    assert "the last good checkpoint is run/checkpoints/step-0000005" in error
    assert resolve.steps_of(Path("run")) == [4, 5]
    assert not list(Path("run/checkpoints").glob(".*"))
    monkeypatch.setattr(checkpoint.model_folder, "write_model", real)
    assert go("--resume", "run") == 0
    assert list(losses("run")) == list(range(1, 13))


def test_a_save_that_fails_is_seen_before_the_next_one(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.model_folder, "write_model", broken)
    monkeypatch.setenv("FAKE_DELAY", "0.05")
    assert go("--out", "run", "--set", "train.save_every=3", "--set", "train.eval_every=0", "--steps", "100") == 1
    assert max(losses("run")) < 6


def test_what_a_killed_process_left_is_swept_away(go: Go) -> None:
    assert go("--out", "run", "--stop-after", "5") == 0
    left = [Path("run/checkpoints/.step-0000009.tmp"), Path("run/.recipe.toml.77.tmp"), Path("run/.last.link")]
    left[0].mkdir()
    for file in (left[0] / "config.json", *left[1:]):
        file.write_text("half")
    assert go("--resume", "run") == 0
    assert not [path for path in left if path.exists()]


def test_no_space_for_a_checkpoint_is_seen_before_the_folder_is_made(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2**40, 2**40, 1000))  # type: ignore[attr-defined]
    assert go("--out", "deep/run") == 2
    assert "No space left on device: 0 MiB free" in capsys.readouterr().err
    assert [path.name for path in Path.cwd().iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "train.stpes=3"], "unknown key train.stpes (did you mean 'steps'?)"),
        (["--set", "train.steps=many"], "train.steps = 'many': expected int"),
        (["--set", "optim.warmup=12"], "optim.warmup = 12: expected fewer than train.steps = 12"),
        (["--stop-after", "13"], "--stop-after 13: expected at most train.steps = 12"),
        (["--steps", "2"], "optim.warmup = 2: expected fewer than train.steps = 2"),
        (["--set", "model.n_embd=9"], "model.n_embd = 9: expected a multiple of model.n_head"),
        (["--set", "model.vocab_size=12"], "model.vocab_size = 12: expected 0 or at least the tokenizer's 13"),
        (["--set", "sample.prompt=bbbbbbbbb"], "9 tokens; expected at most model.block_size = 8"),
        (["--set", "train.tensorboard=true"], "pip install 'mlxgpt[tensorboard]'"),
        (["--set", "train.wandb=x"], "pip install 'mlxgpt[wandb]'"),
        (["--out", "taken"], "taken: exists"),
        (["--out", "recipe.toml/run"], "recipe.toml is not a folder"),
        (["--init-from", "nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["--init-from", "taken"], "taken: neither a model folder"),
        (["--resume", "missing"], "missing: no such folder"),
        (["--resume", "taken"], "taken: not a run of mlxgpt train or finetune: recipe.toml is missing"),
        (["--resume", "recipe.toml"], "recipe.toml: not a folder"),
        (["--resume", "taken", "--out", "x"], "--out x: a resumed run stays where it is"),
        (["--resume", "taken", "--init-from", "x"], "--init-from x: a resumed run"),
    ],
)
def test_wrong_usage_is_one_line_and_changes_nothing(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Path("taken").mkdir()
    assert go(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in Path.cwd().rglob("*")) == ["recipe.toml", "taken"]


@pytest.mark.parametrize("recipe", ["./absent.toml", "no-such-recipe"])
def test_a_recipe_that_is_not_there(go: Go, capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    assert go(recipe=recipe) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "optim.lr=0.01"], "optim.lr was 0.05 and is 0.01"),
        (["--set", "model.n_head=4"], "model.n_head was 2 and is 4"),
        (["--set", "train.seed=1"], "train.seed was 1337 and is 1"),
        (["--set", "train.batch_size=5"], "train.batch_size was 4 and is 5"),
        (["--set", "train.eval_batches=1"], "train.eval_batches was 0 and is 1"),
        (["--set", "train.compute_dtype=bfloat16"], "train.compute_dtype was 'float32' and is 'bfloat16'"),
        (["--set", "data.sampling=epoch"], "data.sampling was 'random' and is 'epoch'"),
        (["--steps", "20"], "train.steps was 12 and is 20: a cosine schedule is a function of its length"),
        (["--steps", "9"], "train.steps was 12 and is 9: expected no fewer; --stop-after 9 ends it sooner"),
        (["--stop-after", "6"], "--stop-after 6: the run is at step 6 already"),
    ],
)
def test_what_a_resumed_run_may_not_change(
    go: Go, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert go("--out", "run", "--stop-after", "6") == 0
    before = tree(Path("run"))
    capsys.readouterr()
    assert go("--resume", "run", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert tree(Path("run")) == before


def test_a_recipe_edited_in_the_run_folder_counts_as_a_change(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--out", "run", "--stop-after", "6") == 0
    file = Path("run/recipe.toml")
    file.write_text(file.read_text().replace("\nbeta1 = 0.9 ", "\nbeta1 = 0.8 "))
    assert go("--resume", "run") == 2
    assert "optim.beta1 was 0.9 and is 0.8" in capsys.readouterr().err


def test_what_a_resumed_run_may_change_is_said(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--out", "whole") == 0
    assert go("--out", "run", "--stop-after", "6") == 0
    capsys.readouterr()
    changes = ["train.eval_every=3", "train.keep=5", "sample.seed=4", "data.source=elsewhere", "train.early_stop=9"]
    assert go("--resume", "run", *(word for change in changes for word in ("--set", change))) == 0
    out = capsys.readouterr().out
    for part in ("train.eval_every from 4 to 3", "train.keep from 2 to 5", "data.source from 'pydocs' to 'elsewhere'"):
        assert f"changed: {part}" in out
    assert "not bit-equal" not in out
    assert losses("run") == losses("whole") and list(losses("run", "val")) == [4, 6, 9, 12]
    assert "eval_every = 3 " in Path("run/recipe.toml").read_text()


@pytest.mark.parametrize("change", ["thread", "micro"])
def test_another_environment_is_said(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    assert go("--out", "run", "--stop-after", "6") == 0
    capsys.readouterr()
    if change == "thread":
        monkeypatch.setenv("FAKE_THREADS", "4")
    assert go("--resume", "run", *([] if change == "thread" else ["--set", "train.micro_batch_size=2"])) == 0
    what = "threads 1 -> 4" if change == "thread" else "train.micro_batch_size 0 -> 2"
    line = next(line for line in capsys.readouterr().out.splitlines() if "not bit-equal" in line)
    assert f"at step 6 ({what})" in line and "2e-5" in line
    assert [entry["from_step"] for entry in json.loads(Path("run/environment.json").read_text())] == [0, 6]


def test_other_data_is_refused_by_the_name_of_its_shard(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go("--out", "run", "--stop-after", "6") == 0
    before = tree(Path("run"))
    monkeypatch.setenv("FAKE_CONTENT", "1")
    assert go("--resume", "run") == 2
    assert "the data changed: train-00000.bin has sha256" in capsys.readouterr().err
    assert tree(Path("run")) == before


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_constant_and_wsd_runs_can_be_made_longer(go: Go, capsys: pytest.CaptureFixture[str], schedule: str) -> None:
    settings = ["--set", f"optim.schedule={schedule}"]
    assert go("--out", "long", *settings, "--steps", "18") == 0
    assert go("--out", "run", *settings, "--stop-after", "8") == 0
    capsys.readouterr()
    assert go("--resume", "run", "--steps", "18") == 0
    assert "had begun to fall" not in capsys.readouterr().out
    assert losses("run") == losses("long")
    assert go("--resume", "run", "--steps", "20") == 0
    out = capsys.readouterr().out
    assert ("the learning rate had begun to fall: it goes from 0.0001 back to 0.0126" in out) == (schedule == "wsd")
    assert max(losses("run")) == 20


def test_a_run_that_was_killed_before_its_first_save_starts_again(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--out", "whole") == 0
    assert go("--out", "run", "--stop-after", "1") == 0
    shutil.rmtree("run/checkpoints")
    capsys.readouterr()
    assert go("--resume", "run") == 0
    assert "no checkpoint yet: starts from step 1" in capsys.readouterr().out
    assert losses("run") == losses("whole")


def test_a_run_from_given_weights(go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train_command, "has_tokenizer", lambda place: False)
    assert go("--out", "first", "--set", "train.keep=0") == 0
    capsys.readouterr()
    best = resolve.resolve_model("first")
    assert go("--out", "second", "--init-from", "first", "--set", "model.n_layer=2", "--set", "train.keep=0") == 0
    out = capsys.readouterr().out
    assert f"model.n_layer: 1 from {best}, not the recipe's 2" in out
    start_weights = resolve.path_of(Path("second"), 0) / "model.safetensors"
    assert start_weights.read_bytes() == (best / "model.safetensors").read_bytes()
    assert losses("second")[1] < losses("first")[1]
    segment = json.loads(Path("second/environment.json").read_text())[0]
    assert segment["init_from"] == "first"
    # stopped before the weights were saved, it cannot begin again from the seed
    shutil.rmtree("second/checkpoints")
    (Path("second") / "checkpoints").mkdir()
    assert go("--resume", "second") == 2
    assert "from first, were saved" in capsys.readouterr().err


def test_a_run_goes_on_from_a_checkpoint_with_its_moments(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_command, "has_tokenizer", lambda place: False)
    assert go("--out", "whole") == 0
    assert go("--out", "first", "--stop-after", "5") == 0
    given = "first/checkpoints/step-0000005"
    capsys.readouterr()
    assert go("--out", "second", "--init-from", given, "--moments", "--set", "optim.beta2=0.95") == 0
    out = capsys.readouterr().out
    assert "goes on after step 5 with its optimizer's moments, 5 updates" in out
    assert f"optim.beta2 = 0.95, where {given} was trained with 0.99" in out
    assert go("--out", "third", "--init-from", given, "--moments", "--stop-after", "5") == 0
    capsys.readouterr()
    assert go("--resume", "third") == 0
    assert "not all there" not in capsys.readouterr().out
    assert losses("third") == {step: loss for step, loss in losses("whole").items() if step > 5}
    assert weights("third", 12) == weights("whole", 12)
    assert losses("second")[7] != losses("whole")[7]
    # the counter-case: without them the same weights take other steps, and it is said
    assert go("--out", "fourth", "--init-from", given) == 0
    assert "moments are left out" in capsys.readouterr().out
    for flags, expected in (
        (["--moments"], "--moments: expected --init-from"),
        (["--init-from", given, "--moments", "--steps", "5"], "after step 5; expected more"),
        (["--resume", "third", "--moments"], "--moments: expected --init-from"),
    ):
        assert go("--out" if "--resume" not in flags else "--resume", "fifth", *flags) == 2
        assert expected in capsys.readouterr().err
    shutil.rmtree(f"{given}/training")
    assert go("--out", "fifth", "--init-from", given, "--moments") == 2
    assert "has no training/optimizer.safetensors" in capsys.readouterr().err
    assert not Path("fifth").exists()


def test_a_tokenizer_that_is_gone_is_taken_from_the_checkpoint(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("words").write_text("")
    assert go("--out", "run", "--set", "data.tokenizer=words", "--stop-after", "5") == 0
    Path("words").unlink()
    asked, real = [], fake_run.open_data
    monkeypatch.setattr(
        train_command.token_source, "open_data", lambda data, *rest: asked.append(data.tokenizer) or real(data, *rest)
    )
    assert go("--resume", "run") == 0
    assert asked == [str(Path("run/checkpoints/step-0000005").resolve())]
    assert "words is gone; run/checkpoints/step-0000005 has it" in capsys.readouterr().out


def test_weights_of_another_vocabulary_are_refused(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go("--out", "first") == 0
    monkeypatch.setattr(fake_run, "VOCABULARY", 20)
    monkeypatch.setattr(fake_run.Source, "vocab_size", 20)
    monkeypatch.setattr(train_command, "has_tokenizer", lambda place: False)
    assert go("--out", "second", "--init-from", "first") == 2
    assert "vocabulary of 13, the data's has 20" in capsys.readouterr().err
    monkeypatch.setattr(train_command, "has_tokenizer", lambda place: True)
    monkeypatch.setattr(train_command, "load_tokenizer", lambda place: fake_run.SimpleNamespace(digest="0" * 64))
    assert go("--out", "second", "--init-from", "first") == 2
    assert "its tokenizer has sha256 000000000000..." in capsys.readouterr().err
    assert not Path("second").exists()


def test_names_that_are_taken_are_counted_on(go: Go) -> None:
    for name in ("recipe", "recipe-2", "recipe-3"):
        assert go() == 0
        assert Path("runs", name, "last").exists()


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
    assert f"and saved at step {step}; goes on with: mlxgpt train --resume run" in rest.splitlines()[-1]
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
    began = time.perf_counter()
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.returncode == -signal.SIGINT
    assert time.perf_counter() - began < 0.5  # a step takes 0.8 s
    process.stdout.close()
    assert go("--resume", "run") == 0
    assert losses("run") == losses("whole")


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


def test_the_loop_adds_little_to_a_step(go: Go) -> None:
    """Host time of the loop with nothing in it: rate, metrics, display, guards. 16 us on an idle core."""
    recipe = train_command.build(train_command.read_toml(Path("recipe.toml")))
    source = fake_run.Source(1337, 4, 8)
    recipe = train_command._resolve(recipe, source, fake_run.Tokenizer())  # type: ignore[arg-type]
    settings = train_command.dataclasses.replace(recipe.train, steps=5000, eval_every=0, save_every=0, log_every=1000)
    recipe = train_command.dataclasses.replace(recipe, train=settings)
    engine = fake_run.Engine(recipe, train_command.params.init_params(recipe.model, 1))
    batch, real = source.batch(1), engine.train_step

    def train_step(step: int, batches: list[Batch], lr: float) -> Any:
        if step <= 2:
            return real(step, batches, lr)
        engine.t += 1
        return loop.guards.StepStats(2.0, 1.0, 1.0, True)

    engine.train_step, source.batch = train_step, lambda step: batch  # type: ignore[method-assign]
    run = Path("run")
    (run / "checkpoints").mkdir(parents=True)
    Path("recipe.toml").rename(run / "recipe.toml")
    state = session.fresh(recipe, source.digest, engine.describe())
    with metrics_of(run) as lines, Progress("x", 5000, log_every=1000) as display:
        began = time.thread_time()
        job = loop.Job(run, recipe, engine, source, fake_run.Tokenizer(), state, lines, display)
        assert loop.train(job) == 0
        spent = time.thread_time() - began
    assert spent / 5000 < 100e-6


def metrics_of(run: Path) -> Any:
    """A metrics writer that closes itself."""
    return contextlib.closing(metrics.Metrics(run, []))
