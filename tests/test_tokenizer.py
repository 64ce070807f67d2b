"""Tokenizers: exact round trips, the same ids in transformers, files kept as they were, damaged files refused."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.fast_bpe import FastBPE
from mlxgpt.common.tokenizers.hf import JsonTokenizer
from mlxgpt.common.tokenizers.load import KINDS, has_tokenizer, load_tokenizer, train_tokenizer
from mlxgpt.common.tokenizers.protocol import StreamDecoder, Tokenizer, cut_before_space

PROSE = (
    "It was the best of times, it was the worst of times; it was the age of wisdom.\n\n"
    "def mean(xs):\n    return sum(xs) / len(xs)  # 3.14\n\tna\u00efve caf\u00e9, "
    "\u4f60\u597d\uff0c\u4e16\u754c! \U0001f525\r\n"
    "We'll say they don't: 'tis 12 o'clock...   three   spaces \u00bd \u2167.\n"
) * 6
HARD = [
    "",
    " ",
    "  two before",
    "two after  ",
    "\n\n\n",
    "\r\n\t x",
    "na\u00efve \u4f60\u597d \U0001f525\u200d\u2764",
    "'S 'RE it's I'LL",
    "a<|endoftext|>b",
    "</s><s> <unk>",
    "\x00\x01\u2028\u0085\u00a0\u3000z",
    PROSE,
]


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(kind, ["".join(HARD), PROSE], 420) for kind in KINDS}


@pytest.fixture(scope="module")
def bpe(trained: dict[str, Tokenizer]) -> JsonTokenizer:
    tokenizer = trained["bpe"]
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


def texts(tokenizer: Tokenizer) -> list[str]:
    rng = random.Random(0)
    cuts = [sorted((rng.randrange(len(PROSE)), rng.randrange(len(PROSE)))) for _ in range(40)]
    return HARD + [PROSE[a:b] for a, b in cuts]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(trained: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = trained[kind]
    unseen = [] if kind == "char" else ["\u0b95\u0bcd \u00de\u2603 \ufffd unseen", "".join(map(chr, range(1, 0x2580)))]
    for text in texts(tokenizer) + unseen:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < tokenizer.n_vocab
        assert tokenizer.encode_batch([text, text])[1].tolist() == ids


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids(trained: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained[kind].save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(trained[kind]):
        assert theirs(text)["input_ids"] == trained[kind].encode(text), repr(text)
        assert theirs.decode(trained[kind].encode(text)) == text
    assert theirs.eos_token_id == trained[kind].eos_id


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(trained: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    ours = trained[kind]
    assert not has_tokenizer(tmp_path)
    ours.save(tmp_path)
    assert has_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(ours)
    assert (loaded.digest, loaded.n_vocab, loaded.eos_id) == (ours.digest, ours.n_vocab, ours.eos_id)
    assert loaded.encode(PROSE) == ours.encode(PROSE)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_gives_the_whole_text(trained: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = trained[kind]
    for text in [*texts(tokenizer), "\u4f60\u597d" * 200, "\U0001f525" * 100]:
        if kind == "char" and not set(text) <= set("".join(HARD)):
            continue
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.add(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) + decoder.flush() == text
        assert all("\ufffd" not in piece for piece in pieces)


def test_streaming_of_bytes_that_are_no_text_does_not_stall(trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained["bpe"]
    rng = random.Random(1)
    for _ in range(20):
        ids = [rng.randrange(tokenizer.n_vocab) for _ in range(200)]
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.add(i) for i in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
        assert len("".join(pieces)) >= len(tokenizer.decode(ids)) - 12


def test_unknown_character_is_named(trained: dict[str, Tokenizer]) -> None:
    with pytest.raises(UserError, match=r"'\u2603' \(U\+2603\) at position 3"):
        trained["char"].encode("abc\u2603")


@pytest.mark.parametrize("kind", ["bpe", "sp-bpe", "sp-unigram"])
def test_half_a_surrogate_pair_is_named(trained: dict[str, Tokenizer], kind: str) -> None:
    with pytest.raises(UserError, match=r"position 1: '\\udc80'"):
        trained[kind].encode("a\udc80")


def test_char_numbers_characters_as_nanogpt_does() -> None:
    text = "hello\n world"
    expected = {c: i for i, c in enumerate(sorted(set(text)))}
    assert train_tokenizer("char", [text[:4], text[4:]], 0).encode(text) == [expected[c] for c in text]


def test_special_tokens_in_text_are_special(trained: dict[str, Tokenizer]) -> None:
    bpe = trained["bpe"]
    assert bpe.encode("<|endoftext|>") == [bpe.eos_id]
    assert trained["sp-bpe"].encode("</s>") == [trained["sp-bpe"].eos_id] == trained["sp-unigram"].encode("</s>")


def test_training_is_deterministic_and_says_what_is_too_small() -> None:
    again = [train_tokenizer("bpe", [PROSE, HARD[6]], 300).digest for _ in range(2)]
    assert again[0] == again[1]
    for kind, size in (("bpe", 256), ("sp-bpe", 100), ("sp-unigram", 100)):
        with pytest.raises(UserError, match=f"vocabulary of {size}"):
            train_tokenizer(kind, [PROSE], size)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer("bpe", ["", ""], 300)
    with pytest.raises(UserError, match="expected one of char, bpe"):
        train_tokenizer("bpee", [PROSE], 300)


# The fast path


def test_fast_path_is_taken_and_equals_tokenizers_on_every_kind_of_character(bpe: JsonTokenizer) -> None:
    assert bpe.fast is not None
    seen: dict[str, int] = {}
    samples = []
    for point in range(0x110000):
        category = unicodedata.category(chr(point))
        seen[category] = seen.get(category, 0) + 1
        if category != "Cs" and (category in ("Zs", "Zl", "Zp", "Cc", "Nl") or seen[category] % 211 == 1):
            samples.append("a{0}1{0}!{0}  {0} {0}\n{0}'s".format(chr(point)))
    slow = bpe.backend.encode_batch(samples, add_special_tokens=False)
    for text, ids, expected in zip(samples, bpe.encode_batch(samples), slow, strict=True):
        assert ids.tolist() == expected.ids, ascii(text)


def test_fast_path_survives_long_texts_and_endless_spaces(bpe: JsonTokenizer) -> None:
    for text in (PROSE * 300, " " * 600_000 + "x", "ab" * 200_000):
        assert bpe.encode_batch([text])[0].tolist() == bpe.backend.encode(text, add_special_tokens=False).ids


def test_pieces_of_a_long_text_are_cut_where_words_end() -> None:
    pieces = cut_before_space(PROSE, 100)
    assert pieces is not None
    assert "".join(pieces) == PROSE and max(map(len, pieces)) <= 100
    assert all(piece[0] in " \n\t\r" for piece in pieces[1:])
    assert cut_before_space("x" * 300, 100) is None


def damaged(bpe: JsonTokenizer, change: str) -> tokenizers.Tokenizer:
    content = json.loads(bpe.backend.to_str())
    model = content["model"]
    if change == "merges out of order":
        model["merges"][0], model["merges"][40] = model["merges"][40], model["merges"][0]
    elif change == "a token without a merge":
        model["merges"].pop(30)
    elif change == "a normalizer":
        content["normalizer"] = {"type": "NFC"}
    elif change == "another split":
        content["pre_tokenizer"]["add_prefix_space"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("change", ["merges out of order", "a token without a merge", "a normalizer", "another split"])
def test_fast_path_is_refused_where_it_is_not_proved(bpe: JsonTokenizer, change: str) -> None:
    assert FastBPE.of(damaged(bpe, "nothing")) is not None
    assert FastBPE.of(damaged(bpe, change)) is None


# Files of others


def gpt2_pair(bpe: JsonTokenizer, folder: Path, names: tuple[str, str]) -> None:
    model = json.loads(bpe.backend.to_str())["model"]
    (folder / names[0]).write_text(json.dumps(model["vocab"]))
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]) + "\n")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_pair_reads_as_the_tokenizer_it_is(bpe: JsonTokenizer, tmp_path: Path, names: tuple[str, str]) -> None:
    gpt2_pair(bpe, tmp_path, names)
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        loaded = load_tokenizer(path)
        assert isinstance(loaded, JsonTokenizer)
        assert (loaded.n_vocab, loaded.eos_id, loaded.fast is not None) == (bpe.n_vocab, bpe.eos_id, True)
        assert all(loaded.encode(text) == bpe.encode(text) for text in HARD)
    (tmp_path / names[1]).write_text("#version: 0.2\nx yy zz\n")
    with pytest.raises(UserError, match=f"{names[1]} line 2: 'x yy zz'"):
        load_tokenizer(tmp_path)


def test_foreign_folder_is_saved_byte_for_byte(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    trained["bpe"].save(first)
    content = json.loads((first / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (first / "tokenizer.json").write_text("\n" + json.dumps(content))
    (first / "special_tokens_map.json").write_text('{"eos_token":   "<|endoftext|>"}')
    (first / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    loaded = load_tokenizer(first)
    assert len(loaded.encode(PROSE)) > 4, "a stored limit must not cut texts"
    loaded.save(second)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_tokens_that_only_the_settings_list_are_added(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained["bpe"].save(tmp_path)
    size = trained["bpe"].n_vocab
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(size): {"content": "<|im_end|>", "special": True}}
    settings["eos_token"] = {"__type": "AddedToken", "content": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.n_vocab) == (size, size + 1)
    text = "hello<|im_end|>\nthere"
    assert loaded.encode(text) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]


def test_lone_sentencepiece_bpe_model_becomes_a_folder(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained["sp-bpe"].save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").rename(tmp_path / "spm.model")
    loaded = load_tokenizer(tmp_path / "spm.model")
    (tmp_path / "out").mkdir()
    loaded.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "spm.model").read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(theirs(text)["input_ids"] == loaded.encode(text) for text in HARD)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json: not JSON"),
        ("tokenizer.json", b"[]", "expected a JSON object, found list"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "not a tokenizer that"),
        ("tokenizer.model", b"nonsense", "not a SentencePiece model"),
        ("other.txt", b"", "no tokenizer here"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_pair_of_another_architecture_is_refused(bpe: JsonTokenizer, tmp_path: Path) -> None:
    gpt2_pair(bpe, tmp_path, ("vocab.json", "merges.txt"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    with pytest.raises(UserError, match="GemmaTokenizer: expected a tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such tokenizer file or folder"):
        load_tokenizer(tmp_path / "missing")
