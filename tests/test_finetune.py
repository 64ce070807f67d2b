"""finetune from the command line: both frameworks, stop and resume, what a run leaves, and what it refuses."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt import cli
from mlxgpt.common.folders import adapter_folder, model_folder, resolve
from mlxgpt.common.model import params, quantize_base
from mlxgpt.common.recipes import build, read_toml
from mlxgpt.common.runs import checkpoint, metrics
from mlxgpt.common.tokenizers import load as tokenizer

BACKENDS = ("mlx", "torch")
STEPS, STOP = 12, 5
SMALL = [
    "train.batch_size=2", "train.eval_every=4", "train.save_every=0", "optim.lr=5e-3", "optim.warmup=2",
    "sample.max_tokens=4",
]  # fmt: skip
ASKED = ("red", "blue", "green", "two", "three", "cat", "dog")


def rows(count: int = 40) -> list[dict[str, str]]:
    """Questions of unequal length and their answers."""
    made = []
    for n in range(count):
        words = " ".join(ASKED[(n * k) % 7] for k in range(1, 2 + n % 4))
        made.append({"prompt": f"say {words} and {n}\n", "completion": f"{words} it is"})
    return made


def write(path: Path, values: list[Any]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model of two layers, and rows."""
    place = tmp_path_factory.mktemp("finetune")
    texts = [row["prompt"] + row["completion"] for row in rows()]
    spelled = tokenizer.train_tokenizer("bpe", texts, 300)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_hidden": 64, "block_size": 48, "vocab_size": spelled.n_vocab}
    for family in ("llama", "gpt2"):
        model = build({"model": {"family": family, **sizes}}).model
        model_folder.write_model(place / family, model, params.init_params(model, 3), tokenizer=spelled)
    write(place / "rows.jsonl", rows())
    return place


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(place)
    return place


def go(out: str, *words: str, model: str = "llama", data: str = "rows.jsonl", steps: int = STEPS) -> int:
    """``mlxgpt finetune`` on the CPU."""
    sets = [word for item in SMALL for word in ("--set", item)]
    base = ["finetune", "--model", model, "--data", data, "--out", out, "--device", "cpu", "--steps", str(steps)]
    return cli.main([*base, *sets, *words])


def losses(run: str) -> np.ndarray:
    """Every loss in the order of the file."""
    return np.array([line["loss"] for line in metrics.read_lines(Path(run) / metrics.FILE)])


def last(run: str) -> Path:
    """The newest checkpoint."""
    return resolve.path_of(Path(run), resolve.steps_of(Path(run))[-1])


def content(place: Path) -> dict[str, bytes]:
    """The weights of a checkpoint, and the optimizer's state."""
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*.safetensors"))}


@pytest.mark.parametrize(
    ("method", "model", "more"),
    [
        ("lora", "llama", ("--set", "adapter.dropout=0.1", "--set", "tune.neftune=2.0")),
        ("dora", "gpt2", ("--set", "tune.packing=false", "--set", "train.micro_batch_size=1")),
        ("full", "llama", ("--set", "train.dropout=0.1")),
    ],
)
def test_one_curve_in_both_frameworks_stopped_and_resumed(
    at: Path, method: str, model: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(at / model)
    names = {}
    for backend in BACKENDS:
        options = ("--backend", backend, "--method", method, *more)
        names[backend] = f"{method}-{backend}"
        assert go(names[backend], *options, model=model) == 0
        assert go(f"{method}-{backend}-stopped", *options, "--stop-after", str(STOP), model=model) == 0
    whole = {backend: losses(names[backend]) for backend in BACKENDS}
    gaps = np.abs(whole["mlx"] - whole["torch"])
    print(f"{method}: step 1 {gaps[0]:.1e}, largest {gaps.max():.1e}")
    assert gaps[0] <= 1e-6 and gaps.max() <= 1e-4
    assert whole["mlx"][0] - whole["mlx"][-2] > 0.05
    for origin in BACKENDS:
        for backend in BACKENDS:
            run = f"{method}-{origin}-to-{backend}"
            shutil.copytree(f"{method}-{origin}-stopped", run, symlinks=True)
            assert cli.main(["finetune", "--resume", run, "--backend", backend, "--device", "cpu"]) == 0
            gap = np.abs(losses(run) - whole[origin]).max()
            if origin == backend:
                assert gap == 0 and content(last(run)) == content(last(names[origin]))
            else:
                print(f"{method}: {origin} to {backend}: {gap:.1e}")
                assert 0 < gap <= 2e-5
    assert content(at / model) == before
    saved = sorted(path.name for path in last(names["mlx"]).iterdir() if path.is_file())
    if method == "full":
        assert "model.safetensors" in saved and "tokenizer.json" in saved
    else:
        weights = ["adapter_model.safetensors", "adapters.safetensors"]
        assert saved == ["adapter_config.json", *weights, "generation_config.json"]
    assert "not bit-equal" in capsys.readouterr().out


def test_moments_that_are_off_are_over_the_gate(at: Path) -> None:
    """A mutation: second moments a tenth too large, in a checkpoint whose sums hold."""
    assert go("kept") == 0
    assert go("mutated", "--stop-after", str(STOP)) == 0
    at_stop = last("mutated")
    state = checkpoint.verify(at_stop)
    arrays = dict(checkpoint.tensors.read_tensors(at_stop / checkpoint.OPTIMIZER))
    arrays = {n: a * np.float32(1.1) if n.startswith("v.") else a for n, a in arrays.items()}
    (at_stop / checkpoint.OPTIMIZER).unlink()
    checkpoint.tensors.write_tensors(at_stop / checkpoint.OPTIMIZER, arrays, {})
    (at_stop / checkpoint.STATE).unlink()
    checkpoint.write_state(at_stop, state)
    assert cli.main(["finetune", "--resume", "mutated", "--device", "cpu"]) == 0
    assert np.abs(losses("mutated") - losses("kept")).max() > 2e-5


def test_another_base_or_other_rows_are_not_resumed(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("moved", "--stop-after", str(STOP)) == 0
    write(at / "other.jsonl", rows(39))
    shutil.copytree("llama", "elsewhere", dirs_exist_ok=True)
    config = model_folder.read_config("llama")
    shutil.rmtree("other-base", ignore_errors=True)
    spelled = tokenizer.load_tokenizer("llama")
    model_folder.write_model("other-base", config, params.init_params(config, 4), tokenizer=spelled)
    for words, message in (
        (["--model", "other-base"], "the run began on a model with"),
        (["--data", "other.jsonl"], "the data changed"),
        (["--set", "adapter.rank=4"], "adapter.rank was 8 and is 4"),
        (["--set", "tune.block_size=32"], "tune.block_size was 0 and is 32"),
        (["--method", "dora"], "--method dora: not with --resume: a resumed run keeps its"),
    ):
        assert cli.main(["finetune", "--resume", "moved", "--device", "cpu", *words]) == 2, words
        assert message in capsys.readouterr().err
    assert cli.main(["train", "--resume", "moved"]) == 2
    assert "a run of mlxgpt finetune" in capsys.readouterr().err
    assert cli.main(["finetune", "--resume", "moved", "--device", "cpu", "--model", "elsewhere"]) == 0
    assert cli.main(["finetune", "--resume", "moved", "--device", "cpu"]) == 0
    assert "nothing to do: all 12 steps are done" in capsys.readouterr().out


def test_answers_are_scored_the_best_kept_and_the_test_split_scored_at_the_end(
    at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = at / "split"
    data.mkdir()
    write(data / "train.jsonl", rows(30))
    write(data / "valid.jsonl", rows(34)[30:])
    write(data / "test.jsonl", rows(37)[34:])
    names = ["exact", "bleu", "chrf", "rouge_l"]
    words = ["--set", f"tune.metrics={json.dumps(names)}", "--set", "tune.keep_best=chrf"]
    assert go("scored", *words, "--set", "train.early_stop=2", data="split", steps=40) == 0
    lines = list(metrics.read_lines(at / "scored" / metrics.FILE))
    scored = [line for line in lines if line["split"] == "val"]
    assert all(0 <= line["exact"] <= 1 and 0 <= line["chrf"] <= 100 for line in scored)
    values = [line["chrf"] for line in scored]
    state = checkpoint.verify(last("scored"))
    assert state.best and state.best["step"] == scored[int(np.argmax(values))]["step"]
    assert state.best["chrf"] == max(values)
    (tested,) = [line for line in lines if line["split"] == "test"]
    assert set(names) < set(tested) and tested["targets"] > 10
    out = capsys.readouterr().out
    assert "best validation chrf" in out and "test split at step" in out and "sample at step" in out
    assert re.search(r"sample at step \d+:\n(.*\n)+reference: \S", out)
    best = int(state.best["step"])
    assert resolve.resolve_model("scored") == resolve.path_of(Path("scored"), best)
    for backend in BACKENDS:
        assert cli.main(["eval", "--model", "scored", "--data", "split", "--json", "--backend", backend]) == 0
        found = json.loads(capsys.readouterr().out)
        (line,) = [line for line in scored if line["step"] == best]
        assert found["loss"] == pytest.approx(line["loss"], abs=1e-5) and found["tokens"] == line["targets"]
    assert cli.main(["eval", "--model", "llama", "--data", "chat-less.jsonl", "--json"]) == 2


def test_chatml_gives_a_base_without_a_template_two_tokens(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in rows(16)
    ]
    write(at / "chat.jsonl", talks)
    old = model_folder.read_config("llama").vocab_size
    outs = []
    for backend in BACKENDS:
        assert go(f"chatml-{backend}", "--backend", backend, "--stop-after", "6", data="chat.jsonl") == 0
        assert cli.main(["finetune", "--resume", f"chatml-{backend}", "--device", "cpu", "--backend", backend]) == 0
        outs.append(capsys.readouterr().out)
    assert f"embedding: {old} rows become {old + 2}" in outs[0] and "train whole, for the new tokens" in outs[0]
    assert "mlx-lm" in outs[0] and "mlxgpt fuse" in outs[0]
    assert np.abs(losses("chatml-mlx") - losses("chatml-torch")).max() <= 1e-4
    place = last("chatml-mlx")
    found = adapter_folder.read_adapter(place, "llama", model_folder.read_config("llama"))
    assert found.params["wte.weight"].shape[0] == old + 2
    spelled = tokenizer.load_tokenizer(place)
    assert spelled.eos_id is not None and spelled.decode([spelled.eos_id]) == "<|im_end|>"
    answers = []
    for backend in BACKENDS:
        words = ["--prompt", "say red", "--max-tokens", "8", "--temperature", "0", "--json", "--backend", backend]
        assert cli.main(["generate", "--model", "chatml-mlx", "--device", "cpu", *words]) == 0
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert answers[0] == answers[1]


def test_a_quantized_base_trains_as_its_dequantized_self(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "adapter.bits=4", "--set", "adapter.group_size=32"]
    assert go("bits", *words, steps=6) == 0
    assert "dequantized once" in capsys.readouterr().out
    assert cli.main(["convert", "llama", "llama-4bit", "--to", "mlx-lm", "--bits", "4", "--group-size", "32"]) == 0
    assert go("folder", model="llama-4bit", steps=6) == 0
    assert go("never", "--set", "adapter.dequantize=never", model="llama-4bit", steps=6) == 0
    assert go("plain", steps=6) == 0
    assert np.abs(losses("bits") - losses("folder")).max() <= 1e-6
    assert np.abs(losses("never") - losses("folder")).max() <= 1e-4
    assert np.abs(losses("plain") - losses("folder")).max() > 1e-4
    assert go("whole", "--method", "full", model="llama-4bit", steps=6) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_base_with_another_rounding_for_want_of_memory_is_said(
    backend: str, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = f"room-{backend}", ["--set", "adapter.bits=4", "--set", "adapter.group_size=32"]
    assert go(run, *words, "--stop-after", "1", "--backend", backend, steps=3) == 0
    assert cli.main(["finetune", "--resume", run, "--stop-after", "2", "--backend", backend]) == 0
    assert "another environment" not in capsys.readouterr().out
    monkeypatch.setattr(quantize_base, "_SHARE", 0.0)
    assert cli.main(["finetune", "--resume", run, "--backend", backend]) == 0
    assert "at step 2 (base dequantized -> quantized): not bit-equal" in capsys.readouterr().out


def test_an_adapter_is_trained_on(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("first") == 0
    assert go("second", model="first") == 0
    assert go("third", "--adapter", "first") == 0
    assert np.array_equal(losses("second"), losses("third"))
    assert losses("second")[0] < losses("first")[0] - 0.05
    capsys.readouterr()
    assert go("fourth", "--adapter", "first", "--set", "adapter.rank=4") == 2
    assert "adapter.rank = 4: " in capsys.readouterr().err
    assert go("fourth", "--adapter", "first", model="second") == 2
    assert "expected the model that they change" in capsys.readouterr().err


def test_labels_are_learned(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = [{"text": row["prompt"].strip(), "label": ("even", "odd")[n % 2]} for n, row in enumerate(rows())]
    write(at / "labels.jsonl", labelled)
    words = ["--task", "classify", "--set", "tune.keep_best=macro_f1"]
    for backend in BACKENDS:
        assert go(f"labels-{backend}", *words, "--backend", backend, data="labels.jsonl") == 0
    assert np.abs(losses("labels-mlx") - losses("labels-torch")).max() <= 1e-4
    (*_, line) = (line for line in metrics.read_lines(at / "labels-mlx" / metrics.FILE) if line["split"] == "val")
    assert 0 <= line["accuracy"] <= 1 and 0 <= line["macro_f1"] <= 1
    out = capsys.readouterr().out
    assert "best validation macro_f1" in out and "try: mlxgpt classify --model labels-mlx --text TEXT" in out
    assert f"validation split at step {line['step']}:\nlabel " in out


def test_few_rows_work_and_one_says_so(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(at / "three.jsonl", rows(3))
    assert go("three", data="three.jsonl", steps=3) == 0
    write(at / "one.jsonl", rows(1))
    capsys.readouterr()
    assert cli.main(["finetune", "--model", "llama", "--data", "one.jsonl", "--out", "one", "--device", "cpu"]) == 0
    assert "only one example" in capsys.readouterr().out


GOOD = {"prompt": "say red\n", "completion": "red it is"}
TURN = {"role": "user", "content": "say"}
BAD = {
    "lacks": (json.dumps({"prompt": "say"}), "row 17: no key 'completion'"),
    "json": ('{"prompt": "say', "row 17: not JSON"),
    "empty": ("", "row 17: an empty line"),
    "blank": (json.dumps({"prompt": "say", "completion": " "}), "row 17: completion is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_is_not_as_the_others_is_named(at: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, message = BAD[case]
    (at / "bad.jsonl").write_text("".join(f"{text}\n" for text in [*[json.dumps(GOOD)] * 16, line, json.dumps(GOOD)]))
    refused(at, capsys, ["--data", "bad.jsonl"], f"bad.jsonl {message}")


def refused(at: Path, capsys: pytest.CaptureFixture[str], words: list[str], *parts: str) -> None:
    """Exit code 2, one line with all the parts, and no run."""
    capsys.readouterr()
    given = {words[n]: words[n + 1] for n in range(0, len(words) - 1) if words[n] in ("--model", "--data")}
    rest = [word for word in words if word not in given and word not in given.values()]
    model, data = given.get("--model", "llama"), given.get("--data", "rows.jsonl")
    assert go("refused", *rest, model=model, data=data) == 2, words
    out, error = capsys.readouterr()
    assert "adapter.targets" not in error or "rows:" not in out  # what needs no rows is refused before they are read
    assert error.count("\n") == 1 and "Traceback" not in error
    for part in parts:
        assert part in error, error
    assert not (at / "refused").exists()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([TURN, {"role": "wizard", "content": "x"}], "row 2: message 2: unknown role 'wizard'"),
        ([TURN], "row 2: no assistant turn"),
        ([], "row 2: messages is empty"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_named(
    at: Path, messages: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"messages": [TURN, {"role": "assistant", "content": "red"}]}
    write(at / "talk.jsonl", [good, {"messages": messages}])
    refused(at, capsys, ["--data", "talk.jsonl"], f"talk.jsonl {message}")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "adapter.targets=['q_porj']"], ("'q_porj' matches nothing", "q_proj", "down_proj")),
        (["--set", "adapter.rank=0"], ("adapter.rank = 0",)),
        (["--set", "adapter.rank=99"], ("adapter.rank = 99: expected at most",)),
        (
            ["--method", "full", "--set", "adapter.rank=4"],
            ("adapter.rank = 4: expected 8 where adapter.method = full",),
        ),
        (["--set", "adapter.group_size=32"], ("adapter.group_size = 32",)),
        (["--set", "data.source=x"], ("[data]: of mlxgpt train",)),
        (["--set", "model.n_layer=3"], ("[model]: of mlxgpt train",)),
        (["--set", "tune.packng=false"], ("unknown key tune.packng", "packing")),
        (["--epochs", "2"], ("--steps and --epochs",)),
        (["--set", "tune.keep_best=bleu"], ("tune.keep_best = 'bleu'", "a metric that tune.metrics names")),
        (["--data", "nowhere.jsonl"], ("nowhere.jsonl: no such file",)),
        (["--model", "nowhere"], ("nowhere: no such folder",)),
        (["--adapter", "llama"], ("llama",)),
        (["--set", "tune.block_size=64"], ("tune.block_size = 64: the model's context holds 48",)),
        (["--set", "tune.block_size=4", "--set", "tune.overflow=refuse"], ("row 1: ", "expected at most 4")),
        (["--set", "optim.warmup=50"], ("optim.warmup = 50",)),
        (["--set", "train.wandb=x", "--set", "adapter.init=nonsense"], ("adapter.init = 'nonsense'",)),
        (["--set", "tune.metrics=['exact']", "--set", "train.eval_every=0"], ("tune.metrics", "train.eval_every")),
        (["--set", "tune.class_weights=balanced"], ("tune.class_weights = 'balanced'",)),
        (["--set", f"sample.prompt={'red ' * 60}"], ("sample.prompt", "expected at most model.block_size = 48")),
        (["--set", "tune.epochs=inf"], ("tune.epochs = inf",)),
        (["--set", "train.memory_limit=-1"], ("train.memory_limit = -1",)),
        (["--set", "tune.template=none.jinja"], ("none.jinja",)),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(
    at: Path, words: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(at, capsys, words, *parts)


def test_a_template_that_fails_names_the_row(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (at / "bad.jinja").write_text("{{ raise_exception('not this') }}")
    write(at / "talk.jsonl", [{"messages": [TURN, {"role": "assistant", "content": "red"}]}])
    refused(at, capsys, ["--data", "talk.jsonl", "--set", "tune.template=bad.jinja"], "not this")
    shutil.copytree(at / "llama", at / "broken")
    shutil.copy(at / "bad.jinja", at / "broken" / "chat_template.jinja")
    refused(at, capsys, ["--model", "broken", "--data", "talk.jsonl"], "broken: chat template: not this")


def test_an_adapter_of_another_model_is_refused_unless_forced(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = model_folder.read_config("llama")
    spelled = tokenizer.load_tokenizer("llama")
    model_folder.write_model("stranger", config, params.init_params(config, 9), tokenizer=spelled)
    wide = dataclasses.replace(config, n_embd=64)
    model_folder.write_model("wide", wide, params.init_params(wide, 9), tokenizer=spelled)
    assert go("own", steps=3) == 0
    refused(at, capsys, ["--model", "stranger", "--adapter", "own"], "was trained on a model with sha256")
    refused(at, capsys, ["--model", "wide", "--adapter", "own"], "shape")
    assert go("forced", "--adapter", "own", "--force", model="stranger", steps=3) == 0


def test_the_recipe_of_a_run_says_everything(at: Path) -> None:
    assert go("said", steps=3) == 0
    stored = read_toml(at / "said" / "recipe.toml")
    assert "data" not in stored and stored["tune"]["model"] == str(at / "llama")
    assert stored["tune"]["source"] == str(at / "rows.jsonl") and stored["train"]["steps"] == 3
    assert build(stored).model == model_folder.read_config(at / "llama")
