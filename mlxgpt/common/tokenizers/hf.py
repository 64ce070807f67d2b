"""Tokenizers that a tokenizer.json defines: run by `tokenizers`, or by tiktoken where ids are provably the same."""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers import separator
from mlxgpt.common.tokenizers.fast_bpe import FastBPE
from mlxgpt.common.tokenizers.protocol import EOS_NAMES, checked, read_json, sha256_of, write_files
from mlxgpt.common.tokenizers.specification import chat_templates, named_tokens

EOS = "<|endoftext|>"
_MAX_ID = 1 << 22  # `tokenizers` counts through all ids, also those that no token has
_SHORT = 1 << 17  # characters: a single shorter text is not worth the proof of the fast way


class JsonTokenizer:
    """Any tokenizer.json, with the settings of the tokenizer_config.json beside it.

    ``files`` are what the tokenizer was loaded from, name -> bytes; ``where`` is the folder, for messages.
    """

    ends: frozenset[int] = frozenset()

    def __init__(self, files: dict[str, bytes], where: Path) -> None:
        self.files = files
        self.digest = sha256_of(b"tokenizer.json", separator.taken_out(files["tokenizer.json"]))
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of its Rust is no Exception
            reason = " ".join(str(error).split())
            raise UserError(f"{where / 'tokenizer.json'}: not a tokenizer that `tokenizers` reads: {reason}") from None
        # A stored limit would cut long texts without a word.
        self.backend.no_truncation()
        self.backend.no_padding()
        config = read_json(files, "tokenizer_config.json", where)
        _add_tokens(self.backend, config, where / "tokenizer_config.json")
        vocabulary = self.backend.get_vocab()
        if not 0 <= max(vocabulary.values(), default=-1) < _MAX_ID:
            found = max(vocabulary.values(), default="none")
            raise UserError(
                f"{where / 'tokenizer.json'}: largest id {found}: expected tokens, with ids below {_MAX_ID}"
            )
        self.n_vocab = max(vocabulary.values()) + 1
        added = self.backend.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self.eos_id = _eos(vocabulary, config, read_json(files, "special_tokens_map.json", where))
        self.before, self.after = _around(self.backend)
        self.named = named_tokens(files, where)
        if "eos_token" not in self.named and self.eos_id is not None:
            self.named["eos_token"] = self.decode([self.eos_id])
        self.notes: list[str] = []
        self._where = where
        model = type(self.backend.model).__name__
        over_bytes = model == "BPE" and type(self.backend.decoder).__name__ == "ByteLevel"
        self.kind = "byte-level BPE" if over_bytes else model

    @functools.cached_property
    def fast(self) -> FastBPE | None:
        """tiktoken's twin of this tokenizer, if its ids are provably the same; proving takes up to a second."""
        return FastBPE.of(self.backend)

    @property
    def templates(self) -> dict[str, str]:
        """Chat templates by name."""
        return chat_templates(self.files, self._where)

    @functools.cached_property
    def _splitting(self) -> tokenizers.Tokenizer:
        """The backend for which the text of special tokens is text."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact text."""
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; a special token's text gives that token."""
        many = len(checked(text)) > _SHORT
        return (self.encode_batch if many else self._slow)([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        if not self.fast:
            return self._slow(texts)
        found = [self.fast.encode(text) for text in texts]
        slow = iter(self._slow([text for text, ids in zip(texts, found, strict=True) if ids is None]))
        return [next(slow) if ids is None else ids for ids in found]

    def encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; the text of a special token is text."""
        return self._slow(texts, self._splitting)

    def _slow(self, texts: Sequence[str], backend: tokenizers.Tokenizer | None = None) -> list[np.ndarray]:
        try:
            encoded = (backend or self.backend).encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # what `tokenizers` raises where a text has no tokens
            raise UserError(f"this {self.kind} tokenizer cannot encode the text: {error}") from None
        return [np.asarray(item.ids, dtype=np.int32) for item in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; ids outside the vocabulary are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Writes the files that the tokenizer was loaded from or made as, byte for byte."""
        write_files(folder, self.files)


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text."""
    if not backend.num_special_tokens_to_add(False):
        return [], []
    try:
        whole, plain = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    except Exception:  # a vocabulary without the letter
        whole, plain = backend.encode("").ids, []
    starts = range(len(whole) - len(plain), -1, -1)
    start = next((n for n in starts if whole[n : n + len(plain)] == plain), len(whole))
    return whole[:start], whole[start + len(plain) :]


def _add_tokens(backend: tokenizers.Tokenizer, config: dict, where: Path) -> None:
    """Adds what tokenizer_config.json lists beyond tokenizer.json, as transformers does."""
    listed = config.get("added_tokens_decoder") or {}
    whole = isinstance(listed, dict) and all(key.isdecimal() and key.isascii() for key in listed)
    tokens = [token for token in listed.values() if isinstance(token, dict)] if whole else []
    if not whole or not all(isinstance(token.get("content"), str) for token in tokens):
        raise UserError(f"{where}: added_tokens_decoder: expected tokens with their content by id")
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if isinstance(token, dict) and backend.token_to_id(token["content"]) is None:
            flags = {
                name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])


def _eos(vocabulary: dict[str, int], *configs: dict) -> int | None:
    """The id of the settings' eos_token, or of a well-known name."""
    for config in configs:
        named = config.get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        if isinstance(named, str) and named in vocabulary:
            return vocabulary[named]
    return next((vocabulary[name] for name in EOS_NAMES if name in vocabulary), None)


def made(backend: tokenizers.Tokenizer, settings: dict) -> JsonTokenizer:
    """A JsonTokenizer of a backend built here, with the tokenizer_config.json that AutoTokenizer needs."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | settings
    files = {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
    }
    return JsonTokenizer(files, Path("."))


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """GPT-2's kind of tokenizer: every byte, merges learned from ``texts``, and <|endoftext|> as id 0.

    Raises:
        UserError: ``vocab_size`` below 257, the bytes and <|endoftext|>.
    """
    if vocab_size < 257:
        raise UserError(
            f"tokenizer vocabulary of {vocab_size}: expected at least 257 for byte-level BPE (256 bytes and {EOS})"
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return made(backend, {"bos_token": EOS, "eos_token": EOS, "unk_token": EOS, "add_prefix_space": False})


def from_gpt2_files(files: dict[str, bytes], where: Path) -> JsonTokenizer:
    """GPT-2's original pair: encoder.json + vocab.bpe, or the same as vocab.json + merges.txt.

    Raises:
        UserError: a damaged file, or another architecture's tokenizer, whose splitting only a tokenizer.json tells.
    """
    vocabulary_name, merges_name = (
        ("vocab.json", "merges.txt") if "vocab.json" in files else ("encoder.json", "vocab.bpe")
    )
    named = read_json(files, "tokenizer_config.json", where).get("tokenizer_class", "GPT2Tokenizer")
    if named not in ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"):
        raise UserError(
            f"{where}: {vocabulary_name} of a {named}: expected a tokenizer.json, which says how it splits text"
        )
    vocabulary = read_json(files, vocabulary_name, where)
    if not all(type(i) is int and 0 <= i < _MAX_ID for i in vocabulary.values()):
        raise UserError(f"{where / vocabulary_name}: expected ids from 0 to {_MAX_ID - 1} by token")
    try:
        lines = files[merges_name].decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where / merges_name}: not UTF-8 at byte {error.start}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.rstrip("\r").split(" ")
        if line.startswith("#version") or line.strip() == "":
            continue
        if len(pair) != 2 or any(part not in vocabulary for part in (*pair, "".join(pair))):
            raise UserError(f"{where / merges_name} line {number}: {line!r}: expected two tokens of {vocabulary_name}")
        merges.append((pair[0], pair[1]))
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=merges))
    special = [name for name in EOS_NAMES if name in vocabulary][:1]
    backend.add_special_tokens(special)
    settings = {"bos_token": special[0], "eos_token": special[0], "unk_token": special[0]} if special else {}
    return made(backend, settings | {"add_prefix_space": False})
