"""Tokenizers of home-made projects: the same ids, here, in the folder that is written, and in AutoTokenizer."""

import base64
import json
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert.adopt import tokens
from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.char import CharTokenizer
from mlxgpt.common.tokenizers.foreign import plain, ranks
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

TEXT = "hello world, it's me!\n\tyes  ok. \u00e9\U0001f600"
CHARS = sorted(set(TEXT), key=lambda c: ord(c) * 7919 % 101)  # in no order
STOI = {c: i for i, c in enumerate(CHARS)}
ITOS = dict(enumerate(CHARS))
N = len(CHARS)
GPT4 = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+"""
    r"(?!\S)|\s"
)
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CORPUS = (
    "The quick brown fox's 12345 dogs don't jump over 987 lazy cats.\n\n    return x_1 + [3.5, -2]  # caf\u00e9\n" * 20
)


def find(extras: Any, rows: int = N, place: Path = Path("/none"), given: Any = None) -> tuple[Tokenizer, list[str]]:
    tokenizer, notes = tokens.find(extras, place / "x.pt", given and str(given), rows)
    assert tokenizer is not None, notes
    return tokenizer, notes


def refused(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def saved(tokenizer: Tokenizer, place: Path, texts: list[str]) -> Tokenizer:
    """The tokenizer, after its files gave the same ids here and in transformers."""
    from transformers import AutoTokenizer

    place.mkdir()
    tokenizer.save(place)
    again, theirs = load_tokenizer(place), AutoTokenizer.from_pretrained(place)
    for text in texts:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == again.decode(ids) == theirs.decode(ids)
    assert again.eos_id == tokenizer.eos_id == theirs.eos_token_id
    return again


# tables of characters


@pytest.mark.parametrize(
    ("extras", "where"),
    [
        ({"stoi": STOI, "itos": ITOS}, "x.pt: stoi"),
        ({"config": {"n_head": 4, "n_layer": 2, "vocab": "".join(CHARS)}}, "x.pt: config.vocab"),
        ({"tokenizer": {"char2idx": STOI}}, "x.pt: tokenizer.char2idx"),
        ({"meta": {"idx_to_char": {str(i): c for i, c in ITOS.items()}}}, "x.pt: meta.idx_to_char"),
        ({"hparams": {"Chars": CHARS}}, "x.pt: hparams.Chars"),
        ({"int_to_str": ITOS, "chars": sorted(CHARS)}, "x.pt: int_to_str"),
        ({"zeichen": STOI}, "x.pt: zeichen"),
        ({"zeichen": tuple(CHARS), "vocab": N}, "x.pt: zeichen"),
    ],
)  # fmt: skip
def test_a_table_in_the_checkpoint_keeps_its_ids(extras: Any, where: str) -> None:
    tokenizer, notes = find(extras)
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.encode(TEXT) == [STOI[c] for c in TEXT]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert notes == [f"tokenizer: {where}: char, {N} tokens"]


@pytest.mark.parametrize("protocol", range(6))
def test_meta_pkl_beside_the_checkpoint(protocol: int, tmp_path: Path) -> None:
    content = {"vocab_size": N, "itos": ITOS, "stoi": STOI, "more": [(1, 2.5), None, True, {"a": b"b"}, {1, 2}]}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    tokenizer, notes = find({}, N + 3, tmp_path)
    assert tokenizer.encode(TEXT) == [STOI[c] for c in TEXT]
    assert f"ids from {N} on have no text" in notes[1] and str(tmp_path / "meta.pkl") in notes[0]


def test_meta_pkl_where_nanogpt_has_it(tmp_path: Path) -> None:
    data = tmp_path / "data" / "shakespeare_char"
    (tmp_path / "out").mkdir()
    data.mkdir(parents=True)
    (data / "meta.pkl").write_bytes(pickle.dumps({"itos": ITOS}))
    tokenizer, _ = find({"config": {"dataset": "shakespeare_char"}}, N, tmp_path / "out")
    assert tokenizer.encode("yes") == [STOI[c] for c in "yes"]
    outside = {"config": {"dataset": "../data/shakespeare_char"}}
    assert tokens.find(outside, tmp_path / "out" / "x.pt", None, N)[0] is None


def test_marks_gaps_and_the_unknown(tmp_path: Path) -> None:
    table = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {c: i + 5 for i, c in enumerate(CHARS)}
    tokenizer, notes = find({"stoi": table}, 64)
    assert tokenizer.encode(TEXT) == [table[c] for c in TEXT]
    assert tokenizer.encode("<bos>yZ<eos>") == [1, table["y"], 3, 2]
    assert (tokenizer.eos_id, tokenizer.special, tokenizer.decode([4, 5])) == (2, {0, 1, 2, 3, 4}, f"<|4|>{CHARS[0]}")
    assert tokenizer.named == {
        "eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>",
    }  # fmt: skip
    assert "ids without text: 4; here <|4|> and so on" in notes and "what the table lacks becomes <unk>" in notes
    again = saved(tokenizer, tmp_path / "t", [TEXT, "<bos>yZ<eos>"])
    assert again.digest == tokenizer.digest


def test_makemore_counts_characters_from_one(tmp_path: Path) -> None:
    tokenizer, notes = find({"stoi": {c: i + 1 for i, c in enumerate(CHARS)}, "chars": CHARS}, N + 1)
    assert tokenizer.encode(TEXT) == [STOI[c] + 1 for c in TEXT]
    assert (tokenizer.eos_id, tokenizer.decode([0, STOI["m"] + 1, 0])) == (0, "<|endoftext|>m<|endoftext|>")
    assert any("as it begins and ends a name in makemore" in note for note in notes)
    saved(tokenizer, tmp_path / "t", [TEXT])
    dotted = {".": 0} | {c: i for i, c in enumerate("abc", 1)}
    assert find({"itos": {i: c for c, i in dotted.items()}}, 4)[0].encode(".cab.") == [0, 3, 1, 2, 0]


def test_a_character_that_no_table_has_is_named() -> None:
    for extras in ({"stoi": STOI}, {"stoi": {c: i + 1 for c, i in STOI.items()}}):
        tokenizer, _ = find(extras, N + 1)
        assert "character 'Q' (U+0051) at position 2: expected one of" in refused(tokenizer.encode, "okQ")


@pytest.mark.parametrize(
    ("extras", "says"),
    [
        ({"stoi": {"a": 0, "b": 0}}, "id 0 is 'a' and 'b': expected one entry an id"),
        ({"itos": ["a", "b", "a"]}, "'a' has the ids 0 and 2: expected one id an entry"),
        ({"stoi": {"a": 0, "b": 64}}, "'b' has the id 64, but the model has a vocabulary of 64"),
        ({"stoi": {"a": 0, "b": -1}}, "'b' has the id -1: expected 0 to"),
        ({"stoi": {"a": 0, "b": 5000}}, "2 entries with ids up to 5000: expected fewer gaps than entries"),
        ({"stoi": {"a": 10**9}}, "'a' has the id 1000000000: expected 0 to"),
        ({"stoi": {"a": 1 << 40000}}, "'a' has the id of 40001 bits: expected 0 to"),
        ({"itos": {0: "a", 1: "\ud800"}}, "half of a surrogate pair"),
        ({"stoi": {"a": 0, "b": 1}, "itos": {0: "b", 1: "a"}}, "tables that agree; --tokenizer FILE says which"),
    ],
)
def test_tables_that_contradict_themselves_or_the_model(extras: Any, says: str) -> None:
    assert says in refused(tokens.find, extras, Path("x.pt"), None, 64 if "up to" not in says else 1 << 20)


@pytest.mark.parametrize(
    "extras", [{}, {"config": {"vocab": {"size": 12, "n": 3}}}, {"vocab": 65}, {"stoi": {}}, {"args": {"lr": "abc"}}]
)
def test_settings_are_no_table(extras: Any) -> None:
    assert tokens.find(extras, Path("/none/x.pt"), None, 64) == (
        None,
        ["no tokenizer in it; --tokenizer FILE adds one"],
    )
    notes = tokens.find(extras, Path("/none/x.pt"), None, 50304)[1]
    assert notes[0].endswith("(a vocabulary of 50304 is often that of --tokenizer gpt2)")


def test_a_file_beside_that_cannot_be_it_is_said(tmp_path: Path) -> None:
    written(tmp_path / "vocab.json", {c: i for i, c in enumerate(CHARS)})
    written(tmp_path / "stoi.json", {"aa": 0, "bb": 1})
    tokenizer, notes = find({}, N, tmp_path)
    assert tokenizer.n_vocab == N and "not taken" in notes[0] and "stoi.json: 2 entries of several" in notes[0]
    written(tmp_path / "vocab.json", '{"a": 0, "b": 1, "a": 2}')
    found, notes = tokens.find({}, tmp_path / "x.pt", None, N)
    assert found is None and "'a' is there twice: expected each entry once" in notes[1]


def test_the_prompt_that_is_suggested_can_be_encoded(tmp_path: Path) -> None:
    assert tokens.prompt(tmp_path) == ""
    find({"itos": dict(enumerate(".<n"))}, 3)[0].save(tmp_path)
    assert tokens.prompt(tmp_path) == "n"
    load_tokenizer("bytes").save(tmp_path)
    assert tokens.prompt(tmp_path) == "Once"


@pytest.mark.parametrize("table", [dict(enumerate("nop")), {3: "<eos>", 0: "n", 2: "p"}, dict(enumerate("ab ,"))])
def test_mlx_lm_reads_tables(table: dict[int, str], tmp_path: Path) -> None:
    from mlx_lm.tokenizer_utils import load

    tokenizer, _ = find({"itos": table}, 4)
    tokenizer.save(tmp_path)
    theirs, text = load(tmp_path), "".join(text for _, text in sorted(table.items()))
    ids = theirs.encode(text, add_special_tokens=False)
    streamed = theirs.detokenizer
    for i in ids:
        streamed.add_token(i)
    streamed.finalize()
    assert ids == tokenizer.encode(text) == sorted(table) and streamed.text == text


# tables of words


def words(text: str) -> list[str]:
    """How LLMs-from-scratch's first tokenizers split a text."""
    return [one.strip() for one in re.split(r"""([,.:;?_!"()']|--|\s)""", text) if one.strip()]


def test_words_and_punctuation(tmp_path: Path) -> None:
    text = "Hello, do you like tea? -- In the (sunlit) terraces of \"the\" palace's don't--stop. a_b"
    table = {word: i for i, word in enumerate([*sorted(set(words(text))), "<|endoftext|>", "<|unk|>"])}
    path = written(tmp_path / "v.json", {"split": "words", "str_to_int": table})
    tokenizer, notes = find({}, 64, tmp_path, path)
    ids = [table[word] for word in words(text)]
    assert tokenizer.encode(text) == ids
    expected = re.sub(r"""\s+([,.?!"()'])""", r"\1", " ".join(words(text)))
    assert tokenizer.decode(ids) == expected
    unknown, end = table["<|unk|>"], table["<|endoftext|>"]
    assert tokenizer.encode("Hello zebra <|endoftext|> tea\x1cthe") == [
        table["Hello"], unknown, end, table["tea"], table["the"],
    ]  # fmt: skip
    assert "a text is split into words" in notes
    saved(tokenizer, tmp_path / "t", [text, "Hello zebra <|endoftext|> tea"])


def test_words_between_spaces(tmp_path: Path) -> None:
    text = "the  cat\tsat\non the\x1dmat, the\u00a0end"
    table = {word: i for i, word in enumerate(dict.fromkeys(text.split()))}
    path = written(tmp_path / "v.json", {"split": "spaces", "vocab": table})
    tokenizer = saved(find({}, 64, tmp_path, path)[0], tmp_path / "t", [text])
    assert tokenizer.encode(text) == [table[word] for word in text.split()]
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())
    assert "'dog' at position 4: expected one of the tokenizer's" in refused(tokenizer.encode, "the dog")


def test_words_without_a_split_are_refused_or_left(tmp_path: Path) -> None:
    table = {"the": 0, "cat": 1, ",": 2}
    found, notes = tokens.find({"vocab": table}, Path("/none/x.pt"), None, 3)
    assert found is None and "2 entries of several characters, such as 'the'" in notes[0] and '"split": S' in notes[0]
    assert "says how a text is split" in refused(load_tokenizer, written(tmp_path / "words.json", table))
    path = written(tmp_path / "v.json", {"split": "syllables", "stoi": table})
    assert "split 'syllables': expected one of characters, spaces, words" in refused(load_tokenizer, path)


def test_vocab_txt(tmp_path: Path) -> None:
    path = written(tmp_path / "vocab.txt", "<pad>\na\nb\n \n")
    assert load_tokenizer(path).encode("ab a") == [1, 2, 3, 1]
    written(path, "[PAD]\n[UNK]\n[CLS]\na\n##a\n")
    assert "BERT's WordPiece" in refused(load_tokenizer, path)


# pickles


class Own:
    def __init__(self) -> None:
        self.stoi = STOI


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickled_class_is_named_and_not_made(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps({"tokenizer": Own()}, protocol=protocol))
    said = refused(load_tokenizer, path)
    assert "holds " in said and "test_adopt_tokens.Own, code that is not run" in said and "json.dump" in said


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "holds os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06sy\ntem\x93.", "holds os.sy tem"),
        (b"\x80\x04Pa\n.", "the opcode PERSID"),
        (b"\x80\x02\x82\x01.", "the opcode EXT1"),
        (b"\x80\x04}r\xff\xff\xff\x7f.", "no table"),  # a memo of 2 GiB of places
        (b"\x80\x04}(" + b"(" * 40000 + b"t" * 40000 + b"K\x01u.", "a key that is a tuple"),  # deep, to be hashed
        (b"\x80\x04]" + b"\x94h\x00a" * 9 + b".", "no table"),  # a list in itself
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fab.", "not a pickle"),  # a text of 2 ** 60 bytes
        (b"\x80\x04K\x01K\x02s.", "not a pickle"),
        (b"\x80\x04}K\x01e.", "not a pickle"),
        (b"\x80\x04}", "not a pickle"),
        (b"", "not a pickle"),
    ],
)  # fmt: skip
def test_hostile_pickles(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(data)
    said = refused(load_tokenizer, tmp_path / "meta.pkl")
    assert says in said and len(said) < 400


def test_pickles_without_end_in_bytes_or_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"itos": ITOS}))
    monkeypatch.setattr(plain, "_MOST", 10)
    assert "more than 10 values" in refused(load_tokenizer, path)
    monkeypatch.setattr(plain, "_LONGEST", 10)
    assert "expected at most 10" in refused(load_tokenizer, path)


def test_a_table_in_what_torch_saved(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "c.pt"
    model = torch.nn.Linear(2, 2)
    state = {"model": model.state_dict(), "dtype": torch.float32, "shape": torch.Size([2]), "config": {"stoi": STOI}}
    torch.save(state | {"weight": model.weight, "half": torch.zeros(2, dtype=torch.bfloat16)}, path)
    assert load_tokenizer(path).encode(TEXT) == [STOI[c] for c in TEXT]
    torch.save({"stoi": STOI, "model": model}, path)
    assert "holds torch.nn.modules.linear.Linear, code that is not run" in refused(load_tokenizer, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    assert "a zip file without one data.pkl" in refused(load_tokenizer, path)


# bytes, tiktoken, minbpe


def test_a_byte_an_id(tmp_path: Path) -> None:
    text = "na\u00efve\r\n \x00\x1c\U0001f600 <|endoftext|>"
    tokenizer = saved(load_tokenizer("bytes"), tmp_path / "t", [text])
    assert tokenizer.encode(text) == list(text.encode()) and tokenizer.n_vocab == 256
    assert tokenizer.decode([0xFF, 65, 0xC3]) == "\ufffdA\ufffd"


@pytest.fixture(scope="module")
def learned() -> dict[bytes, int]:
    """Ranks of a small byte-level BPE, bytes first."""
    files = train_tokenizer("bpe", [CORPUS], 400).files
    model = json.loads(files["tokenizer.json"])["model"]
    made = {bytes([byte]): byte for byte in range(256)}
    of = {c: byte for byte, c in ((one[0], ranks.written(one)) for one in made)}
    for pair in model["merges"]:
        made[bytes(of[c] for c in "".join(pair if isinstance(pair, list) else pair.split(" ")))] = len(made)
    return made


def samples() -> list[str]:
    """Texts that words, numbers, spaces and odd characters make."""
    rng = random.Random(0)
    parts = [
        "don't",
        "'LL",
        "'\u017f",
        "fox",
        " The",
        "12345",
        "\n\n",
        "  ",
        "\t",
        "\r\n",
        "caf\u00e9",
        "\u4f60\u597d",
        "_x",
        "+=[",
        "!",
    ]
    parts += ["\u01c5", "a\u0301", "\u2028", "\U0001f600", "quick", " brown", "987", "  \n", "\x1c"]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 30))) for _ in range(100)] + [CORPUS]


@pytest.mark.parametrize("pattern", [GPT2, GPT4, GPT4.replace("{1,3}+", "{1,2}")], ids=["gpt2", "gpt4", "nanochat"])
def test_an_encoding_of_tiktoken(pattern: str, learned: dict[bytes, int], tmp_path: Path) -> None:
    import tiktoken

    special = {"<|endoftext|>": 600, "<|fim|>": 605}  # with ids free below them, as cl100k_base has
    whole = b"zebras!?"  # no merges make it: a token for a word that is exactly it
    with_whole = learned | {b"zebra": len(learned), whole: len(learned) + 1}
    for table in (learned, with_whole):
        peer = tiktoken.Encoding("p", pat_str=pattern, mergeable_ranks=table, special_tokens=special)
        (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(peer))  # as nanochat has it
        tokenizer = load_tokenizer(tmp_path / "tokenizer.pkl")
        texts = [*samples(), "a<|endoftext|>b <|fim|>", "zebra zebras!? zebra"]
        assert [tokenizer.encode(text) for text in texts] == [peer.encode(t, allowed_special="all") for t in texts]
        assert (tokenizer.eos_id, tokenizer.n_vocab, tokenizer.special) == (600, 606, {600, 605})
    saved(tokenizer, tmp_path / "t", texts)


def test_a_file_of_ranks_is_split_as_its_name_says(learned: dict[bytes, int], tmp_path: Path) -> None:
    import tiktoken

    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in learned.items()]
    path = tmp_path / "mine.cl100k_base.tiktoken"
    path.write_bytes(b"\n".join(lines))
    peer = tiktoken.Encoding("p", pat_str=GPT4, mergeable_ranks=learned, special_tokens={})
    assert [load_tokenizer(path).encode(text) for text in samples()] == [peer.encode(text) for text in samples()]
    said = refused(load_tokenizer, path.rename(tmp_path / "mine.tiktoken"))
    assert "nothing that says how a text is split" in said and "mine.cl100k_base.tiktoken" in said
    path.write_bytes(b"\n".join(lines[1:]))
    assert "no rank for the byte 0" in refused(load_tokenizer, path)
    path.write_bytes(b"\n".join([*lines, b"YQ== x"]))
    assert "expected base64 of a token and its rank" in refused(load_tokenizer, path)
    path.write_bytes(b"\n".join([*lines, lines[0]]))
    assert "is there twice" in refused(load_tokenizer, path)


def test_a_name_of_tiktoken(learned: dict[bytes, int], monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken
    import tiktoken.load

    peer = tiktoken.Encoding("gpt2", pat_str=GPT2, mergeable_ranks=learned, special_tokens={"<|endoftext|>": 500})
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", {"gpt2": peer}.__getitem__)
        tokenizer, notes = find({}, 512, given="gpt2")
    assert tokenizer.encode(CORPUS) == peer.encode(CORPUS) and tokenizer.eos_id == 500
    assert notes[0] == "tokenizer: gpt2: byte-level BPE, 501 tokens"

    def offline(where: str, *_: Any) -> bytes:
        raise ConnectionError(where)

    monkeypatch.setattr(tiktoken.load, "read_file_cached", offline)
    said = refused(load_tokenizer, "o200k_base")
    assert "not in tiktoken's cache" in said and "TIKTOKEN_CACHE_DIR" in said and "o200k_base.tiktoken" in said
    assert "no such tokenizer" in refused(load_tokenizer, "gpt5")


def minbpe(text: str, pairs: list[tuple[int, int]]) -> list[int]:
    """The ids of one word as minbpe merges it: every occurrence of the earliest pair at a time."""
    ids = list(text.encode())
    for new, pair in enumerate(pairs, 256):
        at = 0
        while at < len(ids) - 1:
            if (ids[at], ids[at + 1]) == pair:
                ids[at : at + 2] = [new]
            at += 1
    return ids


def test_a_model_of_minbpe(tmp_path: Path) -> None:
    pairs = [(97, 97), (256, 97), (97, 98), (258, 99), (32, 259), (48, 49), (261, 50)]
    path = tmp_path / "basic.model"
    lines = "\n".join(f"{a} {b}" for a, b in pairs) + "\n"
    path.write_text(f"minbpe v1\n\n1\n<|endoftext|> 300\n{lines}")
    tokenizer = load_tokenizer(path)
    texts = ["aaaaaaabcaab abc aaa\u00e9\n" * 3, "01201 2abc", "a" * 17]
    for text in texts:
        assert tokenizer.encode(text) == minbpe(text, pairs)
    assert tokenizer.encode("a<|endoftext|>abc") == [97, 300, 259]
    saved(tokenizer, tmp_path / "t", texts)
    path.write_text(f"minbpe v1\n{GPT4}\n0\n{lines}")
    assert load_tokenizer(path).encode(" abc012012") == [260, 262, 262]
    for content, says in (
        (f"minbpe v1\n\n9\n<|endoftext|> 300\n{lines}", "not a .model of minbpe"),
        (f"minbpe v1\n\n0\n{lines}300 97\n", "expected two ids from 0 to 262"),
        (f"minbpe v1\n\n0\n{lines}97 256\n", "are both b'aaa'"),
        (f"minbpe v1\n\n1\n<x> 97\n{lines}", "expected ids that no other token has"),
        (f"minbpe v1\n(\n0\n{lines}", "basic.model: '('"),
    ):
        path.write_text(content)
        assert says in refused(load_tokenizer, path)


# where they are used


def test_train_convert_and_inspect_take_tables_and_names(tmp_path: Path, capsys: Any) -> None:
    text = written(tmp_path / "text.txt", "ab ba abba\n" * 200)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate("b\na "))}))
    sizes = "model.n_layer=1 model.n_head=1 model.n_embd=8 model.block_size=8 train.batch_size=2"

    def train(tokenizer: object, out: str) -> Path:
        settings = [f"data.source={text}", f"data.tokenizer={tokenizer}", *sizes.split(), "optim.warmup=0"]
        settings.append("sample.max_tokens=0")
        words = [word for setting in settings for word in ("--set", setting)]
        assert cli.main(["train", "--backend", "torch", "--out", str(tmp_path / out), "--steps", "1", *words]) == 0
        return tmp_path / out / "last"

    named = train("bytes", "bytes")
    assert cli.main(["convert", str(named), str(tmp_path / "b"), "--tokenizer", "bytes"]) == 0
    assert [load_tokenizer(place).encode("\u00e9") for place in (named, tmp_path / "b")] == [[0xC3, 0xA9]] * 2
    model = train(tmp_path / "meta.pkl", "table")
    assert load_tokenizer(model).encode("a b\n") == [2, 3, 0, 1]
    assert cli.main(["convert", str(model), str(tmp_path / "c"), "--tokenizer", str(tmp_path / "meta.pkl")]) == 0
    assert load_tokenizer(tmp_path / "c").encode("ba") == [0, 2]
    capsys.readouterr()
    assert cli.main(["tokenizer", "inspect", str(tmp_path / "meta.pkl"), "--text", "ab", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == [2, 0]
    assert cli.main(["generate", "--backend", "torch", "--model", str(tmp_path / "c"), "--prompt", "ab"]) == 0
    larger = written(tmp_path / "larger.json", list("abcdefg"))
    assert cli.main(["convert", str(model), str(tmp_path / "d"), "--tokenizer", str(larger)]) == 2
    assert "'g' has the id 6, but the model has a vocabulary of 4" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
