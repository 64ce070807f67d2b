"""Tokenizers of Hugging Face folders: run by `tokenizers`, or by tiktoken where ids are provably the same."""

import functools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers import separator
from mlxgpt.common.tokenizers.fast_bpe import FastBPE, bytes_of_characters
from mlxgpt.common.tokenizers.folder import pipelines, sp_model, specification, token_bytes
from mlxgpt.common.tokenizers.folder.classes import PLAIN, class_of
from mlxgpt.common.tokenizers.protocol import EOS_NAMES, checked, read_json, sha256_of, write_files

EOS = "<|endoftext|>"
_MAX_ID = 1 << 22  # `tokenizers` counts through all ids, also those that no token has
_SHORT = 1 << 17  # characters: a single shorter text is not worth the proof of the fast way


class JsonTokenizer:
    """A tokenizer run by `tokenizers`: a tokenizer.json, tokenizer.model or vocab.json with merges.txt.

    Args:
        files: name -> bytes, with the settings that lie beside.
        where: the folder, for messages.
        model: the folder's config.json, whose model_type has a say in the class.

    Raises:
        UserError: a damaged file, or what ``specification.read`` refuses.
    """

    ends: frozenset[int] = frozenset()

    def __init__(self, files: dict[str, bytes], where: Path, model: dict | None = None) -> None:
        self.files, self._where = files, where
        content = read_json(files, "tokenizer.json", where)
        spec = specification.read(files, where, model, content)
        source = next(name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if name in files)
        try:
            made = self._made(source, spec, content)
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as error:  # a panic of its Rust is no Exception
            reason = " ".join(str(error).split())
            read_by = "`tokenizers`" if spec.class_name == PLAIN else spec.class_name
            raise UserError(f"{where / source}: not a tokenizer that {read_by} reads: {reason}") from None
        self.backend = backend = made.backend
        self._plain, self._alone = backend.encode_special_tokens, threading.Lock()
        # A stored limit would cut long texts without a word.
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab()
        if not 0 <= max(vocabulary.values(), default=-1) < _MAX_ID:
            found = max(vocabulary.values(), default="none")
            raise UserError(f"{where / source}: largest id {found}: expected tokens, with ids below {_MAX_ID}")
        self.n_vocab = max(vocabulary.values()) + 1
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self.named = {name: str(token) for name, token in made.named.items()}
        named = vocabulary.get(self.named.get("eos_token", ""))
        known = (vocabulary[name] for name in EOS_NAMES if name in vocabulary)
        self.eos_id = named if named is not None else next(known, None)
        self.before, self.after = around(_part(backend.post_processor))
        kind = type(backend.model).__name__
        over_bytes = kind == "BPE" and type(backend.decoder).__name__ == "ByteLevel"
        self.kind = "SentencePiece" if source == "tokenizer.model" else "byte-level BPE" if over_bytes else kind
        self.notes = [*spec.notes, *specification.template_notes(files, where), *self._overruled(spec, source, content)]
        self._tidy = spec.settings.get("clean_up_tokenization_spaces") is True and (
            kind != "BPE" or spec.settings.get(_TIDY_BPE) is True
        )
        if spec.saved_class:
            settings = read_json(files, "tokenizer_config.json", where) | {"tokenizer_class": spec.saved_class}
            self.files = files | {"tokenizer_config.json": json.dumps(settings, indent=1).encode()}

    def _made(self, source: str, spec: specification.Specification, content: dict) -> pipelines.Made:
        """The backend and its names; sets ``digest``."""
        data = self.files[source]
        if source == "tokenizer.json":
            self.digest = sha256_of(b"tokenizer.json", separator.taken_out(data))
            return pipelines.of_json(spec, data, content)
        if source == "tokenizer.model":
            self.digest = sha256_of(b"tokenizer.model", data)
            model = sp_model.read(data)
            if spec.class_name == PLAIN and model.kind == sp_model.UNIGRAM and spec.added:
                raise UserError(
                    f"{self._where}: tokens added to a unigram tokenizer.model that no class of transformers reads: "
                    "expected a tokenizer_class in tokenizer_config.json, or a tokenizer.json"
                )
            return pipelines.of_model(spec, model)
        vocabulary, merges = gpt2_files(self.files, self._where)
        plain = _byte_level(models.BPE(vocab=vocabulary, merges=merges))
        plain.add_special_tokens([name for name in EOS_NAMES if name in vocabulary][:1])
        self.digest = sha256_of(b"tokenizer.json", plain.to_str(pretty=True).encode())
        return pipelines.of_pair(spec, vocabulary, merges)

    def _overruled(self, spec: specification.Specification, source: str, content: dict) -> list[str]:
        """Notes on what the settings say and the tokenizer is not."""
        notes = []
        for flag, side, name in (
            ("add_bos_token", self.before, "bos_token"),
            ("add_eos_token", self.after, "eos_token"),
        ):
            token = self.named.get(name)
            if token and bool(spec.flags.get(flag, self.id_of(token) in side)) != (self.id_of(token) in side):
                puts = "puts" if self.id_of(token) in side else "does not put"
                notes.append(f"{flag} = {spec.flags[flag]}: {source} is taken, which {puts} {token} there")
        for number, token in sorted(spec.added.items(), key=lambda item: item[0]):
            found = self.id_of(token.content)
            if found != number:
                notes.append(f"added token {token.content!r}: id {found}, whatever the settings say ({number})")
        if source == "tokenizer.json" and spec.class_name != PLAIN:
            parts = {"normalizer": self.backend.normalizer, "pre_tokenizer": self.backend.pre_tokenizer}
            other = [name for name, part in parts.items() if _differ(content.get(name), _part(part))]
            if other:
                notes.append(f"tokenizer.json's {' and '.join(other)}: not taken, {spec.class_name} has its own")
        return notes

    @functools.cached_property
    def fast(self) -> FastBPE | None:
        """tiktoken's twin of this tokenizer, if its ids are provably the same; proving takes up to a second."""
        return FastBPE.of(self.backend)

    @property
    def templates(self) -> dict[str, str]:
        """Chat templates by name."""
        return specification.chat_templates(self.files, self._where)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact text."""
        return self.backend.token_to_id(token)

    def token_of(self, i: int) -> str | None:
        """The exact text of a token by its id, as the vocabulary has it."""
        return self.backend.id_to_token(i)

    def bytes_of(self, i: int) -> bytes:
        """What a token contributes in the middle of a text."""
        token = self.backend.id_to_token(i) if i >= 0 else None
        return self._spelled(token) if token is not None else b""

    @functools.cached_property
    def _spelled(self) -> Callable[[str], bytes]:
        return token_bytes.speller(_part(self.backend.decoder))

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
        return self._slow(texts, True)

    def _slow(self, texts: Sequence[str], plain: bool = False) -> list[np.ndarray]:
        try:
            with self._alone:  # one setting of the backend for all threads
                self.backend.encode_special_tokens = plain or self._plain
                encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # what `tokenizers` raises where a text has no tokens
            raise UserError(
                self._missing(texts) or f"this {self.kind} tokenizer cannot encode the text: {error}"
            ) from None
        return [np.asarray(item.ids, dtype=np.int32) for item in encoded]

    def _missing(self, texts: Sequence[str]) -> str | None:
        """The first word or character of ``texts`` that a table of words has no token for."""
        words = self.backend.pre_tokenizer
        if self.kind != "WordLevel" or words is None:
            return None
        added = {str(token) for token in self.backend.get_added_tokens_decoder().values()}
        for text in texts:
            for word, (start, _) in words.pre_tokenize_str(text):
                if self.id_of(word) is None and not any(word in token for token in added):
                    what = f"character {word!r} (U+{ord(word):04X})" if len(word) == 1 else f"{word!r}"
                    return f"{what} at position {start}: expected one of the tokenizer's {self.n_vocab} entries"
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """The text; ids outside the vocabulary are left out."""
        text = self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        if "\ufffd" in text and self._bytes:
            tokens = [token for i in ids if (token := self.backend.id_to_token(int(i))) is not None]
            text = self.backend.decoder.decode(self._without_bad_bytes(tokens))
        return functools.reduce(lambda made, pair: made.replace(*pair), _TIDIED, text) if self._tidy else text

    @functools.cached_property
    def _bytes(self) -> dict[str, int]:
        """Tokens that stand for a byte, such as <0x0A>, where the decoder joins them."""
        if "ByteFallback" not in json.dumps(_part(self.backend.decoder)):
            return {}
        return {f"<0x{byte:02X}>": byte for byte in range(256)}

    def _without_bad_bytes(self, tokens: list[str]) -> list[str]:
        """Bytes that are no UTF-8 as U+FFFD each: `tokenizers` would give up on good ones beside them, too."""
        at = 0
        while at < len(tokens):
            end = at
            while end < len(tokens) and tokens[end] in self._bytes:
                end += 1
            try:
                bytes(self._bytes[token] for token in tokens[at:end]).decode()
                at = end + 1
            except UnicodeDecodeError as error:
                tokens[at + error.start : at + error.end] = ["\ufffd"] * (error.end - error.start)
                at += error.end
        return tokens

    def save(self, folder: Path) -> None:
        """Writes the files that the tokenizer was loaded from or made as, byte for byte."""
        write_files(folder, self.files)


def _differ(one: dict | None, other: dict | None) -> bool:
    """Whether two parts of a tokenizer.json say different things; offsets are of no interest here."""
    loose = [{key: value for key, value in (part or {}).items() if key != "trim_offsets"} for part in (one, other)]
    return loose[0] != loose[1]


_TIDY_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
# What transformers' clean_up_tokenization_spaces does to a decoded text.
_TIDIED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def _part(part: Any) -> dict | None:
    """A normalizer or the like as tokenizer.json has it."""
    return json.loads(part.__getstate__()) if part is not None else None


def around(processor: dict | None) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer.json's post_processor puts before and after one text."""
    before, after = [], []
    kind = (processor or {}).get("type")
    if processor and kind == "Sequence":
        for one in processor["processors"]:
            more = around(one)
            before, after = more[0] + before, after + more[1]
    elif processor and kind in ("BertProcessing", "RobertaProcessing"):
        before, after = [processor["cls"][1]], [processor["sep"][1]]
    elif processor and kind == "TemplateProcessing":
        side = before
        for piece in processor["single"]:
            if "Sequence" in piece:
                side = after
            else:
                side += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return before, after


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


def made_of_bytes() -> JsonTokenizer:
    """The tokenizer whose ids are the bytes of the text in UTF-8."""
    return made(_byte_level(models.BPE(vocab=bytes_of_characters(), merges=[])), {"add_prefix_space": False})


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


def gpt2_files(files: dict[str, bytes], where: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of vocab.json + merges.txt, or of the same as encoder.json + vocab.bpe.

    Raises:
        UserError: a damaged file.
    """
    vocabulary_name, merges_name = (
        ("vocab.json", "merges.txt") if "vocab.json" in files else ("encoder.json", "vocab.bpe")
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
    return vocabulary, merges


def from_gpt2_files(files: dict[str, bytes], where: Path, model: dict | None = None) -> JsonTokenizer:
    """GPT-2's original pair: as the class that the settings name, or as GPT-2's where they name none.

    Raises:
        UserError: a damaged file, or a class that reads no such pair.
    """
    settings = read_json(files, "tokenizer_config.json", where)
    name = class_of(settings, model or {}, False, where)
    if name != PLAIN and "vocab.json" in files:
        if not pipelines.CLASSES[name].pair:
            raise UserError(f"{where}: vocab.json of a {name}: expected a tokenizer.json or a tokenizer.model")
        return JsonTokenizer(files, where, model)
    if settings.get("tokenizer_class") not in (None, "PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise UserError(
            f"{where}: vocab.json of a {settings['tokenizer_class']}: expected a tokenizer.json, which says how it "
            "splits text"
        )
    vocabulary, merges = gpt2_files(files, where)
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=merges))
    special = [name for name in EOS_NAMES if name in vocabulary][:1]
    backend.add_special_tokens(special)
    settings = {"bos_token": special[0], "eos_token": special[0], "unk_token": special[0]} if special else {}
    return made(backend, settings | {"add_prefix_space": False})
