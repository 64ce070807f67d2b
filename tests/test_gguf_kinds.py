"""GGUF files of other programs, an architecture with a kind of tokenizer each, there and back.

The gguf package writes them. Their ids are judged by what the vocabulary was taken from (`tokenizers` with the
published rule) and, where it knows kind and rule, by transformers' own reading of the file.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import gguf as package
import models
import numpy as np
import pytest
import transformers
import vocabularies
from test_gguf import arrays_of, opened
from vocabularies import EOS, TURN, Given, of_byte_level, of_sentencepiece

from convert import convert, open_model
from convert.formats.gguf import model as gguf
from convert.formats.gguf import pre
from convert.formats.gguf.file import read_gguf, read_stored
from convert.formats.opened import Options
from convert.verify.tokenizer import TEXTS
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.tokenizers.load import load_tokenizer

MARKED = [
    "a<think>b", "<|im_start|>user\nhi <|im_end|>\n", "  two", "hello<s> world", " <|im_end|> x", "5 67 890 1234",
    "\u2460\u00bd", "\uff21\ufb01", "WE'LL they'Ve", "a\r\nb\r\n\r\n", "[PAD380]", "\u2581a", "x\u2581\u2581y",
]  # fmt: skip


def texts(given: Given) -> list[str]:
    """The texts of verify, marks, and tokens of the vocabulary at random."""
    rng = np.random.default_rng(0)
    words = [token.replace("\u2581", " ") for token, kind in zip(given.tokens, given.types, strict=True) if kind == 1]
    made = ["".join(words[i] for i in rng.integers(0, len(words), 8)) for _ in range(50)]
    return [*TEXTS, *MARKED, vocabularies.TEXT, *made]


def written(config: ModelConfig, given: Given, path: Path) -> Path:
    """The model with this vocabulary, written by the package, with nothing of ours in it."""
    ours = path.with_suffix(".ours")
    gguf.write(opened(config), ours, Options())
    values, stored = read_gguf(ours)
    fields = package.GGUFReader(ours).fields
    writer = package.GGUFWriter(path, values["general.architecture"])
    for key, value in values.items():
        if key == "general.architecture" or key.startswith(("tokenizer.", "mlxgpt.")):
            continue
        types = fields[key].types
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        writer.add_key_value(key, plain, types[0], sub_type=types[1] if len(types) > 1 else None)
    given.padded(config.vocab_size).write(writer)
    for name, one in stored.items():
        writer.add_tensor(name, read_stored(one))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spm(prefix: bool = True, bos: bool = True, unigram: bool = False) -> Callable[[], Given]:
    return lambda: of_sentencepiece(unigram, prefix, bos)


def bpe(name: str, bos: bool = False) -> Callable[[], Given]:
    return lambda: of_byte_level(name, bos)


# case of models.py, vocabulary, and whether transformers reads such a file with the ids of the published tokenizer
COMBINATIONS = [
    ("llama", spm(), True),
    ("mistral", bpe("tekken", bos=True), True),
    ("llama-llama3", bpe("llama-bpe", bos=True), True),
    ("llama-gqa", bpe("llama-bpe"), True),
    ("qwen2", bpe("deepseek-r1-qwen", bos=True), False),
    ("qwen3", bpe("qwen2"), False),
    ("gemma", spm(prefix=False), False),
    ("gemma2", spm(prefix=False), True),
    ("gemma3_text", spm(prefix=False), True),
    ("gpt2", bpe("gpt-2"), True),
    ("phi3", spm(bos=False), True),
    ("phi", bpe("phi-2"), False),
    ("gpt_neox", bpe("olmo"), False),
    ("starcoder2", bpe("starcoder"), False),
    ("stablelm", bpe("stablelm2"), False),
    ("olmo2", bpe("dbrx"), False),
    ("granite", bpe("refact"), False),
    ("smollm3", bpe("smaug-bpe"), False),
    ("llama", bpe("smollm"), False),
    ("llama", spm(unigram=True, bos=False), False),
    ("llama", bpe("gpt-4o"), True),
    ("llama", bpe("deepseek-coder", bos=True), False),
    ("llama", bpe("deepseek-llm", bos=True), False),
    ("llama", bpe("deepseek-v3", bos=True), False),
    ("llama", bpe("falcon"), False),
    ("olmo", bpe("command-r", bos=True), False),
]


@pytest.mark.parametrize(("case", "vocabulary", "known"), COMBINATIONS)
def test_a_file_of_another_program_there_and_back(
    case: str, vocabulary: Callable[[], Given], known: bool, tmp_path: Path
) -> None:
    given = vocabulary()
    config = dataclasses.replace(models.CASES[case], vocab_size=len(given.tokens) + 3)
    source = written(config, given, tmp_path / "a.gguf")
    convert(source, tmp_path / "folder", "hf")
    found = load_tokenizer(tmp_path / "folder")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert found.before == ([given.ids["bos"]] if given.flags["add_bos_token"] else []) and found.after == []
    probes = texts(given)
    ids = [auto(text)["input_ids"] for text in probes]
    for text, one in zip(probes, ids, strict=True):
        assert found.before + found.encode(text) == one, text
    if given.model == "gpt2":
        published = vocabularies.byte_level(given.pre)
        for text, one in zip(probes, ids, strict=True):
            assert published.encode(text, add_special_tokens=False).ids == one[len(found.before) :], text
    if known:
        other = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
        for text, one in zip(probes, ids, strict=True):
            assert other(text)["input_ids"] == one, text
        assert other.chat_template == auto.chat_template
    ends = [found.id_of(EOS if given.model == "gpt2" else "</s>"), found.id_of(TURN)]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "folder").eos_token_id == ends
    convert(tmp_path / "folder", tmp_path / "b.gguf")
    assert_same_vocabulary(tmp_path / "a.gguf", tmp_path / "b.gguf")
    for name, array in arrays_of(open_model(tmp_path / "b.gguf")).items():
        assert np.array_equal(array, arrays_of(open_model(source))[name]), name


def assert_same_vocabulary(a: Path, b: Path) -> None:
    """Every key of the tokenizer that ``a`` has is in ``b``, with the same value."""
    (expected, _), (found, _) = read_gguf(a), read_gguf(b)
    for key, value in expected.items():
        if not key.startswith("tokenizer."):
            continue
        if key == "tokenizer.ggml.pre" and value in pre.RULES:  # of several names of a rule one is written
            assert pre.RULES[found[key]] == pre.RULES[value]
            continue
        assert np.array_equal(found[key], value) if isinstance(value, np.ndarray) else found[key] == value, key
