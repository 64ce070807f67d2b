"""The bytes of one token: joined they are the text's UTF-8, as far as the tokenizer keeps the text."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders
from test_tokenizer_folders import SHAPES, TEXTS
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from mlxgpt.common.tokenizers.folder import token_bytes
from mlxgpt.common.tokenizers.foreign.ranks import of_ranks
from mlxgpt.common.tokenizers.hf import made, made_of_bytes
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

KINDS = (
    "model", "model, nfkc", "model, unigram", "model, user-defined pieces", "model, Llama, no prefix", "model, Gemma",
    "model, T5", "json", "json, GPT2, prefix", "json, Qwen2", "json of a model", "json, T5", "pair, GPT2",
    "model, Llama, ids that nobody has",
)  # fmt: skip


def sentencepiece_alone(folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(SHAPES["model, unigram"]["tokenizer.model"])
    return load_tokenizer(folder / "tokenizer.model")


def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    if kind == "sentencepiece alone":
        return sentencepiece_alone(folder)
    if kind == "char":
        return train_tokenizer("char", TEXTS, 0)
    return load_tokenizer(tokenizer_folders.write(SHAPES[kind], folder))


@pytest.mark.parametrize("kind", [*KINDS, "sentencepiece alone", "char"])
def test_joined_bytes_are_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer, rng, kept = tokenizer_of(kind, tmp_path), random.Random(0), 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        # T5 drops white space, say; sentencepiece adds a space behind every control token
        if tokenizer.decode(ids) == text and "\ufffd" not in text and not tokenizer.special & set(ids):
            made = b"".join(map(tokenizer.bytes_of, ids))
            assert made in (text.encode(), b" " + text.encode()), text
            kept += 1
    assert kept > 5
    anchor = next(i for i in map(tokenizer.id_of, "abcde") if i is not None)
    first = tokenizer.decode([anchor])
    ordinary = [i for i in range(tokenizer.n_vocab) if i not in tokenizer.special]
    for i in range(tokenizer.n_vocab + 100):
        ids = [i] if i < tokenizer.n_vocab else rng.choices(ordinary, k=9)
        text = b"".join(map(tokenizer.bytes_of, ids)).decode("utf-8", "replace")
        # how many U+FFFD stand for bytes that are no text differs
        assert re.sub("\ufffd+", "\ufffd", first + text) == re.sub(
            "\ufffd+", "\ufffd", tokenizer.decode([anchor, *ids])
        )
    assert tokenizer.bytes_of(tokenizer.n_vocab) == tokenizer.bytes_of(-1) == tokenizer.bytes_of(1 << 31) == b""
    assert all(tokenizer.bytes_of(i) == (tokenizer.token_of(i) or "").encode() for i in tokenizer.special)
    free = [i for i in range(tokenizer.n_vocab) if tokenizer.token_of(i) is None]
    assert all(tokenizer.bytes_of(i) == b"" for i in free)


def test_known_bytes(tmp_path: Path) -> None:
    llama, over_bytes = tokenizer_of("model, Llama", tmp_path), made_of_bytes()
    ids = [llama.id_of(token) for token in ("\u2581the", "<0xE2>", "</s>", "\u2581")]
    assert [llama.bytes_of(i) for i in ids if i is not None] == [b" the", b"\xe2", b"</s>", b" "]
    assert [over_bytes.bytes_of(i) for i in over_bytes.encode("\u2603 ")] == [b"\xe2", b"\x98", b"\x83", b" "]


def test_tiktoken_gives_the_same_bytes() -> None:
    import tiktoken

    merges = [b" t", b" th", b" the", b"\xe2\x98", b"\x98\x83", b"\n\n"]
    ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *merges])}
    special = {"<|endoftext|>": len(ranks)}
    peer = tiktoken.Encoding("peer", pat_str=r"\s?\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    ours = of_ranks(ranks, r"\s?\S+|\s+", special, "test")
    assert [ours.bytes_of(i) for i in range(ours.n_vocab)] == peer.decode_tokens_bytes(list(range(peer.n_vocab)))


DECODERS: dict[str, Any] = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "metaspace": decoders.Metaspace(),
    "word piece": decoders.WordPiece(),
    "word piece, no cleanup": decoders.WordPiece(prefix="@@", cleanup=False),
    "suffix": decoders.BPEDecoder(),
    "bytes first": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "strip each": decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()]),
    "strip all": decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "replace all": decoders.Sequence([decoders.Fuse(), decoders.Replace("\u2581", "_")]),
    "nested": decoders.Sequence([decoders.Sequence([decoders.ByteLevel()]), decoders.Fuse()]),
}
TOKENS = (
    "a", "\u2581the", "\u0120the", "<0xE2>", "<0xe2>", "<0x41>", "##x", "@@y", "x</w>", "\u2581", "\u00c3", ",", ".",
    "n't", " .",
)  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_has_its_rule(name: str) -> None:
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    if DECODERS[name] is not None:
        backend.decoder = DECODERS[name]
    backend.add_tokens([AddedToken("<\u0120 \u2581>", normalized=False), AddedToken("[\u00c3(]", special=True)])
    tokenizer = made(backend, {})
    for i in range(tokenizer.n_vocab):
        text = (b"a" + tokenizer.bytes_of(i)).decode("utf-8", "replace")
        # a suffix is a space before another token only; without a decoder a space comes before every token
        assert text in (tokenizer.decode([0, i]), tokenizer.decode([0, i, 0])[:-1])
    assert token_bytes.speller(json.loads(decoders.Fuse().__getstate__()))("\u00e9") == b"\xc3\xa9"
