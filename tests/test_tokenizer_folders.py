"""A tokenizer folder means what AutoTokenizer makes of it: 90 folders, 200 texts; the rest is refused."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders
from tokenizer_folders import Sources, write

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.folder import classes
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer

SOURCES = Sources()
SHAPES = tokenizer_folders.shapes(SOURCES)
REFUSED = tokenizer_folders.refused(SOURCES)
TEXTS = tokenizer_folders.texts()


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers asks whether to run a folder's own code: nobody is there to answer."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_there_are_200_texts() -> None:
    assert len(TEXTS) == 200 and len(SHAPES) >= 80


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokenizer_is_the_one_that_transformers_reads(shape: str, tmp_path: Path) -> None:
    folder = write(SHAPES[shape], tmp_path)
    theirs, ours = auto(folder), load_tokenizer(folder)
    expected = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    ids = [found.tolist() for found in ours.encode_batch(TEXTS)]
    for text, one, other in zip(TEXTS, ids, expected, strict=True):
        assert one == other, repr(text)
    for text, one, whole in zip(TEXTS, ids, theirs(TEXTS)["input_ids"], strict=True):
        assert [*ours.before, *one, *ours.after] == whole, repr(text)
    plain = theirs(TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [found.tolist() for found in ours.encode_plain(TEXTS)] == plain
    assert [ours.decode(one) for one in ids] == theirs.batch_decode(expected)
    assert ours.named == theirs.special_tokens_map
    assert [ours.id_of(token) for token in theirs.all_special_tokens] == theirs.all_special_ids
    assert ours.special == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert theirs.eos_token_id in (None, ours.eos_id)
    assert ours.n_vocab == max(theirs.get_vocab().values()) + 1
    found = theirs.chat_template or {}
    assert ours.templates == ({"default": found} if isinstance(found, str) else found)


@pytest.mark.parametrize("shape", [name for name in SHAPES if "config.json" in name or "template" in name])
def test_a_saved_copy_is_the_same_tokenizer(shape: str, tmp_path: Path) -> None:
    ours = load_tokenizer(write(SHAPES[shape], tmp_path / "a"))
    (tmp_path / "b").mkdir()
    ours.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert (again.digest, again.named, again.before, again.after) == (ours.digest, ours.named, ours.before, ours.after)
    assert again.templates == ours.templates
    for text, one, other in zip(TEXTS, ours.encode_batch(TEXTS), again.encode_batch(TEXTS), strict=True):
        assert one.tolist() == other.tolist(), repr(text)


@pytest.mark.parametrize("shape", REFUSED)
def test_what_is_not_read_is_refused_by_name(shape: str, tmp_path: Path) -> None:
    files, says = REFUSED[shape]
    with pytest.raises(UserError, match=says) as refused:
        load_tokenizer(write(files, tmp_path))
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_where_files_disagree_a_note_says_which_is_taken(tmp_path: Path) -> None:
    def notes(shape: str) -> str:
        return "; ".join(load_tokenizer(write(SHAPES[shape], tmp_path / shape)).notes)

    assert "eos_token: special_tokens_map.json's '</s>' is taken, not tokenizer_config.json's '<eos>'" in notes(
        "model, Llama, map"
    )
    assert "special_tokens_map.json's '</s>'" in notes("model, Llama, map beside the decoder")
    assert "added token '<|im_start|>': id 420" in notes("model, Llama, ids that nobody has")
    assert "add_bos_token" in notes("json, BOS in the settings")
    assert "chat template: default of .jinja files" in notes("template as a file")
    assert "chat_template.json is read by processors only" in notes("template of a processor")
    assert "config.json" in notes("json, config.json qwen2, plain class")
    assert not notes("model, Llama, ChatML") and not notes("json, GPT2")


def test_the_classes_are_transformers_own(tmp_path: Path) -> None:
    from transformers.models.auto import tokenization_auto as theirs

    disagreeing = {}
    for kind, name in theirs.TOKENIZER_MAPPING_NAMES.items():
        found = theirs.tokenizer_class_from_name(name) if name else None
        expected = found.__name__ if isinstance(found, type) else name
        if kind in classes._UNCONFIGURED.split() or expected is None:
            continue
        try:
            ours = classes.class_of({}, {"model_type": kind}, False, tmp_path)
        except UserError as error:
            ours = str(error).split(": a ")[1].split(",")[0]
        if ours != expected:
            disagreeing[kind] = (ours, expected)
    assert not disagreeing
    assert set(classes._DISBELIEVED.split()) == theirs.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


def test_a_lone_sentencepiece_model_of_no_class_keeps_its_ids(tmp_path: Path) -> None:
    import sentencepiece

    for name in ("nfkc", "unigram"):
        data = getattr(SOURCES, name)
        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        (tmp_path / f"{name}.model").write_bytes(data)
        ours = load_tokenizer(tmp_path / f"{name}.model")
        (tmp_path / name).mkdir()
        ours.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        for text in TEXTS:
            if not any(marker in text for marker in ("<s>", "</s>", "<unk>")):
                assert ours.encode(text) == processor.encode(text) == again.encode(text), repr(text)
        assert "no class of transformers" in again.notes[0]


def test_settings_that_are_no_tokens_are_named(tmp_path: Path) -> None:
    for number, (settings, says) in enumerate(
        [
            ({"additional_special_tokens": 3}, "additional_special_tokens: expected a list of tokens, found 3"),
            ({"extra_special_tokens": ["a", 3]}, "extra_special_tokens: expected a list"),
            ({"added_tokens_decoder": {"400": {"content": "a", "lstrip": 3}}}, "token 'a': lstrip = 3: expected true"),
        ]
    ):
        folder = write(SHAPES["json"] | {"tokenizer_config.json": json.dumps(settings)}, tmp_path / str(number))
        with pytest.raises(UserError, match=says):
            load_tokenizer(folder)


GROWN = [
    "model, Llama",
    "model, Llama, legacy and flags",
    "model, Llama, map and added",
    "model, Llama, config.json mistral",
    "model, Gemma",
    "json, names only in the settings",
    "json, Qwen2",
    "json of a model, Llama",
    "json, config.json qwen2, plain class",
    "pair, OPT",
    "templates as files",
]


@pytest.mark.parametrize("shape", GROWN)
def test_chatml_is_added_with_the_ids_that_transformers_gives(shape: str, tmp_path: Path) -> None:
    from mlxgpt.common.sft.template import with_chatml

    before = load_tokenizer(write(SHAPES[shape], tmp_path / "a"))
    (tmp_path / "b").mkdir()
    with_chatml(before).save(tmp_path / "b")
    ours, theirs = load_tokenizer(tmp_path / "b"), auto(tmp_path / "b")
    assert ours.eos_id == theirs.eos_token_id == ours.id_of("<|im_end|>") == ours.encode("<|im_end|>")[0]
    assert ours.before == before.before and ours.named == before.named | {"eos_token": "<|im_end|>"}
    for text, one, other in zip(
        TEXTS, ours.encode_batch(TEXTS), theirs(TEXTS, add_special_tokens=False)["input_ids"], strict=True
    ):
        assert one.tolist() == other, repr(text)
        if "<|im_" not in text:
            assert one.tolist() == before.encode(text), repr(text)
    turns = [{"role": "user", "content": "it  was"}]
    assert theirs.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nit  was<|im_end|>\n"


def test_bytes_that_are_no_text_do_not_take_good_ones_with_them(tmp_path: Path) -> None:
    ours = load_tokenizer(write(SHAPES["model, Llama"], tmp_path))
    ids = [ours.id_of(f"<0x{byte:02X}>") or 0 for byte in b"q\xff\xe4\xbd\xa0\xe4\xbd!"]
    assert ours.decode(ids) == "q\ufffd\u4f60\ufffd\ufffd!"


@pytest.mark.parametrize("kind", ["bpe", "sp-unigram", "sp-bpe", "char"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mistral", "gemma2"])
def test_a_tokenizer_trained_here_keeps_its_ids_beside_any_model(kind: str, family: str, tmp_path: Path) -> None:
    ours = train_tokenizer(kind, [*tokenizer_folders.CORPUS, *TEXTS], 460)
    ours.save(tmp_path)
    write({"config.json": {"model_type": family}}, tmp_path)
    again = load_tokenizer(tmp_path)
    assert [one.tolist() for one in again.encode_batch(TEXTS)] == [one.tolist() for one in ours.encode_batch(TEXTS)]
    told = any("transformers reads this tokenizer, trained here, as Qwen2Tokenizer" in note for note in again.notes)
    assert told == (family == "qwen2" and kind != "char")
