"""Reward models: transformers' in both frameworks, trained on pairs, resumed across, and what the verb score says."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import align_cases
import numpy as np
import pytest
import torch
from align_cases import CASES
from compare import agree
from models import weights
from test_classify import classifier, logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlxgpt import cli
from mlxgpt import generate as mlx_generate
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model_config import SCORE
from mlxgpt.common.runs import metrics

BACKENDS = ("mlx", "torch")
PACKAGES = {"mlx": "mlxgpt", "torch": "torch_ref"}


def run(*words: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_folder_is_transformers_reward_model(family: str, tmp_path: Path) -> None:
    config = classifier(family, labels=SCORE)
    model_folder.write_model(tmp_path, config, weights(config))
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and theirs.config.num_labels == 1
    tokens = np.random.default_rng(0).integers(0, 80, (1, 17))
    expected = theirs.eval()(torch.tensor(tokens)).logits.detach().numpy()
    for backend in PACKAGES.values():
        agree(f"{backend} {family}", logits(backend, tmp_path, tokens), expected, 1e-5)
    assert model_folder.read_config(tmp_path) == config
    theirs.config.problem_type = "regression"  # what transformers itself sets of one label
    theirs.save_pretrained(tmp_path / "again")
    assert model_folder.read_config(tmp_path / "again").labels == SCORE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a language model, rows.jsonl, and MODEL, runs of four steps: full by mlx, lora begun by mlx."""
    place = tmp_path_factory.mktemp("reward")
    made = align_cases.recipe(CASES["dpo"])
    model_folder.write_model(place / "base", made.model, align_cases.weights(made), tokenizer=align_cases.tokenizer())
    (place / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in align_cases.pairs()[:24]))
    for name, more in (("full", ()), ("lora", ("--stop-after", 2))):
        words = ("--steps", 4, "--lr", "1e-3", "--set", "train.eval_every=2", "--set", "optim.warmup=0", *more)
        words = ("--method", name, "--out", place / name, "--backend", "mlx", "--device", "cpu", *words)
        code, _, error = run("finetune", "-m", place / "base", "-d", place / "rows.jsonl", "--task", "reward", *words)
        assert code == 0, error
    return place


def lines_of(run: Path) -> list[dict[str, Any]]:
    return list(metrics.read_lines(run / "metrics.jsonl"))


def scored(model: Path, backend: str, *words: Any) -> Any:
    code, out, error = run("score", "-m", model, *words, "--json", "--backend", backend, "--device", "cpu")
    assert code == 0, error
    return json.loads(out)


def test_a_run_has_figures_and_a_score_that_transformers_gives(place: Path) -> None:
    lines = lines_of(place / "full")
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    assert {line["split"] for line in lines} == {"train", "val"} and all(names <= line.keys() for line in lines)
    model = next((place / "full" / "checkpoints").glob("step-0000004"))
    read = AutoTokenizer.from_pretrained(model)
    theirs = AutoModelForSequenceClassification.from_pretrained(model).eval()

    def asked(text: str) -> float:
        return theirs(**read(text, return_tensors="pt")).logits.item()

    pairs = align_cases.pairs()[:24]
    found = {backend: scored(model, backend, "-t", "a slow river", "-t", "again", "-d", place / "rows.jsonl")
             for backend in BACKENDS}  # fmt: skip
    for made in found.values():
        assert [row["score"] for row in made["rows"][:2]] == pytest.approx(
            [asked("a slow river"), asked("again")], abs=1e-5
        )
        for row, pair in zip(made["rows"][2:8], pairs, strict=False):
            for kind in ("chosen", "rejected"):
                expected = asked(f"{pair['prompt']}{pair[kind]}{read.eos_token}")
                assert row[kind] == pytest.approx(expected, abs=1e-5)
        right = sum(row["margin"] > 0 for row in made["rows"][2:])
        assert made["pairs"] == 24 and made["accuracy"] == right / 24
    padded = read(["a slow river", "again"], return_tensors="pt", padding=True)
    together = theirs(**padded).logits[:, 0].tolist()
    assert [row["score"] for row in found["mlx"]["rows"][:2]] == pytest.approx(together, abs=1e-5)


def test_the_wrong_end_of_a_row_is_seen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scored(place / "full", "mlx", "-d", place / "rows.jsonl")["rows"]
    classify = mlx_generate.classify

    def at_the_padding(model: Any, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return classify(model, tokens, np.full(len(lengths), tokens.shape[1]))

    monkeypatch.setattr(mlx_generate, "classify", at_the_padding)
    after = scored(place / "full", "mlx", "-d", place / "rows.jsonl")["rows"]
    assert max(abs(a["chosen"] - b["chosen"]) for a, b in zip(before, after, strict=True)) > 1e-3


def test_a_run_goes_on_in_the_other_framework(place: Path, tmp_path: Path) -> None:
    code, _, error = run("finetune", "--resume", place / "lora", "--backend", "torch", "--device", "cpu")
    assert code == 0, error
    words = ("--steps", 4, "--lr", "1e-3", "--set", "optim.warmup=0", "--set", "train.eval_every=2")
    code, _, error = run("finetune", "-m", place / "base", "-d", place / "rows.jsonl", "--task", "reward", "--out",
                         tmp_path / "whole", "--backend", "torch", "--device", "cpu", *words)  # fmt: skip
    assert code == 0, error
    both = [[line["loss"] for line in lines_of(path)] for path in (place / "lora", tmp_path / "whole")]
    assert len(both[0]) == len(both[1]) and np.abs(np.array(both[0]) - np.array(both[1])).max() <= 2e-5
    code, _, error = run("fuse", "-m", place / "lora", "-o", tmp_path / "fused")
    assert code == 0, error
    rows = [scored(model, backend, "-t", "the river") for model, backend in
            ((place / "lora", "mlx"), (tmp_path / "fused", "torch"))]  # fmt: skip
    assert rows[0]["rows"][0]["score"] == pytest.approx(rows[1]["rows"][0]["score"], abs=1e-5)


def test_margins_and_center_are_read(tmp_path: Path) -> None:
    found = align_cases.source(CASES["centered"], tmp_path)
    batch = found.batch(1)
    margins = [each["margin"] for each in align_cases.pairs()[: align_cases.BATCH]]
    assert batch.beside["margin"].tolist() == pytest.approx(np.repeat(margins, 2).tolist())
    assert (batch.weights.sum(axis=1) == 1).all()
    last = [int(row.argmax()) for row in batch.weights]
    ends = [batch.tokens[b, at] for b, at in enumerate(last)]
    assert set(ends) == {align_cases.tokenizer().eos_id}


def test_conversations_are_scored_whole(place: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    code, _, error = run("score", "-m", place / "full", "-d", tmp_path / "talks.jsonl", "--device", "cpu")
    assert code == 2 and "the model's tokenizer has no chat template" in error
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{{ '<|endoftext|>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    )
    more = ("-d", tmp_path / "talks.jsonl", "--set", f"tune.template={template}")
    (made,) = scored(place / "full", "torch", *more)["rows"]
    (text,) = scored(place / "full", "torch", "-t", "user: a\nassistant: b<|endoftext|>")["rows"]
    assert made["score"] == pytest.approx(text["score"], abs=1e-6) and made["messages"] == talk


def test_a_long_pair_is_dropped_or_cut_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in align_cases.pairs()))
    case = CASES["reward"]
    found = align_cases.source(case, tmp_path)
    assert max(map(len, found.examples["train"])) <= found.encoder.context
    rows = align_cases.rows(case)
    cut = align_cases.source(dataclasses.replace(case, cut=True), tmp_path)
    assert max(map(len, cut.examples["train"])) == align_cases.CUT
    for example, (prompt, answer) in zip(cut.examples["train"], rows, strict=True):
        assert example.tokens.tolist() == (prompt + answer)[: align_cases.CUT]
        assert example.weights.tolist() == [0.0] * (len(example) - 1) + [1.0]


def test_what_does_not_fit_is_refused(place: Path, tmp_path: Path) -> None:
    reward, rows = place / "full", place / "rows.jsonl"
    (tmp_path / "same.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    (tmp_path / "odd.jsonl").write_text(json.dumps({"question": "a"}) + "\n")
    tune = ("finetune", "-d", rows, "--out", tmp_path / "none", "--task")
    for words, said in (
        (("score", "-m", reward), "nothing to score: expected --text TEXT, or --data FILE"),
        (
            ("score", "-m", place / "base", "-t", "a"),
            "a language model: expected a reward model (mlxgpt finetune --task",
        ),
        (("score", "-m", reward, "-t", ""), "--text 1: empty: expected text"),
        (("score", "-m", reward, "-d", tmp_path / "no.jsonl"), "no such file"),
        (("score", "-m", reward, "-d", tmp_path / "same.jsonl"), "chosen equals rejected"),
        (("score", "-m", reward, "-d", tmp_path / "odd.jsonl"), "row 1: keys 'question': expected"),
        (("score", "-m", reward, "-t", "a", "-s", "optim.lr=1"), "--set optim: expected a key of tune"),
        (("classify", "-m", reward, "-t", "a"), "a reward model, which mlxgpt score runs"),
        (("generate", "-m", reward, "--prompt", "a"), "a reward model, which mlxgpt score runs"),
        (("convert", reward, tmp_path / "x.gguf", "--to", "gguf"), "a reward model: only --to hf has a place for it"),
        ((*tune, "prefer", "-m", reward), "a reward model: expected a language model for --task prefer"),
        ((*tune, "reward", "-m", place / "base", "-s", "prefer.loss=ipo"), "expected 'dpo' where tune.task = reward"),
        ((*tune, "prefer", "-m", place / "base", "-s", "prefer.center=1"), "expected 0.0 where tune.task = prefer"),
    ):
        code, _, error = run(*words)
        assert code == 2 and said in error and error.count("\n") == 1, (words, error)
    assert not (tmp_path / "none").exists()


def test_verify_compares_the_files_of_a_reward_model(place: Path, tmp_path: Path) -> None:
    code, _, error = run("convert", place / "full", tmp_path / "same")
    assert code == 0, error
    code, out, _ = run("verify", place / "full", tmp_path / "same")
    assert code == 0 and "a reward model predicts no tokens: files alone are compared" in out
    code, _, _ = run("verify", place / "full", tmp_path / "same", "--rungs", "logits")
    assert code == 1
