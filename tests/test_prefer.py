"""finetune --task prefer from the command line: both frameworks, the reference, stop and resume, what a run leaves."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt import cli
from mlxgpt.common.align import kto, reference
from mlxgpt.common.align.preferring import Preferring
from mlxgpt.common.align.source import PairSource
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import TuneConfig
from mlxgpt.common.folders import model_folder, resolve, tensors
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build, read_toml
from mlxgpt.common.runs import checkpoint, metrics, samples
from mlxgpt.common.sft.encode import Encoder
from mlxgpt.common.tokenizers import load as tokenizer
from mlxgpt.common.train.job import Job

BACKENDS = ("mlx", "torch")
STEPS, STOP = 4, 2
SMALL = [
    "train.batch_size=4", "train.eval_every=2", "train.save_every=0", "optim.lr=5e-3", "optim.warmup=0",
    "sample.max_tokens=0", "train.compile=off",
]  # fmt: skip
WORDS = ("red", "blue", "green", "two", "three", "cat", "dog")
PAIRED = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
          "logps/rejected"}  # fmt: skip


def rows(count: int = 40) -> list[dict[str, Any]]:
    """Pairs of unequal length."""
    made = []
    for n in range(count):
        words = " ".join(WORDS[(n * k) % 7] for k in range(1, 2 + n % 4))
        made.append(
            {"prompt": f"say {words} and {n}\n", "chosen": f"{words} it is", "rejected": f"{n} no {words[::-1]}"}
        )
    return made


def judged(count: int = 40) -> list[dict[str, Any]]:
    """Single answers."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}
        for n, row in enumerate(rows(count))
    ]


def write(path: Path, values: list[Any]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, an adapter of it that has trained, pairs and judged answers, some to test on."""
    place = tmp_path_factory.mktemp("prefer")
    for name, made in (("pairs", rows(24)), ("judged", judged(24))):
        (place / name).mkdir()
        write(place / name / "train.jsonl", made[:16])
        write(place / name / "valid.jsonl", made[16:20])
        write(place / name / "test.jsonl", made[20:])
    texts = [" ".join(row.values()) for row in rows()]
    spelled = tokenizer.train_tokenizer("bpe", texts, 300)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_hidden": 64, "block_size": 48, "vocab_size": spelled.n_vocab}
    model = build({"model": {"family": "llama", **sizes}}).model
    model_folder.write_model(place / "base", model, params.init_params(model, 3), tokenizer=spelled)
    lm = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows()]
    write(place / "lm.jsonl", lm)
    words = ["finetune", "-m", str(place / "base"), "-d", str(place / "lm.jsonl"), "--device", "cpu", "-n", "4"]
    words += ["--out", str(place / "given"), "--lr", "1e-2", "--set", "sample.max_tokens=0", "--set", "optim.warmup=0"]
    assert cli.main([*words, "--set", "adapter.train=['model.norm']"]) == 0
    return place


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(place)
    return place


def go(out: str, *words: str, loss: str = "dpo", data: str = "", model: str = "base", steps: int = STEPS) -> int:
    """``mlxgpt finetune --task prefer`` on the CPU."""
    data = data or ("judged" if loss == "kto" else "pairs")
    sets = [word for item in [*SMALL, f"prefer.loss={loss}"] for word in ("--set", item)]
    base = ["finetune", "--task", "prefer", "--model", model, "--data", data, "--out", out, "--device", "cpu"]
    return cli.main([*base, "--steps", str(steps), *sets, *words])


def resume(run: str, backend: str = "mlx", *words: str) -> int:
    return cli.main(["finetune", "--resume", run, "--backend", backend, "--device", "cpu", *words])


def lines(run: str, split: str) -> list[dict[str, Any]]:
    return [line for line in metrics.read_lines(Path(run) / metrics.FILE) if line["split"] == split]


def losses(run: str) -> np.ndarray:
    return np.array([line["loss"] for line in metrics.read_lines(Path(run) / metrics.FILE)])


def content(run: str) -> dict[str, bytes]:
    """Weights and the optimizer's state of the newest checkpoint."""
    place = resolve.path_of(Path(run), resolve.steps_of(Path(run))[-1])
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*.safetensors"))}


@pytest.mark.parametrize(
    ("loss", "model", "more"),
    [
        ("dpo", "given", ("train.micro_batch_size=2", "adapter.dropout=0.1", "prefer.sft=0.5")),
        ("kto", "base", ("adapter.method=dora", "train.micro_batch_size=2")),
        ("ipo", "base", ("adapter.bits=8", "adapter.group_size=32")),
        ("orpo", "base", ("adapter.method=full", "train.dropout=0.1")),
    ],
)
def test_one_curve_in_both_frameworks_stopped_and_resumed(
    at: Path, loss: str, model: str, more: tuple[str, ...]
) -> None:
    stops = {"dpo": BACKENDS, "kto": BACKENDS[:1]}.get(loss, ())
    options, runs = [word for each in more for word in ("--set", each)], {}
    for backend in BACKENDS:
        runs[backend] = f"{loss}-{backend}"
        assert go(runs[backend], "--backend", backend, *options, loss=loss, model=model) == 0
        words = ("--stop-after", str(STOP), "--backend", backend)
        assert backend not in stops or go(f"{runs[backend]}-stopped", *words, *options, loss=loss, model=model) == 0
    gaps = np.abs(losses(runs["mlx"]) - losses(runs["torch"])) / np.maximum(1.0, losses(runs["mlx"]))
    print(f"{loss}: step 1 {gaps[0]:.1e}, largest {gaps.max():.1e}")
    assert gaps[0] <= 2e-6 and gaps.max() <= 1e-4 and np.ptp(losses(runs["mlx"])) > 1e-3
    for origin, backend in [(origin, backend) for origin in stops for backend in BACKENDS]:
        run = f"{runs[origin]}-to-{backend}"
        shutil.copytree(f"{runs[origin]}-stopped", run, symlinks=True)
        assert resume(run, backend) == 0
        gap = np.abs(losses(run) - losses(runs[origin])).max()
        if origin == backend:
            assert gap == 0 and content(run) == content(runs[origin])
        else:
            print(f"{loss}: {origin} to {backend}: {gap:.1e}")
            assert gap <= 2e-5
    held = (Path(runs["mlx"]) / reference.FILE).is_file()
    assert held == (loss in ("dpo", "kto", "ipo"))


# The reference.


def measured(backend: str, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any] | None, out: str) -> float:
    """How far the first loss is from that of a policy which is its own reference, by an adapter that has trained."""
    if change:
        change(monkeypatch)
    assert go(out, "--backend", backend, model="given", steps=1) == 0
    (first,) = lines(out, "train")
    return abs(first["loss"] - math.log(2)) + abs(first["rewards/margins"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_is_the_run_as_it_begins(at: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    assert measured(backend, monkeypatch, None, f"first-{backend}") <= 1e-5


def the_base_alone(patch: pytest.MonkeyPatch) -> None:
    """Log-probabilities with the adapter off, and with the norms that trained along."""
    logps = reference.logps

    def off(engine: Any, batch: Batch, micro: int) -> np.ndarray:
        kept = engine.snapshot()
        zero = {name: array * (0 if name.endswith("lora_b") else 1) for name, array in kept["params"].items()}
        engine.load_state(kept | {"params": zero})
        found = logps(engine, batch, micro)
        engine.load_state(kept)
        return found

    patch.setattr(reference, "logps", off)


def of(change: Callable[[Batch, np.ndarray], np.ndarray]) -> Callable[[pytest.MonkeyPatch], None]:
    """Other log-probabilities from a batch and its losses."""

    def patched(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(reference, "logps", lambda engine, batch, micro: change(batch, engine.token_losses(batch)))

    return patched


@pytest.mark.parametrize(
    "change",
    [
        the_base_alone,
        of(lambda batch, each: -(each * batch.weights).sum(-1) / batch.weights.sum(-1)),  # a mean for the sum
        of(lambda batch, each: -(each * np.roll(batch.weights, 1, axis=1)).sum(-1)),  # logits off by one
        of(lambda batch, each: -(each * batch.weights * np.roll(batch.weights, -1, axis=1)).sum(-1)),  # no end
    ],
    ids=["base", "mean", "shifted", "end"],
)
def test_another_reference_is_seen(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]
) -> None:
    assert measured("torch", monkeypatch, change, str(tmp_path / "run")) > 1e-3


def test_a_reference_that_drifts_at_resume_is_another_curve(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert go("steady") == 0 and go("drifted", "--stop-after", str(STOP)) == 0
    begun = Preferring.begun

    def again(kind: Preferring, job: Job) -> None:
        kind._run = None
        begun(kind, job)

    monkeypatch.setattr(Preferring, "begun", again)
    assert resume("drifted") == 0
    assert np.abs(losses("drifted") - losses("steady")).max() > 1e-3
    before, after = (checkpoint.verify(resolve.path_of(Path(run), STEPS)).data for run in ("steady", "drifted"))
    assert before[reference.DIGEST] != after[reference.DIGEST]


@pytest.mark.parametrize("damage", ["missing", "other", "cut"])
def test_a_reference_that_is_not_the_runs_is_refused(
    at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = tmp_path / "run"
    assert go(str(run), "--stop-after", "1") == 0
    file = run / reference.FILE
    held = tensors.read_tensors(file)
    assert {name: len(array) for name, array in held.items()} == {"train": 32, "valid": 8, "test": 8}
    assert checkpoint.verify(resolve.path_of(run, 1)).data[reference.DIGEST] == reference.digest(run)
    whole = file.read_bytes()
    file.unlink()
    if damage == "other":
        reference.write(run, {name: array + 1 for name, array in held.items()})
    elif damage == "cut":
        file.write_bytes(whole[:-8])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert resume(str(run)) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert reference.FILE in told and "expected the file from a copy of the run, or a new run" in told
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert cli.main(["runs", "check", str(run)]) == 1
    assert reference.FILE in capsys.readouterr().out


def test_a_reference_that_is_not_finite_ends_the_run(at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "logps", lambda engine, batch, micro: np.full(len(batch.tokens), np.nan))
    assert go(str(tmp_path / "run")) == 1


# KTO's divergence.


def test_ktos_divergence_is_of_the_global_batch(at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def curve(out: str, micro: int) -> np.ndarray:
        words = ("--set", f"train.micro_batch_size={micro}", "--backend", "torch")
        assert go(str(tmp_path / out), *words, loss="kto") == 0
        return np.array([line["kl"] for line in lines(str(tmp_path / out), "train")])

    whole, parts = curve("whole", 0), curve("parts", 1)
    assert whole[0] <= 1e-5 and whole.max() > 1e-3 and np.abs(whole - parts).max() <= 1e-5
    others = kto.others
    monkeypatch.setattr(  # a mutation: within micro-batches of one row
        kto, "others", lambda plans, count: others([[row] for plan in plans for row in plan], count)
    )
    assert np.abs(curve("within", 1) - whole).max() > 1e-3


def test_kto_leaves_out_what_a_batch_does_not_have() -> None:
    from mlxgpt.common.align.preferring import named

    sums = {"weight": 4.0, "count/chosen": 1.0, "count/rejected": 3.0, "rewards/chosen": 2.0, "rewards/rejected": -3.0,
            "logps/chosen": -5.0, "logps/rejected": -9.0, "kl": 2.0}  # fmt: skip
    assert named(sums) == {"rewards/chosen": 2.0, "rewards/rejected": -1.0, "logps/chosen": -5.0, "kl": 0.5,
                           "logps/rejected": -3.0, "rewards/margins": 3.0}  # fmt: skip
    alone = named(sums | {"count/chosen": 0.0, "rewards/chosen": 0.0, "logps/chosen": 0.0})
    assert alone == {"rewards/rejected": -1.0, "logps/rejected": -3.0, "kl": 0.5}
    assert named({"weight": 2.0, "rewards/accuracies": 1.0}) == {"rewards/accuracies": 0.5}


# What a run leaves.


def test_a_run_has_metrics_samples_the_best_and_a_report(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "sample.max_tokens=3", "--set", "train.sample_every=2", "--set", "tune.packing=true"]
    words += ["--set", "tune.keep_best=rewards/margins"]
    assert go("left", *words, loss="simpo") == 0
    out = capsys.readouterr().out
    assert "tune.packing: the rows of pairs are padded" in out and "best validation rewards/margins" in out
    for split in ("train", "val", "test"):
        assert all(set(line) >= PAIRED for line in lines("left", split)), split
    scored = lines("left", "val")
    best = checkpoint.verify(resolve.path_of(Path("left"), STEPS)).best
    assert best and best["rewards/margins"] == max(line["rewards/margins"] for line in scored)
    assert scored[0]["targets"] == 4
    assert read_toml(Path("left/recipe.toml"))["tune"]["packing"] is False
    found = samples.read_samples(Path("left"))
    assert [sample.step for sample in found] == [2, 4]
    row = rows(24)[16]
    assert {name: found[0].parts[name] for name in ("prompt", "chosen", "rejected")} == {
        name: row[name] for name in ("prompt", "chosen", "rejected")
    }
    assert "answer" in found[0].parts and f"rejected: {row['rejected']}" in found[0].text
    assert cli.main(["report", "left", "-o", "left.html"]) == 0
    page = Path("left.html").read_text()
    for title in ("Rewards", "Accuracy", "Log-probabilities"):
        assert f"<figcaption>{title}" in page
    assert "<th>chosen</th><th>rejected</th><th>answer</th>" in page and "nats a token" not in page
    assert cli.main(["diagnose", "left"]) == 0 and cli.main(["runs", "check", "left"]) == 0
    shown = capsys.readouterr().out
    assert "ln V" not in shown and "nothing damaged" in shown


def test_data_inspect_and_plan_know_pairs(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "inspect", "pairs", "--model", "base", "--set", "tune.task=prefer", "--rows", "1"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "row 1 chosen: " in shown and "row 1 rejected: " in shown and "[[red it is<|endoftext|>]]" in shown
    needs = {}
    for task in ("lm", "prefer"):
        plan = ["plan", "--model", "base", "--data", "pairs", "--set", f"tune.task={task}", "--json", "--chip", "m1"]
        assert cli.main([*plan, "--set", "train.batch_size=8"]) == 0
        needs[task] = json.loads(capsys.readouterr().out)
    assert needs["prefer"]["unit"] == "pairs" and needs["prefer"]["tokens"] == 2 * needs["lm"]["tokens"]
    grown = needs["prefer"]["memory"]["components"]["activations"] / needs["lm"]["memory"]["components"]["activations"]
    assert 1.8 < grown < 2.2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "train.label_smoothing=0.1"], "prefer.loss = cdpo has prefer.smoothing"),
        (["--set", "train.z_loss=0.1"], "expected 0 where tune.task = prefer"),
        (["--train-on-prompt"], "tune.train_on_prompt = True: expected False where tune.task = prefer"),
        (["--set", "tune.neftune=5"], "tune.neftune = 5.0: expected 0.0"),
        (["--set", "tune.keep_best=accuracy"], "expected one of loss, rewards/accuracies, rewards/margins"),
        (["--set", "prefer.loss=kto", "--set", "tune.keep_best=rewards/accuracies"], "kto compares no pairs"),
        (["--set", "prefer.gamma=1.0"], "prefer.gamma = 1.0: expected 0.5 where prefer.loss = dpo"),
        (["--task", "lm", "--set", "prefer.beta=0.2"], "[prefer]: of mlxgpt finetune --task prefer"),
        (["--set", "tune.block_size=4", "--set", "tune.overflow=start"], "their prompts fill them"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    flags = words if "lm" in words else ["--task", "prefer", *words]
    run = tmp_path / "run"
    assert (
        cli.main(["finetune", "-m", "base", "-d", "pairs", "-o", str(run), "--device", "cpu", "-n", "2", *flags]) == 2
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line and not run.exists()


@pytest.mark.parametrize(("data", "loss"), [("pairs", ""), ("judged", " --set prefer.loss=kto")])
def test_answers_alone_name_the_cure(at: Path, capsys: pytest.CaptureFixture[str], data: str, loss: str) -> None:
    assert cli.main(["finetune", "-m", "base", "-d", data, "--device", "cpu"]) == 2
    assert f"--task prefer{loss} trains on both" in capsys.readouterr().err


def test_a_batch_before_the_reference_is_an_error() -> None:
    """Never the model as it is, silently."""
    source, prefer = PairSource.__new__(PairSource), build({"tune": {"task": "prefer"}}).prefer
    assert prefer
    source.reference, source.prefer, source.encoder = None, prefer, Encoder(TuneConfig(), None, None, 8)  # type: ignore
    tokens = np.zeros((2, 4), np.int32)
    with pytest.raises(AssertionError, match="before the reference"):
        source._beside("train", [0], [0, 1], Batch(tokens, tokens, np.ones((2, 4), np.float32)))
