"""The training loop's policies under a framework of plain numpy: guards, stopping, saving, wrong usage."""

import contextlib
import json
import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
from fake_train import Go, losses

from mlxgpt.common.batch import Batch
from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import checkpoint, metrics, samples
from mlxgpt.common.train import guards, loop, pretrain, session
from mlxgpt.common.train.job import Job
from mlxgpt.common.train.progress import Progress


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
    assert samples.read_samples(Path("run"))[-1] == samples.Sample(12, "bcd 12")
    environment = json.loads(Path("run/environment.json").read_text())
    assert len(environment) == 1 and {"framework", "version", "device", "threads", "python", "commit", "dirty"} <= set(
        environment[0]
    )
    assert {path.name for path in Path("run").iterdir()} == {
        "recipe.toml", "metrics.jsonl", "samples.jsonl", "environment.json", "plan.json", "checkpoints", "best", "last",
        ".lock",
    }  # fmt: skip


def test_a_samples_blank_lines_are_kept_and_not_shown(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain.Pretraining, "sample", lambda self, job: "\n\n\nfirst" + "\n \n" * 20 + "second\n\n")
    assert go("--out", "run") == 0
    assert "sample at step 12:\nfirst\n\nsecond\n" in capsys.readouterr().out
    assert samples.read_samples(Path("run"))[-1].text.count("\n") > 40


def test_the_loss_of_a_step_is_the_one_before_its_update(go: Go) -> None:
    assert go("--out", "run") == 0
    source = fake_run.Source(1337, 4, 8)
    recipe = pretrain.build(pretrain.recipes.read_toml(Path("run/recipe.toml")))
    engine = fake_run.Engine(recipe, pretrain.params.init_params(recipe.model, 1337))
    sums = engine.evaluate(source.batch(1))
    assert losses("run")[1] == sums["loss"] / sums["weight"]


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
    assert "h.0.mlp.c_fc.weight: no bit has changed after two updates" in capsys.readouterr().err
    assert list(losses("stuck")) == [1, 2]


def test_a_gradient_that_is_zero_by_design_may_be_so_once() -> None:
    param = pretrain.params.Param((2,), zero_grad_at_init=True)
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
    watch = guards.FirstUpdates(engine, {"a": pretrain.params.Param((2,))})  # type: ignore[arg-type]
    engine.t = 2
    with pytest.raises(guards.RunError, match="a: no bit") if accused else contextlib.nullcontext():
        watch.check(guards.StepStats(1.0, 1.0, 1.0, True), rate)


def test_a_batch_without_targets_is_refused() -> None:
    tokens = np.zeros((2, 3), np.int32)
    with pytest.raises(guards.RunError, match="none of the 6 tokens"):
        guards.describe_targets(Batch(tokens, tokens, np.zeros((2, 3), np.float32)))
    half = Batch(tokens, tokens, np.array([[0, 0, 1], [0, 1, 0]], np.float32))
    assert guards.describe_targets(half) == "step 1: 2 of 6 tokens are targets (33.3%)"


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
        (["--resume", "taken", "--out", "x"], "--out x: not with --resume: a resumed run keeps its folder"),
        (["--resume", "taken", "--init-from", "x"], "--init-from x: not with --resume: a resumed run"),
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


def test_names_that_are_taken_are_counted_on(go: Go) -> None:
    for name in ("recipe", "recipe-2", "recipe-3"):
        assert go() == 0
        assert Path("runs", name, "last").exists()


def test_the_loop_adds_little_to_a_step(go: Go) -> None:
    """Host time of the loop with nothing in it: rate, metrics, display, guards. 16 us on an idle core."""
    recipe = pretrain.build(pretrain.recipes.read_toml(Path("recipe.toml")))
    source = fake_run.Source(1337, 4, 8)
    recipe = pretrain.with_vocabulary(recipe, source.vocab_size)
    settings = pretrain.dataclasses.replace(recipe.train, steps=5000, eval_every=0, save_every=0, log_every=1000)
    recipe = pretrain.dataclasses.replace(recipe, train=settings)
    engine = fake_run.Engine(recipe, pretrain.params.init_params(recipe.model, 1))
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
    kind = pretrain.Pretraining(Namespace())
    kind.recipe, kind.source, kind.tokenizer = recipe, source, fake_run.Tokenizer()  # type: ignore[assignment]
    state = session.first_state(kind, engine.describe())
    with metrics_of(run) as lines, Progress("x", 5000, log_every=1000) as display:
        began = time.thread_time()
        assert loop.train(Job(run, kind, fake_run.load_backend("fake"), engine, state, lines, display)) == 0
        spent = time.thread_time() - began
    assert spent / 5000 < 100e-6


def metrics_of(run: Path) -> Any:
    """A metrics writer that closes itself."""
    return contextlib.closing(metrics.Metrics(run, []))
