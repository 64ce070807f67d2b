"""Classifiers: equal in both frameworks and in transformers and PEFT, trained, counted, and what the verb prints."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
import torch
from compare import agree, worst
from models import CASES, tiny, weights
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from mlxgpt import cli
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import AdapterConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.model import adapters, params
from mlxgpt.common.scores import confusion
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

BACKENDS = ["mlxgpt", "torch_ref"]
FAMILIES = [
    "gpt2",
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "phi",
    "olmo2",
    "olmo",
    "starcoder2",
]
LABELS = ("bad", "good", "so so")


def classifier(family: str, labels: tuple[str, ...] = LABELS, **sizes: Any) -> ModelConfig:
    return dataclasses.replace(CASES[family], labels=labels, **sizes)


def logits(backend: str, path: Path, tokens: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """(B, n) by each row's last token."""
    model, _ = importlib.import_module(f"{backend}.load").load(path, adapter, device="cpu")
    lengths = np.full(len(tokens), tokens.shape[1])
    return importlib.import_module(f"{backend}.generate").classify(model, tokens, lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_transformers_sequence_classifier(family: str, tmp_path: Path) -> None:
    config = classifier(family)
    model_folder.write_model(tmp_path, config, weights(config))
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and theirs.config.id2label == dict(enumerate(LABELS))
    tokens = np.random.default_rng(0).integers(0, 80, (1, 17))
    expected = theirs.eval()(torch.tensor(tokens)).logits.detach().numpy()
    for backend in BACKENDS:
        agree(f"{backend} {family}", logits(backend, tmp_path, tokens), expected, 1e-5)
    assert model_folder.read_config(tmp_path) == config
    theirs.save_pretrained(tmp_path / "again")
    again = model_folder.read_config(tmp_path / "again")
    assert again.labels == LABELS and set(model_folder.read_params(tmp_path / "again", again)) == set(
        params.table(config)
    )


def test_a_batch_of_texts_is_each_text_alone(tmp_path: Path) -> None:
    config = classifier("llama")
    model_folder.write_model(tmp_path, config, weights(config))
    draw = np.random.default_rng(1)
    lengths = np.array([5, 12, 9])
    tokens = draw.integers(0, 80, (3, 12))
    for backend in BACKENDS:
        model, _ = importlib.import_module(f"{backend}.load").load(tmp_path, device="cpu")
        classify = importlib.import_module(f"{backend}.generate").classify
        found = classify(model, tokens, lengths)
        for b, n in enumerate(lengths):
            alone = classify(model, tokens[b : b + 1, :n], np.array([n]))
            agree(f"{backend} text {b}", found[b : b + 1], alone, 1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"problem_type": "regression"}, "problem_type = 'regression' is not supported"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label = .*: expected a name by each number from 0"),
        ({"id2label": {"0": "a", "1": "a"}}, "model.labels = .*: expected different names"),
    ],
)
def test_what_a_config_says_of_labels_is_checked(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = classifier("llama")
    model_folder.write_model(tmp_path, config, weights(config))
    held = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(held | values))
    with pytest.raises(UserError, match=message):
        model_folder.read_config(tmp_path)


# rows and training

GOOD, BAD = "What a helpful park , it goes every day .", "The pressure measures atmospheric , assistant ?"


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts that are mostly of good words, or mostly of bad ones."""
    draw, made = np.random.default_rng(seed), []
    for n in range(count):
        label = int(draw.random() < 0.3)
        words = [str(draw.choice((GOOD if (draw.random() < 0.85) == bool(label) else BAD).split())) for _ in range(8)]
        made.append({"text": f"{n} " + " ".join(words[: 3 + n % 6]), "label": ["bad", "good"][label]})
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer("bpe", [templates.TEXT + "0123456789"], 300)


def opened(place: Path, tokenizer: Tokenizer, given: list[Any] | None = None, **tune: Any) -> SftSource:
    place.mkdir(exist_ok=True)
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows(300) if given is None else given)))
    config = tiny(family="llama", block_size=64, vocab_size=tokenizer.n_vocab)
    settings = TuneConfig(source=str(path), task="classify", **tune)
    return sft_source.open_source(settings, TrainConfig(batch_size=8), tokenizer, config, lambda line: None)


def recipe(source: SftSource, method: str = "full", family: str = "llama", **train: Any) -> Recipe:
    model = tiny(family=family, block_size=64, vocab_size=source.tokenizer.n_vocab, labels=list(source.labels))
    adapter = AdapterConfig(method=method)
    return Recipe(
        model=model,
        optim=OptimConfig(lr=1e-3 if method == "full" else 4e-3, warmup=1, weight_decay=0.0),
        train=TrainConfig(batch_size=8, **train),
        tune=TuneConfig(task="classify"),
        adapter=adapter,
    )


def engine(backend: str, config: Recipe) -> Any:
    assert config.adapter
    base = params.init_params(dataclasses.replace(config.model, labels=()), 1)
    made = params.as_classifier(base, config.model, config.train.seed)
    own = {} if config.adapter.method == "full" else adapters.init(config, base)
    return importlib.import_module(f"{backend}.engine").Engine(config, made | own, "cpu")


def curve(backend: str, config: Recipe, source: SftSource, steps: int) -> tuple[Any, np.ndarray]:
    made = engine(backend, config)
    stats = [made.train_step(step, source.batch(step).split(0), config.optim.lr) for step in range(1, steps + 1)]
    return made, np.array([stat.loss_sum / stat.weight for stat in stats])


def sums(made: Any, source: SftSource, split: str = "valid") -> dict[str, float]:
    total: dict[str, float] = {}
    for batch in source.split(split):
        for name, value in made.evaluate(batch).items():
            total[name] = total.get(name, 0.0) + value
    return total


def test_rows_ask_their_last_token_for_the_label(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = opened(tmp_path, tokenizer, class_weights="balanced")
    assert source.labels == ("bad", "good") and source.template is None
    held = [row for split in ("train", "valid") for row in source.rows(split)]
    labels = {f"{tmp_path / 'rows.jsonl'} row {n}": row["label"] for n, row in enumerate(rows(300), 1)}
    for row in held:
        (at,) = np.flatnonzero(row.weights)
        assert at == len(row) - 1 and source.labels[row.targets[at]] == labels[row.where]
    mass = [sum(row.weights.sum() for row in source.rows("train") if row.targets[-1] == n) for n in (0, 1)]
    assert mass[0] == pytest.approx(mass[1], rel=1e-5)
    assert sum(mass) == pytest.approx(len(source.rows("train")), rel=1e-5)


def test_labels_are_sorted_and_numbers_are_numbers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    given = [{"text": f"the {n}", "label": n % 12} for n in range(60)]
    assert opened(tmp_path, tokenizer, given).labels == tuple(str(n) for n in range(12))
    with pytest.raises(UserError, match="one label, '1': expected at least two"):
        opened(tmp_path, tokenizer, [{"text": "a", "label": 1}, {"text": "b", "label": 1}])


def test_long_texts_lose_their_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    given = [{"text": "the " * 80, "label": "x"}, *({"text": f"{n}", "label": "xy"[n % 2]} for n in range(20))]
    source = opened(tmp_path, tokenizer, given, overflow="truncate")
    assert sum(count.cut for count in source.counts.values()) == 1
    longest = max((row for split in ("train", "valid") for row in source.rows(split)), key=len)
    assert longest.tokens.tolist() == tokenizer.encode("the " * 80)[:64]


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_both_frameworks_train_one_curve_and_tell_the_labels(method: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = opened(tmp_path, tokenizer)
    config = recipe(source, method)
    made, curves = zip(*(curve(backend, config, source, 36) for backend in BACKENDS), strict=True)
    assert abs(curves[0][0] - curves[1][0]) <= 1e-6 * curves[0][0]
    assert worst("curve", curves[0], curves[1]) <= 1e-4
    before, after = (sums(each, source) for each in (engine("mlxgpt", config), made[0]))
    assert confusion.figures(after, 2)["accuracy"] > 0.8 > confusion.figures(before, 2)["accuracy"]
    assert confusion.table(after, 2).sum() == len(source.rows("valid"))
    other = sums(made[1], source)
    assert np.array_equal(confusion.table(after, 2), confusion.table(other, 2))
    assert after["loss"] / after["weight"] < before["loss"] / before["weight"]


def test_packing_does_not_change_a_classifier(tmp_path: Path, tokenizer: Tokenizer) -> None:
    packed, padded = (opened(tmp_path, tokenizer, packing=packing) for packing in (True, False))
    made = engine("mlxgpt", recipe(packed))
    together, alone = sums(made, packed), sums(made, padded)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert confusion.figures(together, 2) == confusion.figures(alone, 2)


@pytest.mark.parametrize("broken", ["first token", "token before"])
def test_the_wrong_token_would_be_seen(broken: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A head on another token than the last tells less, and its loss is another."""
    source = opened(tmp_path, tokenizer, packing=False)
    made, _ = curve("mlxgpt", recipe(source), source, 24)
    batch = next(iter(source.split("valid")))
    shifted, targets = np.zeros_like(batch.weights), np.zeros_like(batch.targets)
    for b in range(len(batch.tokens)):
        (at,) = np.flatnonzero(batch.weights[b])
        place = 0 if broken == "first token" else at - 1
        shifted[b, place], targets[b, place] = 1, batch.targets[b, at]
    right, wrong = made.evaluate(batch), made.evaluate(Batch(batch.tokens, targets, shifted))
    assert abs(right["loss"] - wrong["loss"]) > 1e-3 * right["loss"]


# figures


def test_figures_by_hand() -> None:
    targets = np.array([[0, 0, 0, 1, 1, 2, 9]])
    answers = np.array([[0, 0, 1, 1, 0, 0, 5]])
    batch = Batch(targets, targets, np.array([[1, 1, 1, 2, 2, 0.5, 0]], np.float32))
    found = confusion.count(batch, answers)
    assert confusion.table(found, 3).tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    figures = confusion.figures(found, 3)
    assert figures["accuracy"] == 0.5
    assert figures["macro_f1"] == pytest.approx((2 * 2 / 7 + 2 * 1 / 4 + 0) / 3)
    lines = confusion.lines(found, LABELS)
    assert lines[1].split() == ["bad", "2", "1", "0", "0.500", "0.667", "0.571"]
    assert len(confusion.lines({}, [f"label {n}" for n in range(30)])[0]) < 60


# adapters and the verb


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # PEFT, of the key mlxgpt
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT, of transformers
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_is_pefts(
    family: str, method: str, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny(family=family, block_size=64, vocab_size=tokenizer.n_vocab)
    model_folder.write_model(tmp_path / "base", base, weights(base), tokenizer=tokenizer)
    config = Recipe(
        model=dataclasses.replace(base, labels=LABELS),
        tune=TuneConfig(task="classify"),
        adapter=AdapterConfig(method=method, rank=4),
    )
    made = adapters.init(config, model_folder.read_params(tmp_path / "base", base))
    draw = np.random.default_rng(0)
    shapes = {name: param.shape for name, param in adapters.trainable(config).items()}
    assert "score.weight" in shapes
    trained = {n: made.get(n, 0) + draw.normal(0, 0.1, shape).astype(np.float32) for n, shape in shapes.items()}
    (tmp_path / "adapter").mkdir()
    adapter_folder.write_adapter(tmp_path / "adapter", config, tmp_path / "base", trained)
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["task_type"] == "SEQ_CLS" and values["modules_to_save"] == ["score"]
    assert not (tmp_path / "adapter" / "adapters.safetensors").exists()
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = draw.integers(0, tokenizer.n_vocab, (1, 13))
    expected = theirs(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    for backend in BACKENDS:
        agree(f"{backend} {method}", logits(backend, tmp_path / "base", tokens, tmp_path / "adapter"), expected, 1e-5)
    code, _, error = run(
        capsys, "fuse", "-m", tmp_path / "base", "--adapter", tmp_path / "adapter", "-o", tmp_path / "f"
    )
    assert code == 0, error
    agree("fused", logits("mlxgpt", tmp_path / "f", tokens), expected, 1e-5)
    assert model_folder.read_config(tmp_path / "f").labels == LABELS
    code, _, error = run(capsys, "convert", tmp_path / "f", tmp_path / "c", "--to", "mlx-lm")
    assert code == 2 and "a classifier of 3 labels: only --to hf has a place for it" in error
    theirs.save_pretrained(str(tmp_path / "theirs"))
    agree("by PEFT", logits("mlxgpt", tmp_path / "base", tokens, tmp_path / "theirs"), expected, 1e-5)


@pytest.fixture
def model(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    config = tiny(family="llama", block_size=64, vocab_size=tokenizer.n_vocab, labels=["bad", "good"])
    model_folder.write_model(tmp_path / "model", config, weights(config), tokenizer=tokenizer)
    return tmp_path / "model"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_verb_classifies(
    backend: str, tmp_path: Path, model: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows(20)))
    code, out, _ = run(capsys, "classify", "-m", model, "-t", "a park", "-f", path, "--json", "--backend", backend)
    found = json.loads(out)
    assert code == 0 and len(found["rows"]) == 21 and found["labels"] == ["bad", "good"]
    tokens = np.array([tokenizer.encode("a park")])
    z = logits({"mlx": "mlxgpt", "torch": "torch_ref"}[backend], model, tokens)[0].astype(np.float64)
    assert found["rows"][0]["probabilities"]["good"] == pytest.approx(1 / (1 + np.exp(z[0] - z[1])), abs=1e-6)
    right = [row["label"] == row["given"] for row in found["rows"] if "given" in row]
    assert len(right) == 20 and found["accuracy"] == sum(right) / 20 and sum(map(sum, found["confusion"])) == 20
    code, out, _ = run(capsys, "classify", "-m", model, "-f", path, "--backend", backend)
    assert code == 0 and f"accuracy {found['accuracy']:.4f}, macro-F1 {found['macro_f1']:.4f}" in out
    (tmp_path / "rows.txt").write_text("a park\nthe day\n")
    code, out, _ = run(capsys, "classify", "-m", model, "-f", tmp_path / "rows.txt", "--backend", backend)
    assert code == 0 and [line.split("\t")[2] for line in out.splitlines()] == ["a park", "the day"]


def test_the_verb_refuses(
    tmp_path: Path, model: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        ((), "nothing to classify: expected --text TEXT, or --file FILE"),
        (("-t", ""), "--text 1: empty: expected text"),
        (("-f", tmp_path / "none.csv"), "none.csv: no such file"),
        (("-f", tmp_path), "no such file"),
    ):
        code, _, error = run(capsys, "classify", "-m", model, *words)
        assert code == 2 and message in error
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "label": "odd"}))
    code, _, error = run(capsys, "classify", "-m", model, "-f", tmp_path / "rows.jsonl")
    assert code == 2 and "rows.jsonl row 1: label 'odd': expected one of the model's, bad, good" in error
    base = tiny(family="llama", block_size=64, vocab_size=tokenizer.n_vocab)
    model_folder.write_model(tmp_path / "base", base, weights(base), tokenizer=tokenizer)
    code, _, error = run(capsys, "classify", "-m", tmp_path / "base", "-t", "a")
    assert code == 2 and "a language model: expected a classifier" in error
    for words in (("generate", "-p", "a"), ("eval", "-d", tmp_path / "rows.jsonl")):
        code, _, error = run(capsys, words[0], "-m", model, *words[1:])
        assert code == 2 and "a classifier of 2 labels, which mlxgpt classify runs" in error
