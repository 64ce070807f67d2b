"""A classifier's padding: transformers and PEFT score each text as we do, alone and in a batch, whatever it ends in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
import torch
from models import tiny, weights
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from convert.conversion import convert
from convert.fuse import fuse
from mlxgpt import cli
from mlxgpt.common.folders import model_folder, resolve
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer
from mlxgpt.common.tokenizers.padding import own_padding, with_padding, without_padding

KINDS = ("bpe", "room", "pad", "sp-bpe", "char")
TEXTS = ["a park", "the day goes", "it is", "a park it goes every day"]


def write_base(place: Path, kind: str) -> Path:
    """A model whose eos_token may be written in a text; ``room``: with unused ids, ``pad``: with a token <pad>."""
    spelled = train_tokenizer(kind if kind in ("sp-bpe", "char") else "bpe", [templates.TEXT + "<|endoftext|>"], 300)
    if kind == "pad":
        templates.tokenizer_folder(place, None, ["<pad>"])
        config = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<pad>"}))
        spelled = load_tokenizer(place)
    family = "gpt2" if kind == "bpe" else "llama"
    config = tiny(family=family, block_size=64, vocab_size=spelled.n_vocab + 3 * (kind == "room"))
    model_folder.write_model(place, config, weights(config), tokenizer=spelled)
    return place


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND/base; KIND/full and KIND/lora, classifiers of it; KIND/fused and KIND/again, models of the adapter."""
    place = tmp_path_factory.mktemp("padding")
    rows = [{"text": TEXTS[n % 4] + " a" * (n % 5), "label": ["bad", "good"][n % 2]} for n in range(30)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ["train.batch_size=4", "train.compile=off", "optim.lr=0.02", "optim.warmup=0"]
    words = ["-d", str(place / "rows.jsonl"), "--task", "classify", "--steps", "3", "--device", "cpu"]
    words += [word for each in sets for word in ("--set", each)]
    for kind in KINDS:
        base = write_base(place / kind / "base", kind)
        for method in ("full", "lora"):
            out = ["-m", str(base), "-o", str(place / kind / method), "--method", method, "--backend", "torch"]
            assert cli.main(["finetune", *out, *words]) == 0
        fuse(place / kind / "lora", None, place / kind / "fused")
        convert(place / kind / "fused", place / kind / "again", to="hf")
    return place


def texts_of(kind: str, *folders: Path) -> list[str]:
    """Texts that end in every token that a folder of theirs pads or ends with, also nothing else."""
    if kind == "char":
        return TEXTS
    held = [load_tokenizer(folder).named for folder in folders]
    ends = {named[role] for named in held for role in ("eos_token", "pad_token") if role in named}
    return [*TEXTS, *(f"the day{end}" for end in sorted(ends)), *(f"it{end}{end}" for end in sorted(ends))]


def ours(folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> np.ndarray:
    words = [word for text in texts for word in ("-t", text)]
    capsys.readouterr()
    assert cli.main(["classify", "-m", str(folder), *words, "--json", "--device", "cpu", "--backend", "torch"]) == 0
    found = json.loads(capsys.readouterr().out)
    return np.array([[row["probabilities"][label] for label in found["labels"]] for row in found["rows"]])


def theirs(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    given = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
    given.pop("token_type_ids", None)
    with torch.no_grad():
        return model.eval()(**given).logits.softmax(-1).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_scores_the_same_token(tuned: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("full", "fused", "again"):
        folder = resolve.resolve_model(tuned / kind / name)
        texts = texts_of(kind, folder, tuned / kind / "base")
        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        assert tokenizer.pad_token_id == model.config.pad_token_id < model.config.vocab_size
        expected = ours(folder, texts, capsys)
        for found in (theirs(model, tokenizer, texts), np.concatenate([theirs(model, tokenizer, [t]) for t in texts])):
            assert np.abs(found - expected).max() < 1e-5, name
        if name != "full":
            assert np.abs(ours(tuned / kind / "lora", texts, capsys) - expected).max() < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bpe", "room"])
def test_peft_scores_the_same_token(tuned: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = resolve.resolve_model(tuned / kind / "lora")
    model: Any = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.base_model.model.config.pad_token_id = tokenizer.pad_token_id
    texts = texts_of(kind, folder, tuned / kind / "base")
    assert np.abs(theirs(model, tokenizer, texts) - ours(folder, texts, capsys)).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_padding_token_is_new_and_costs_a_row_where_there_is_no_room(tuned: Path, kind: str) -> None:
    base, full = tuned / kind / "base", resolve.resolve_model(tuned / kind / "full")
    before, after = load_tokenizer(base), load_tokenizer(full)
    assert own_padding(after) == before.n_vocab and after.named["pad_token"] == "[PAD]"
    sizes = [model_folder.read_config(folder).vocab_size for folder in (base, full)]
    assert sizes[1] - sizes[0] == (kind != "room")
    assert with_padding(after) is after
    for text in TEXTS:
        assert before.encode(text) == after.encode(text)


def test_a_folder_that_pads_with_its_end_is_scored_as_transformers_scores_it(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As trl and our first versions write them."""
    spelled = load_tokenizer(tuned / "bpe" / "base")
    config = tiny(family="llama", block_size=64, vocab_size=spelled.n_vocab, labels=["bad", "good"])
    model_folder.write_model(tmp_path, config, weights(config))
    spelled.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": settings["eos_token"]}))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"pad_token_id": spelled.eos_id}))
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    texts = texts_of("bpe", tmp_path)
    assert np.abs(theirs(model, tokenizer, texts) - ours(tmp_path, texts, capsys)).max() < 1e-5


def test_what_is_left_of_a_text_ends_where_it_is_scored() -> None:
    ids = np.array([7, 3, 7, 7])
    assert without_padding(ids, 7).tolist() == [7, 3] and without_padding(ids, None).tolist() == ids.tolist()
    assert without_padding(ids[2:], 7).tolist() == [7], "transformers' argmax over no token is the first"
