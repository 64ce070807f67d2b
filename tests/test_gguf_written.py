"""What `convert --to gguf` says of a tokenizer: beginnings, ends, templates, types, names, and the Modelfile."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as package
import models
import numpy as np
import pytest
import tokenizers
import transformers
import vocabularies
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece
from vocabularies import BOS, CHATML, EOS, PAD, TEXT, THINK, TURN

from convert import convert
from convert.formats.gguf import tokenizer as gguf_tokenizer
from convert.formats.gguf.file import Value
from convert.verify.tokenizer import TEXTS
from mlxgpt.common.folders import model_folder

GGML = "tokenizer.ggml."
QWEN = CHATML.replace(
    "{% for", "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}{% for", 1
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in "
    "messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)


def bpe(name: str = "gpt-2", *special: str) -> tokenizers.Tokenizer:
    """A copy of a byte-level BPE with more special tokens."""
    made = tokenizers.Tokenizer.from_str(vocabularies.byte_level(name).to_str())
    made.add_special_tokens(list(special))
    return made


def around(backend: tokenizers.Tokenizer, single: str) -> tokenizers.Tokenizer:
    """The same with tokens before and after every text."""
    marks = [(token, backend.token_to_id(token)) for token in dict.fromkeys(single.replace("$A", "").split())]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    return backend


def files_of(backend: tokenizers.Tokenizer, **settings: Any) -> dict[str, Path | bytes]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS} | settings
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def said(
    files: dict[str, Path | bytes], n_vocab: int = 420, arch: str = "llama", **extra: Any
) -> tuple[dict, list[str]]:
    """The metadata as plain values, ids as the tokens that they are of; and the notes."""
    values, notes = gguf_tokenizer.describe(files, n_vocab, extra, arch)
    plain = {key: value.value for key, value in values.items()}
    tokens = plain.get(GGML + "tokens", [])
    return {key: tokens[value] if key.endswith("_token_id") else value for key, value in plain.items()}, notes


def test_bos_ends_templates_and_types_of_a_folder(tmp_path: Path) -> None:
    """Everything at once, judged by the gguf package and by transformers' reading of the file."""
    backend = around(bpe("llama-bpe", "<|eom_id|>"), f"{BOS} $A")
    backend.add_tokens(["<tool>"])
    ends = [backend.token_to_id(token) for token in (EOS, "<|eom_id|>", TURN)]
    config = dataclasses.replace(models.CASES["llama"], vocab_size=backend.get_vocab_size() + 9)
    model_folder.write_model(tmp_path / "m", config, models.weights(config))
    templates = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": CHATML + "{{ tools }}"}]
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "chat_template": templates}
    for name, data in files_of(backend, **named).items():
        (tmp_path / "m" / name).write_bytes(data if isinstance(data, bytes) else data.read_bytes())
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (tmp_path / "m" / "chat_template.jinja").write_text(CHATML)
    assert convert(tmp_path / "m", tmp_path / "a.gguf").notes == []
    fields = package.GGUFReader(tmp_path / "a.gguf").fields
    found = {key.removeprefix(GGML): field.contents() for key, field in fields.items() if key.startswith(GGML)}
    tokens, types = found.pop("tokens"), found.pop("token_type")
    assert len(found.pop("merges")) == len(json.loads(backend.to_str())["model"]["merges"])
    assert {key: tokens[i] if key.endswith("_id") else i for key, i in found.items()} == {
        "model": "gpt2",
        "pre": "llama-bpe",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "eot_token_id": TURN,
        "eom_token_id": "<|eom_id|>",
        "padding_token_id": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    kinds = {token: types[tokens.index(token)] for token in (BOS, TURN, "<|eom_id|>", THINK, "<tool>", "a")}
    assert kinds == {BOS: 3, TURN: 3, "<|eom_id|>": 3, THINK: 4, "<tool>": 4, "a": 1}
    assert tokens[-9:] == [f"[PAD{i}]" for i in range(len(tokens) - 9, len(tokens))] and types[-9:] == [5] * 9
    assert fields["tokenizer.chat_template"].contents() == CHATML  # the file, not the field
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in [*TEXTS, TEXT, f"a{TURN} b<think><tool>"]:
        assert other(text)["input_ids"] == expected(text)["input_ids"], text
    assert (
        other.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        == "<|im_start|>user\nhi<|im_end|>\n"
    )


def test_several_templates_are_all_there() -> None:
    listed = [{"name": "default", "template": CHATML}, {"name": "tool-use", "template": "tools"}]
    found, _ = said(files_of(bpe(), chat_template=listed))
    assert found["tokenizer.chat_template"] == CHATML
    assert (found["tokenizer.chat_template.tool_use"], found["tokenizer.chat_templates"]) == ("tools", ["tool_use"])


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        ("$A", (False, False)),
        (f"{BOS} $A", (True, False)),
        (f"$A {EOS}", (False, True)),
        (f"{BOS} $A {EOS}", (True, True)),
        (f"{BOS} {THINK} $A", (False, False)),
    ],
)
def test_what_stands_around_a_text_is_what_the_post_processor_puts_there(
    single: str, expected: tuple[bool, bool]
) -> None:
    found, notes = said(files_of(around(bpe(), single)))  # no bos_token named: the post-processor's counts
    assert (found[GGML + "add_bos_token"], found[GGML + "add_eos_token"]) == expected
    assert found.get(GGML + "bos_token_id") == (BOS if expected[0] else None)
    assert [note for note in notes if "llama.cpp can put one token before a text" in note] == notes
    assert bool(notes) == (THINK in single)


@pytest.mark.parametrize(
    ("settings", "extra", "expected"),
    [
        ({}, {}, {"eos": EOS}),
        ({"chat_template": CHATML}, {}, {"eos": EOS, "eot": TURN}),
        ({"chat_template": CHATML, "eos_token": TURN}, {}, {"eos": TURN, "eot": TURN}),
        ({}, {"eos_token_id": [EOS, TURN]}, {"eos": EOS, "eot": TURN}),
        ({"eos_token": None}, {"eos_token_id": [TURN, PAD]}, {"eos": TURN, "eot": PAD}),
        ({}, {"eos_token_id": [EOS, PAD, TURN]}, {"eos": EOS, "eot": TURN, "eom": PAD}),
    ],
)
def test_ends(settings: dict[str, Any], extra: dict[str, Any], expected: dict[str, str]) -> None:
    backend = bpe()
    ids = {key: [backend.token_to_id(token) for token in tokens] for key, tokens in extra.items()}
    files = files_of(backend, **settings)
    if settings.get("eos_token", EOS) is None:
        files = {"tokenizer.json": files["tokenizer.json"], "tokenizer_config.json": b"{}"}
        backend = tokenizers.Tokenizer.from_str(backend.to_str().replace(EOS, "<|other|>"))
        files["tokenizer.json"] = backend.to_str().encode()
    found, notes = said(files, eos_token_id=ids.get("eos_token_id"))
    keys = {
        key.removeprefix(GGML).removesuffix("_token_id"): value for key, value in found.items() if "_token_id" in key
    }
    assert {key: keys.get(key) for key in ("eos", "eot", "eom") if key in keys} == expected
    assert notes == []


def test_ends_without_a_key_are_said() -> None:
    backend = bpe("gpt-2", "<a>", "<b>", "<c>")
    ids = [backend.token_to_id(token) for token in (EOS, "<a>", "<b>", "<c>")]
    _, notes = said(files_of(backend), eos_token_id=ids)
    assert notes == ["llama.cpp has no key for so many ends: it goes on after <c>"]


def test_a_tokenizer_without_an_end_gets_one_that_no_text_has() -> None:
    content = json.loads(bpe().to_str()) | {"added_tokens": []}
    files: dict[str, Path | bytes] = {"tokenizer.json": json.dumps(content).encode(), "tokenizer_config.json": b"{}"}
    found, notes = said(files)
    assert found[GGML + "eos_token_id"].startswith("[PAD") and notes == []
    found, notes = said(files, n_vocab=bpe().get_vocab_size() - 6)
    assert "this tokenizer has no end of text" in notes[0] and repr(found[GGML + "eos_token_id"]) in notes[0]


def metaspace(legacy: bool) -> tokenizers.Tokenizer:
    """SentencePiece's BPE as transformers writes it: a space in front by a Metaspace, or by the normalizer."""
    given = vocabularies.of_sentencepiece()
    tokens = {token: i for i, token in enumerate(given.tokens)}
    llama = transformers.LlamaTokenizer(
        vocab=tokens,
        merges=transformers.tokenization_utils_base.generate_merges(
            tokens, dict(zip(given.tokens, given.scores or [], strict=True))
        ),
    )
    backend = llama.backend_tokenizer
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        backend.pre_tokenizer = None
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", TURN)])
    return backend


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tokenizer_json_of_sentencepiece_gets_its_scores_from_its_merges(legacy: bool) -> None:
    """Scores in the order of SentencePiece's own; llama.cpp's way with spaces is said where it is another."""
    found, notes = said(files_of(metaspace(legacy), eos_token="</s>", unk_token="<unk>"))
    given = vocabularies.of_sentencepiece()
    assert (found[GGML + "model"], found[GGML + "add_space_prefix"]) == ("llama", True)
    normal = [i for i, kind in enumerate(given.types) if kind == 1 and len(given.tokens[i]) > 1]
    assert [found[GGML + "token_type"][i] for i in normal] == [1] * len(normal)
    scores = np.array(found[GGML + "scores"])[normal]
    assert np.array_equal(
        np.argsort(-scores, kind="stable"), np.argsort(-np.array(given.scores)[normal], kind="stable")
    )
    assert found[GGML + "token_type"][given.tokens.index("<0x0A>")] == 6
    assert found[GGML + "token_type"][0] == 2
    what = "spaces at its beginning, words after a control token"
    assert notes == ([] if legacy else [f"llama.cpp gives other ids than this tokenizer to text with {what}"])


def without_some_merges() -> dict[str, Any]:
    content = json.loads(metaspace(True).to_str())
    del content["model"]["merges"][::3]
    return content


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = json.loads(bpe().to_str())
    change(content)
    return content


def word_piece() -> dict[str, Any]:
    backend = tokenizers.Tokenizer(WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    return json.loads(backend.to_str())


def other_ignoring() -> dict[str, Any]:
    content = changed(lambda c: c["model"].update(ignore_merges=True))
    content["model"]["vocab"]["wordthatnomergemakes"] = len(content["model"]["vocab"]) + 20
    return content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: changed(lambda c: c.update(normalizer={"type": "NFKC"})), "it normalizes text (NFKC)"),
        (
            lambda: changed(lambda c: c["pre_tokenizer"].update(add_prefix_space=True)),
            "its rule for splitting text (ByteLevel)",
        ),
        (
            lambda: changed(lambda c: c.update(pre_tokenizer={"type": "Whitespace"})),
            "its rule for splitting text (Whitespace)",
        ),
        (lambda: changed(lambda c: c["model"].update(end_of_word_suffix="</w>")), "end_of_word_suffix '</w>'"),
        (other_ignoring, "llama.cpp merges words that are tokens with gpt-2"),
        (word_piece, "it has no kind for WordPiece"),
        (without_some_merges, "its merges are not those of scores"),
    ],
)
def test_what_llama_cpp_cannot_have_is_refused_by_name(content: Callable[[], dict[str, Any]], says: str) -> None:
    files: dict[str, Path | bytes] = {"tokenizer.json": json.dumps(content()).encode()}
    found, notes = said(files)
    assert len(notes) == 1 and "llama.cpp gets no tokenizer: " in notes[0] and says in notes[0]
    assert found[GGML + "model"] == "none" and not any(key.startswith(GGML + "tok") for key in found)


def test_tokens_beyond_the_embedding_are_refused() -> None:
    found, notes = said(files_of(bpe()), n_vocab=300)
    assert "llama.cpp gets no tokenizer: token with id" in notes[0] and "the model has 300 rows" in notes[0]
    assert found[GGML + "model"] == "none"


def test_an_added_token_beyond_the_embedding_is_left_out_and_said() -> None:
    backend = bpe("gpt-2", "<mask>")
    found, notes = said(files_of(backend), n_vocab=backend.get_vocab_size() - 1)
    rows = len(found[GGML + "tokens"])
    assert notes == [f"token '<mask>' has id {rows}, the model {rows} rows: llama.cpp gets none"]
    assert "<mask>" not in found[GGML + "tokens"] and found[GGML + "pre"] == "gpt-2"


def test_the_models_type_has_a_say_in_the_tokenizers_class() -> None:
    """transformers runs a phi3's tokenizer.json as it is, a llama's as LlamaTokenizer, which llama.cpp is not."""
    files = files_of(metaspace(True), tokenizer_class="LlamaTokenizer", eos_token="</s>", unk_token="<unk>")
    notes = {kind: said(files, model_type=kind)[1] for kind in ("phi3", "llama")}
    assert notes["phi3"] == [] and "spaces at its beginning" in notes["llama"][0]


def test_gpt2s_original_pair_of_files_is_a_tokenizer_too() -> None:
    content = json.loads(bpe().to_str())
    vocab = content["model"]["vocab"] | {one["content"]: one["id"] for one in content["added_tokens"]}
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    found, notes = said({"encoder.json": json.dumps(vocab).encode(), "vocab.bpe": merges.encode()})
    assert (found[GGML + "pre"], found[GGML + "eos_token_id"], notes) == ("gpt-2", EOS, [])


def test_flags_that_gguf_has_not_are_said() -> None:
    backend = bpe()
    backend.add_special_tokens([AddedToken("<|user|>", rstrip=True, special=True)])
    _, notes = said(files_of(backend))
    assert len(notes) == 1 and "'<|user|>' wherever the text stands" in notes[0]


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ({"type": "Split", "pattern": {"Regex": "LLAMA3"}, "behavior": "Removed", "invert": True}, "dbrx"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "LLAMA3"}, "behavior": "Isolated", "invert": False}
                ],
            },
            "dbrx",
        ),
        ({"type": "Split", "pattern": {"Regex": "LLAMA3"}, "behavior": "MergedWithPrevious", "invert": False}, None),
        ({"type": "Digits", "individual_digits": True}, None),
    ],
)
def test_one_rule_spelled_in_other_ways(steps: dict[str, Any], name: str | None) -> None:
    content = json.loads(bpe("dbrx").to_str())
    regex = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    spelled = json.loads(json.dumps(steps).replace("LLAMA3", json.dumps(regex)[1:-1]))
    last = content["pre_tokenizer"]["pretokenizers"][-1]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [spelled, last]}
    found, notes = said({"tokenizer.json": json.dumps(content).encode()})
    assert found.get(GGML + "pre") == name and bool(notes) == (name is None)


def test_a_name_at_which_llama_cpp_looks_for_tokens_is_changed() -> None:
    values = {GGML + "tokens": Value("str[]", ["<s>", "</s>"])}
    assert gguf_tokenizer.loadable_name("tiny-Phi-3-x", values) == "tiny-phi_3-x"
    whole = {GGML + "tokens": Value("str[]", ["<s>", "</s>", "<unk>", "<|endoftext|>"])}
    assert gguf_tokenizer.loadable_name("tiny-Phi-3-x", whole) == "tiny-Phi-3-x"


def modelfile(template: str, backend: tokenizers.Tokenizer, **extra: Any) -> list[str]:
    files = files_of(backend, chat_template=template, bos_token=BOS)
    made = gguf_tokenizer.modelfile_of(files, extra, "m.gguf", 100)
    assert made is not None
    return made.decode().splitlines()


def test_a_modelfile_says_template_ends_and_context() -> None:
    """The turns of ChatML; the system's text that Qwen2.5's template says where nobody does."""
    lines = modelfile(QWEN, bpe(), eos_token_id=[bpe().token_to_id(PAD)])
    assert lines == [
        "FROM ./m.gguf",
        "PARAMETER num_ctx 100",
        f'PARAMETER stop "{EOS}"',
        f'PARAMETER stop "{PAD}"',
        f'PARAMETER stop "{TURN}"',
        'SYSTEM """Be kind."""',
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system',
        '{{ .Content }}<|im_end|>',
        '{{ else if eq .Role "user" }}<|im_start|>user',
        '{{ .Content }}<|im_end|>',
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant',
        '{{ .Content }}<|im_end|>',
        '{{ end }}{{ end }}<|im_start|>assistant',
        '"""',
    ]  # fmt: skip


@pytest.mark.parametrize("begins", [False, True])
def test_a_modelfile_leaves_out_the_bos_that_is_put_before_a_text(begins: bool) -> None:
    """Also a template that refuses a system turn, and renames a role."""
    backend = around(bpe(), f"{BOS} $A") if begins else bpe()
    lines = modelfile(GEMMA, backend)
    first = next(line for line in lines if line.startswith("TEMPLATE"))
    assert (
        first
        == f'TEMPLATE """{"" if begins else BOS}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}<|im_start|>user'
    )
    assert '{{ else if eq .Role "assistant" }}<|im_start|>model' in lines


def test_a_template_that_ollama_cannot_have_is_left_to_the_file() -> None:
    folded = GEMMA.replace("{{ raise_exception('no system') }}", "{% set s = messages[0]['content'] %}").replace(
        "{{ m['content'] | trim }}", "{{ m['content'] }}{{ loop.index if loop.index > 2 }}"
    )
    lines = modelfile(folded, bpe())
    assert lines[-1].startswith("# The chat template cannot be said in Ollama's language")
    assert not any(line.startswith("TEMPLATE") for line in lines)


def test_templates_in_files_of_their_own_go_there_and_back(tmp_path: Path) -> None:
    config = dataclasses.replace(models.CASES["gpt2"], vocab_size=420)
    model_folder.write_model(tmp_path / "m", config, models.weights(config))
    for name, data in files_of(bpe()).items():
        (tmp_path / "m" / name).write_bytes(data if isinstance(data, bytes) else data.read_bytes())
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "m" / "additional_chat_templates" / "rag.jinja").write_text("rag")
    report = convert(tmp_path / "m", tmp_path / "a.gguf")
    assert report.notes == []
    fields = package.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.chat_template.rag"].contents() == "rag"
    convert(tmp_path / "a.gguf", tmp_path / "back")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "back").chat_template
    assert found == {"default": CHATML, "rag": "rag"}


def test_convert_writes_the_modelfile_beside_the_file_and_replaces_both(tmp_path: Path) -> None:
    config = dataclasses.replace(models.CASES["gpt2"], vocab_size=420)
    model_folder.write_model(tmp_path / "m", config, models.weights(config))
    (tmp_path / "bare").mkdir()
    for path in (tmp_path / "m").iterdir():
        (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    for name, data in files_of(bpe(), chat_template=CHATML).items():
        (tmp_path / "m" / name).write_bytes(data if isinstance(data, bytes) else data.read_bytes())
    convert(tmp_path / "m", tmp_path / "out.q.gguf")
    assert (tmp_path / "out.q.Modelfile").read_text().startswith("FROM ./out.q.gguf\nPARAMETER num_ctx 32\n")
    convert(tmp_path / "bare", tmp_path / "out.q.gguf", force=True)
    assert not (tmp_path / "out.q.Modelfile").exists()
