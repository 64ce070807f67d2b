"""Tokenizers through GGUF's metadata: as files of our own, and rebuilt from what llama.cpp reads."""

import json
from pathlib import Path
from typing import Any

import gguf as package
import models
import numpy as np
import pytest
import tokenizers
from test_gguf import opened, rewritten, without_ours
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from convert.formats.gguf import model as gguf
from convert.formats.gguf.file import read_gguf
from convert.formats.gguf.pre import _LLAMA3, _QWEN2
from convert.formats.opened import Options
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

TEXT = (
    "It was the best of times. def mean(xs):\n    return sum(xs) / len(xs)  # 3.14159 2024\n\tna\u00efve caf\u00e9, "
    "\u4f60\u597d\uff0c\u4e16\u754c! \U0001f525\r\n"
    "\u0416\u0443\u043a \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 e\u0301 WE'LL "
    "they don't   three   spaces \u00bd \u2167.\n"
) * 4
PROBES = [
    TEXT,
    "",
    " ",
    "  two before",
    "two after  ",
    "\n\n\n",
    "a<|endoftext|>b",
    "</s><s> <unk>",
    "\u0b95\u0bcd",
    "12345 678",
]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def config(tokenizer: Tokenizer, spare: int = 0) -> ModelConfig:
    return models.tiny(family="llama", vocab_size=tokenizer.n_vocab + spare, n_layer=1)


def saved(tokenizer: Tokenizer, folder: Path) -> dict[str, Path | bytes]:
    folder.mkdir()
    tokenizer.save(folder)
    return {path.name: path for path in folder.iterdir()}


def loaded(files: Any, folder: Path) -> Tokenizer:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return load_tokenizer(folder)


def settled(folder: Path, **settings: Any) -> None:
    """tokenizer_config.json with more in it."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture(scope="module")
def kinds() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(kind, [TEXT], 400) for kind in ("char", "bpe", "sp-bpe", "sp-unigram")}


@pytest.mark.parametrize("kind", ["char", "bpe", "sp-bpe", "sp-unigram"])
def test_files_travel_byte_for_byte(kinds: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    files = saved(kinds[kind], tmp_path / "from")
    files |= {"README.md": b"---\nlicense: mit\n---\n# A model\n", "chat_template.jinja": TEMPLATE.encode()}
    files["generation_config.json"] = b'{"temperature": 0.5}'
    notes = gguf.write(opened(config(kinds[kind]), companions=files), tmp_path / "a.gguf", Options())
    expected = {name: one if isinstance(one, bytes) else one.read_bytes() for name, one in files.items()}
    assert gguf.read(tmp_path / "a.gguf").companions == expected
    assert bool(notes) == (kind in ("char", "sp-unigram")), notes
    values, _ = read_gguf(tmp_path / "a.gguf")
    assert values["general.license"] == "mit"
    assert values.get("tokenizer.chat_template") == TEMPLATE
    assert values["tokenizer.ggml.model"] == {"bpe": "gpt2", "sp-bpe": "llama"}.get(kind, "none")


@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("kind", ["bpe", "sp-bpe"])
def test_what_llama_cpp_reads_gives_the_same_ids(
    kinds: dict[str, Tokenizer], kind: str, spare: int, tmp_path: Path
) -> None:
    tokenizer = kinds[kind]
    files = saved(tokenizer, tmp_path / "from")
    settled(tmp_path / "from", chat_template=TEMPLATE)
    gguf.write(opened(config(tokenizer, spare), companions=files), tmp_path / "ours.gguf", Options())
    values, _ = read_gguf(tmp_path / "ours.gguf")
    assert len(values["tokenizer.ggml.tokens"]) == tokenizer.n_vocab + spare
    found = gguf.read(rewritten(tmp_path / "ours.gguf", tmp_path / "other.gguf", without_ours))
    again = loaded(found.companions, tmp_path / "to")
    for text in PROBES:
        assert again.encode(text) == tokenizer.encode(text), text
        assert again.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.eos_id == tokenizer.eos_id == found.extra["eos_token_id"]
    assert json.loads((tmp_path / "to" / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE


def as_published(pre: str) -> tokenizers.Tokenizer:
    """A byte-level BPE that splits text as Llama 3, Qwen 2 or SmolLM do."""
    backend = tokenizers.Tokenizer(BPE(ignore_merges=pre == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if pre == "smollm"
        else pre_tokenizers.Split(tokenizers.Regex(_LLAMA3 if pre == "llama-bpe" else _QWEN2), "isolated")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, plain])
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens(["<think>"])
    return backend


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
def test_published_rules_for_splitting_are_named_and_rebuilt(pre: str, tmp_path: Path) -> None:
    backend = as_published(pre)
    made = opened(
        models.tiny(family="llama", vocab_size=backend.get_vocab_size(), n_layer=1),
        companions={"tokenizer.json": backend.to_str().encode()},
    )
    assert gguf.write(made, tmp_path / "ours.gguf", Options()) == []
    field = package.GGUFReader(tmp_path / "ours.gguf").get_field("tokenizer.ggml.pre")
    assert field is not None and field.contents() == pre
    found = gguf.read(rewritten(tmp_path / "ours.gguf", tmp_path / "other.gguf", without_ours))
    again = loaded(found.companions, tmp_path / "to")
    plain = tokenizers.Tokenizer.from_str(backend.to_str())
    for text in [*PROBES, "a<think>b"]:
        assert again.encode(text) == plain.encode(text, add_special_tokens=False).ids, text


def test_a_rule_that_llama_cpp_does_not_have_is_said(tmp_path: Path) -> None:
    content = json.loads(as_published("qwen2").to_str())
    content["normalizer"] = {"type": "NFKC"}
    made = opened(
        models.tiny(family="llama", vocab_size=420), companions={"tokenizer.json": json.dumps(content).encode()}
    )
    notes = gguf.write(made, tmp_path / "a.gguf", Options())
    assert any("llama.cpp gets no tokenizer: it normalizes text (NFKC)" in note for note in notes)
    assert list(gguf.read(tmp_path / "a.gguf").companions) == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v, t: v["tokenizer.ggml.tokens"].__setitem__(3, "?"), "tokenizer.ggml.tokens differs from"),
        (lambda v, t: v["tokenizer.ggml.merges"].pop(), "tokenizer.ggml.merges differs from"),
        (lambda v, t: v.update({"mlxgpt.file.../x": "a"}), "mlxgpt.file.../x: expected the name of a file"),
        (lambda v, t: v.update({"mlxgpt.file.config.json": "a"}), "expected the name of a file"),
    ],
)
def test_files_that_contradict_the_tokens_are_refused(
    kinds: dict[str, Tokenizer], change: Any, says: str, tmp_path: Path
) -> None:
    made = opened(config(kinds["bpe"]), companions=saved(kinds["bpe"], tmp_path / "from"))
    gguf.write(made, tmp_path / "a.gguf", Options())
    with pytest.raises(UserError) as raised:
        gguf.read(rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", change))
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("bpe", lambda v: v["tokenizer.ggml.tokens"].pop(), "expected 401 strings"),
        ("bpe", lambda v: v.update({"tokenizer.ggml.token_type": np.zeros(3, np.int32)}), "tokenizer.ggml.token_type"),
        ("bpe", lambda v: v.update({"tokenizer.ggml.merges": ["a b c"]}), "tokenizer.ggml.merges: expected strings"),
        ("bpe", lambda v: v["tokenizer.ggml.merges"].append("a \u00ff\u00fe"), "make no tokenizer"),
        ("sp-bpe", lambda v: v.pop("tokenizer.ggml.scores"), "tokenizer.ggml.scores: expected"),
        ("sp-bpe", lambda v: v["tokenizer.ggml.tokens"].__setitem__(9, ""), "make no SentencePiece model"),
    ],
)
def test_damaged_lists_are_named(
    kinds: dict[str, Tokenizer], kind: str, change: Any, says: str, tmp_path: Path
) -> None:
    made = opened(config(kinds[kind], 1), companions=saved(kinds[kind], tmp_path / "from"))
    gguf.write(made, tmp_path / "a.gguf", Options())

    def both(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        without_ours(values, tensors)
        change(values)

    with pytest.raises(UserError) as raised:
        gguf.read(rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", both))
    assert says.replace("401", str(kinds[kind].n_vocab + 1)) in str(raised.value) and "\n" not in str(raised.value)


def test_an_unknown_kind_is_left_out_and_said(kinds: dict[str, Tokenizer], tmp_path: Path) -> None:
    made = opened(config(kinds["bpe"]), companions=saved(kinds["bpe"], tmp_path / "from"))
    gguf.write(made, tmp_path / "a.gguf", Options())

    def both(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        without_ours(values, tensors)
        values["tokenizer.ggml.pre"] = "viking"

    found = gguf.read(rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", both))
    assert (
        found.companions == {}
        and "tokenizer.ggml.pre = 'viking' is not supported (expected one of gpt-2," in found.notes[0]
    )
