"""What a resumed run equals, what it may change, and what it may start from."""

import json
import shutil
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
from fake_train import Go, losses, tree, weights

from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import resolve
from mlxgpt.common.recipes import build
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.train import pretrain, resume


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
    real = checkpoint.read_optimizer

    def forgetful(place: Path, trained: Any) -> Any:
        snapshot: Any = real(place, trained)
        if what in ("m", "v"):
            snapshot[what] = {name: np.zeros_like(array) for name, array in snapshot[what].items()}
        if what == "t":
            snapshot["t"] = 1
        return snapshot

    monkeypatch.setattr(checkpoint, "read_optimizer", forgetful)
    if what == "seed":
        monkeypatch.setattr(fake_run.Source, "batch", lambda self, step: self._batch(np.arange(4) * 7 + step))
    if what == "step":
        step = fake_run.Engine.train_step
        monkeypatch.setattr(fake_run.Engine, "train_step", lambda self, s, batches, lr: step(self, s - 7, batches, lr))
    assert go("--resume", "parts") == 0
    assert losses("parts")[7] == losses("whole")[7]
    assert losses("parts")[12] != losses("whole")[12]


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
    assert "step-0000006/model.safetensors: damaged: sha256" in out and "resumes from step 5" in out
    assert losses("parts") == losses("whole") and weights("parts", 12) == weights("whole", 12)
    assert Path("parts/checkpoints/damaged-step-0000006").is_dir()


def test_resuming_a_finished_run_prints_one_line(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--out", "run") == 0
    before = tree(Path("run"))
    capsys.readouterr()
    assert go("--resume", "run") == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert tree(Path("run")) == before


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
    assert "had begun to decay" not in capsys.readouterr().out
    assert losses("run") == losses("long")


def test_a_finished_wsd_run_goes_on_from_before_its_decay_and_is_the_longer_run(
    go: Go, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not from its last step, where the rate had decayed: the curve and the weights are those of the longer run."""
    settings = ["--set", "optim.schedule=wsd", "--set", "optim.decay_fraction=0.5", "--set", "train.keep=1"]
    assert go("--out", "long", *settings, "--steps", "20") == 0
    assert go("--out", "run", *settings) == 0
    best = json.loads((resolve.path_of(Path("run"), 6) / checkpoint.STATE).read_text())["best"]["step"]
    assert {best, 6, 12} <= set(resolve.steps_of(Path("run"))) and max(losses("run")) == 12
    decayed = weights("run", 12)
    capsys.readouterr()
    assert go("--resume", "run", "--steps", "20", "--stop-after", "7") == 0
    assert resolve.follow(Path("run"), "best") == resolve.path_of(Path("run"), best)
    assert go("--resume", "run") == 0
    out = capsys.readouterr().out
    assert "steps 7 to 12 are repeated" in out and "a run of 20 steps from the start" in out
    for split in ("train", "val"):
        assert losses("run", split) == losses("long", split)
    assert weights("run", 20) == weights("long", 20)
    aside = Path("run/checkpoints/decayed-step-0000012")
    names = ("model.safetensors", "training/optimizer.safetensors")
    assert b"".join((aside / name).read_bytes() for name in names) == decayed


def test_a_wsd_run_without_a_checkpoint_from_before_its_decay_says_so(
    go: Go, capsys: pytest.CaptureFixture[str]
) -> None:
    """As runs of earlier versions have none."""
    assert go("--out", "run", "--set", "optim.schedule=wsd") == 0
    for step in resolve.steps_of(Path("run"))[:-1]:
        shutil.rmtree(resolve.path_of(Path("run"), step))
    capsys.readouterr()
    assert go("--resume", "run", "--steps", "20") == 0
    assert "the learning rate had begun to decay: it returns from 0.0001 to 0.05" in capsys.readouterr().out
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
    monkeypatch.setattr(pretrain, "has_tokenizer", lambda place: False)
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
    assert "stopped before its first weights were saved" in capsys.readouterr().err


def test_a_run_goes_on_from_a_checkpoint_with_its_moments(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "has_tokenizer", lambda place: False)
    assert go("--out", "whole") == 0
    assert go("--out", "first", "--stop-after", "5") == 0
    given = "first/checkpoints/step-0000005"
    capsys.readouterr()
    assert go("--out", "second", "--init-from", given, "--moments", "--set", "optim.beta2=0.95") == 0
    out = capsys.readouterr().out
    assert "starts after step 5 with its optimizer's moments, 5 updates" in out
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
        pretrain.token_source, "open_data", lambda data, *rest: asked.append(data.tokenizer) or real(data, *rest)
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
    monkeypatch.setattr(pretrain, "has_tokenizer", lambda place: False)
    assert go("--out", "second", "--init-from", "first") == 2
    assert "vocabulary of 13, the data's has 20" in capsys.readouterr().err
    monkeypatch.setattr(pretrain, "has_tokenizer", lambda place: True)
    monkeypatch.setattr(pretrain, "load_tokenizer", lambda place: fake_run.SimpleNamespace(digest="0" * 64))
    assert go("--out", "second", "--init-from", "first") == 2
    assert "its tokenizer has sha256 000000000000..." in capsys.readouterr().err
    assert not Path("second").exists()


@pytest.mark.parametrize(
    ("sections", "cure"),
    [
        ({}, "--init-from 'my run' starts"),
        ({"tune": {"model": "m"}, "adapter": {"method": "lora"}}, "--model m --adapter 'my run' starts"),
        ({"tune": {"model": "m"}, "adapter": {"method": "full"}}, "--model 'my run' starts"),
    ],
)
def test_a_run_that_cannot_be_longer_names_what_starts_from_its_weights(sections: dict, cure: str) -> None:
    recipe = build(sections | {"train": {"steps": 20}})
    with pytest.raises(UserError, match=cure):
        resume._check_steps(Path("my run"), recipe, 12, print)
