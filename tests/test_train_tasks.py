"""train.tasks: the same scores in both frameworks at each validation, and a training that does not notice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt import cli
from mlxgpt.commands.look import report
from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError
from mlxgpt.common.folders import resolve
from mlxgpt.common.inference.generation import Result
from mlxgpt.common.recipes import apply_sets, build
from mlxgpt.common.runs import checkpoint, metrics, plots
from mlxgpt.common.runs import summary as run_summary
from mlxgpt.common.tasks.scorer import ModelScorer
from mlxgpt.common.train import tasks

BACKENDS = ("mlx", "torch")
FILES = {
    "quiz": [
        {"text": "the cat ", "choices": ["sat", "tta", "hmm"], "answer": 0},
        {"text": "on the ", "choices": ["eee", "mat"], "answer": "mat"},
        {"text": "the hat ", "choices": ["was thin", "xxxxxx"], "answer": 0},
    ],
    "words": [{"text": "the cat sat on the", "answer": "mat"}, {"text": "the", "answer": "hat"}],
    "says": [{"prompt": "the ", "answer": "cat"}, {"prompt": "on ", "answer": "the"}],
}
SMALL = {
    "data.tokenizer": "char", "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 32,
    "train.batch_size": 4, "train.steps": 6, "train.eval_every": 3, "train.eval_batches": 1, "train.save_every": 2,
    "train.compile": "off", "optim.warmup": 1, "optim.lr": 0.01, "train.dropout": 0.2, "sample.max_tokens": 0,
}  # fmt: skip
ASKED = "train.tasks=" + json.dumps([f"{name}.jsonl" for name in FILES])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and tasks, and a run of each framework that is asked them."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "corpus.txt").write_text("the cat sat on the mat. the hat was thin, mmm xx.\n" * 60)
    for name, rows in FILES.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("MLXGPT_CACHE", str(place / "cache"))
        for backend in BACKENDS:
            assert go(backend, backend, "--set", ASKED) == 0
    return place


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLXGPT_CACHE", str(place / "cache"))
    return place


def go(out: str, backend: str, *words: str) -> int:
    """``mlxgpt train`` on the CPU."""
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    flags = ["--data", "corpus.txt", "--out", out, "--backend", backend, "--device", "cpu"]
    return cli.main(["train", *flags, *sets, *words])


def lines(run: str | Path, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run without what time and memory change."""
    found = [line for line in metrics.read_lines(Path(run) / metrics.FILE) if split in (None, line["split"])]
    return [{key: value for key, value in line.items() if key not in ("seconds", "memory")} for line in found]


def without(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without tasks."""
    return [{key: value for key, value in line.items() if key != "tasks"} for line in found]


def test_both_frameworks_say_the_same(at: Path) -> None:
    ours, theirs = (lines(backend, "val") for backend in BACKENDS)
    assert [line["step"] for line in ours] == [3, 6]
    for one, two in zip(ours, theirs, strict=True):
        assert one["tasks"].keys() == two["tasks"].keys() == FILES.keys()
        assert set(one["tasks"]["words"]) == {"acc", "perplexity"} and set(one["tasks"]["says"]) == {"exact_match"}
        for task, found in one["tasks"].items():
            for name, value in found.items():
                assert value == pytest.approx(two["tasks"][task][name], rel=1e-5), (task, name)
    assert ours[0]["tasks"]["words"] != ours[1]["tasks"]["words"]


def test_the_saved_model_says_the_same(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [word for name in FILES for word in ("--task", f"{name}.jsonl")]
    assert cli.main(["eval", "-m", str(resolve.path_of(Path("mlx"), 6)), *files, "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    for task, values in lines("mlx", "val")[-1]["tasks"].items():
        for name, value in values.items():
            assert value == pytest.approx(found[task]["metrics"][name]["value"], rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_does_not_notice(at: Path, backend: str) -> None:
    assert go(f"{backend}-plain", backend) == 0
    assert lines(f"{backend}-plain") == without(lines(backend))
    weights = [
        (resolve.path_of(Path(run), 6) / "model.safetensors").read_bytes() for run in (backend, f"{backend}-plain")
    ]
    assert weights[0] == weights[1]


def test_a_scorer_that_touches_a_weight_is_seen(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(self: Any, backend: Any, model: Any, say: Any, stopped: Any) -> tasks.Scores:
        next(model.parameters()).data.mul_(1 + 1e-6)
        return {}

    monkeypatch.setattr(tasks.Tasks, "score", score)
    assert go("mutated", "torch", "--set", ASKED) == 0
    changed, right = lines("mutated", "train"), lines("torch", "train")
    assert changed[:3] == right[:3] and changed[3]["loss"] != right[3]["loss"]


def test_a_resumed_run_has_each_validation_once(at: Path) -> None:
    assert go("stopped", "torch", "--set", ASKED, "--stop-after", "4") == 0
    with open("stopped/metrics.jsonl", "a") as file:  # what a killed run wrote after its last checkpoint
        file.write('{"step": 6, "split": "val", "loss": 1.0, "tasks": {"quiz": {"acc": 9.0}}}\n')
    assert cli.main(["train", "--resume", "stopped", "--device", "cpu", "--backend", "torch"]) == 0
    assert lines("stopped") == lines("torch")
    digests = checkpoint.verify(resolve.path_of(Path("stopped"), 6)).data
    assert {f"task {name}" for name in FILES} <= digests.keys()


def test_a_resumed_run_is_asked_the_same_questions(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("asked", "torch", "--set", 'train.tasks="quiz.jsonl"', "--stop-after", "4") == 0
    resume = ["train", "--resume", "asked", "--device", "cpu", "--backend", "torch"]
    shutil.copy("quiz.jsonl", "kept")
    before = Path("asked/metrics.jsonl").read_bytes()
    Path("quiz.jsonl").write_text(Path("kept").read_text().replace("thin", "this"))
    try:
        assert cli.main(resume) == 2
        assert "train.tasks: quiz: other questions than the run began with" in capsys.readouterr().err
    finally:
        shutil.copy("kept", "quiz.jsonl")
    assert cli.main([*resume, "--set", "train.task_limit=2"]) == 2
    assert "expected the same file and train.task_limit" in capsys.readouterr().err
    assert Path("asked/metrics.jsonl").read_bytes() == before
    Path("moved").mkdir()
    shutil.move("quiz.jsonl", "moved/quiz.jsonl")
    try:
        assert cli.main(resume) == 2
        assert "quiz.jsonl: no such file" in capsys.readouterr().err
        more = ["--set", 'train.tasks=["moved/quiz.jsonl", "words.jsonl"]']
        assert cli.main([*resume, *more]) == 0
    finally:
        shutil.move("moved/quiz.jsonl", "quiz.jsonl")
    assert "changed: train.tasks from" in capsys.readouterr().out
    assert [set(line["tasks"]) for line in lines("asked", "val")] == [{"quiz"}, {"quiz", "words"}]


def test_what_is_shown_while_it_trains(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("shown", "torch", "--set", ASKED, "--set", "train.task_limit=2", "--stop-after", "3") == 0
    said = capsys.readouterr().out
    assert "train.tasks: quiz: 2 of 3 questions at each validation" in said
    assert "train.tasks: words: 2 questions at each validation" in said
    found = lines("shown", "val")[0]["tasks"]
    first = f"quiz acc {found['quiz']['acc']:.4f}  words acc {found['words']['acc']:.4f}  says exact_match"
    assert first in next(line for line in said.splitlines() if line.startswith("step 3/6  validation loss"))


def test_the_report_has_a_curve_a_task(at: Path, tmp_path: Path) -> None:
    runs = [run_summary.read_run(Path(backend)) for backend in BACKENDS]
    assert runs[0].val["tasks/quiz/acc"].tolist() == [line["tasks"]["quiz"]["acc"] for line in lines("mlx", "val")]
    groups = plots.tasks(runs)
    assert groups == {
        "quiz": [["acc", "acc_norm", "acc_per_byte", "acc_per_token"]], "words": [["acc"], ["perplexity"]],
        "says": [["exact_match"]],
    }  # fmt: skip
    page = report.render(runs)
    assert all(f"Task {name}" in page and f'id="task_{name}-' in page for name in FILES)
    last = lines("mlx", "val")[-1]["tasks"]["quiz"]["acc"]
    assert ("quiz acc", f"{last:.4f} at step 6") in report.facts(runs[0])
    report.write_csv(runs[0], tmp_path)
    assert "tasks/words/perplexity" in (tmp_path / "mlx-val.csv").read_text().splitlines()[0]
    numbers = metrics.numbers(next(line for line in lines("mlx", "val")))
    assert "val/tasks/quiz/acc" in numbers and "val/loss" in numbers


REFUSED: dict[str, tuple[list[str], str]] = {
    "missing": (['train.tasks="nothing.jsonl"'], "train.tasks: nothing.jsonl: no such file"),
    "broken": (['train.tasks="broken.jsonl"'], "broken.jsonl row 1: answer 7: expected 0 to 1"),
    "code": (['train.tasks="code.jsonl"'], "programs are not run in training"),
    "twice": (['train.tasks=["quiz.jsonl", "again/quiz.jsonl"]'], "there is a task quiz already"),
    "letters": (['train.tasks="other.jsonl"'], "train.tasks: other: "),
    "long": (['train.tasks="long.jsonl"'], "expected less than 32, the model's context"),
    "never": ([ASKED, "train.eval_every=0"], "expected train.eval_every"),
    "limit": ([ASKED, "train.task_limit=-1"], "train.task_limit = -1"),
    "number": (["train.tasks=7"], "train.tasks = 7: expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_refused_before_training(
    name: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("again").mkdir(exist_ok=True)
    for file, row in {
        "broken": {"text": "a", "choices": ["b", "c"], "answer": 7},
        "code": {"prompt": "def f():", "tests": "f()"},
        "again/quiz": FILES["quiz"][0],
        "other": {"text": "the Q", "answer": "cat"},
        "long": {"prompt": "the", "answer": "cat " * 20},
    }.items():
        Path(f"{file}.jsonl").write_text(json.dumps(row))
    sets, expected = REFUSED[name]
    assert go("refused", "torch", *[word for each in sets for word in ("--set", each)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not Path("refused").exists()


def test_paths_of_a_recipe_are_from_its_folder(at: Path) -> None:
    Path("below").mkdir(exist_ok=True)
    shutil.copy("quiz.jsonl", "below/own.jsonl")
    recipe = build(apply_sets({}, ['train.tasks=["below/own.jsonl", "arc_easy=below", "piqa"]'])).train
    home = Path.cwd().resolve()
    assert tasks.absolute(recipe).tasks == (f"{home}/below/own.jsonl", f"arc_easy={home}/below", "piqa")


class Model:
    """What a scorer asks of a model."""

    config = build({"model": {"vocab_size": 99, "block_size": 32}}).model


def asked(generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, stopped: bool = False) -> Any:
    """What ``says`` gives where the framework generates so."""
    backend = backends.load("torch")
    monkeypatch.setattr(backend.generate, "generate", generate)
    tokenizer = resolve.resolve_tokenizer("torch")
    made = tasks.Tasks(tasks.read(build({"train": {"tasks": "says.jsonl"}}).train), None, tokenizer)
    return made.score(backend, Model(), lambda text: None, lambda: stopped)


def test_a_signal_ends_the_questions(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [Result("cat", [], 1, "stop")] * 2
    assert asked(lambda *given, **more: results, monkeypatch) == {"says": {"exact_match": 0.5}}
    with pytest.raises(tasks.Stopped):
        asked(lambda *given, **more: results, monkeypatch, stopped=True)


def test_numbers_that_are_not_finite_end_no_run(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise RunError("the model's logits are not finite")

    found = asked(broken, monkeypatch)
    assert found == {"says": {}} and tasks.shown(found) == "  says  nan"


def test_fine_tuning_asks_too(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "the ", "completion": word} for word in ("cat", "mat", "hat", "thin", "xx", "mmm") * 4]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ["train.eval_every=2", "train.batch_size=2", "adapter.dropout=0.1", "sample.max_tokens=0", "optim.warmup=1"]
    for out, more in (("tuned", [ASKED]), ("untold", [])):
        words = [word for each in [*sets, "tune.packing=false", *more] for word in ("--set", each)]
        flags = ["--model", "torch", "--data", "rows.jsonl", "--steps", "4", "--backend", "torch", "--device", "cpu"]
        assert cli.main(["finetune", *flags, "--out", out, *words]) == 0
    assert without(lines("tuned")) == lines("untold")
    found = lines("tuned", "val")
    assert found[-1]["tasks"]["words"]["perplexity"] != lines("torch", "val")[-1]["tasks"]["words"]["perplexity"]
    scorer = ModelScorer(backends.load("torch"), *backends.load("torch").load.load("tuned", device="cpu"))
    assert scorer.answers(["the "], (), SampleConfig(max_tokens=2, temperature=0.0)) is not None
    assert np.isfinite(found[-1]["tasks"]["words"]["perplexity"])
