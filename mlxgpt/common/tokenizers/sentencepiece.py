"""SentencePiece: a tokenizer.model as it is, and training of the BPE and unigram kinds with byte fallback.

Trained here, a BPE stays a tokenizer.model, which transformers' LlamaTokenizer reads with the same ids. No class of
transformers reads a unigram model so, so a unigram becomes a tokenizer.json run by `tokenizers`, with
spaces as spaces, in which every text survives the round trip.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.folder import sp_model
from mlxgpt.common.tokenizers.folder.specification import chat_templates
from mlxgpt.common.tokenizers.hf import JsonTokenizer, made
from mlxgpt.common.tokenizers.protocol import Tokenizer, checked, read_json, sha256_of, write_files

_SPACE = "\u2581"
_SPECIAL = ("<unk>", "<s>", "</s>")
_ALONE = "SentencePiece"  # the class that marks a model without one: run by sentencepiece, wherever it is copied to
_LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}


def from_model(files: dict[str, bytes], where: Path, model: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a folder with a tokenizer.model and no tokenizer.json, as AutoTokenizer reads it.

    Raises:
        UserError: a damaged file, a tiktoken vocabulary, or what ``specification.read`` refuses.
    """
    _processor(files["tokenizer.model"], where / "tokenizer.model")
    if read_json(files, "tokenizer_config.json", where).get("tokenizer_class") == _ALONE:
        return SentencePieceTokenizer(files, where)
    return JsonTokenizer(files, where, model)


def lone_model(data: bytes, path: Path) -> Tokenizer:
    """A .model file with no settings beside it: its ids are sentencepiece's.

    With the settings of the class that gives them, where one does: LlamaTokenizer for a BPE that normalizes nothing.
    """
    processor = _processor(data, path)
    model = sp_model.read(data)
    if model.kind != sp_model.BPE or not model.as_it_is or model.trim_spaces:
        settings = {"tokenizer_class": _ALONE}
        return SentencePieceTokenizer({"tokenizer.model": data, "tokenizer_config.json": _json(settings)}, path.parent)
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    named = {name: processor.id_to_piece(i) if i >= 0 else None for name, i in ids.items()}
    settings = _LLAMA | named | {"add_prefix_space": model.add_prefix_space}
    return JsonTokenizer({"tokenizer.model": data, "tokenizer_config.json": _json(settings)}, path.parent)


def _json(settings: dict[str, Any]) -> bytes:
    return json.dumps(settings, indent=1).encode()


def _processor(data: bytes, path: Path) -> Any:
    """sentencepiece's own reading of a model.

    Raises:
        UserError: not a model, or a piece that is not UTF-8.
    """
    if _TIKTOKEN.match(data):
        raise UserError(
            f"{path}: a vocabulary of tiktoken, which does not say how it splits text: expected a tokenizer.json"
        )
    try:
        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = processor.get_piece_size()
        for i in range(size):
            processor.id_to_piece(i)
    except UnicodeDecodeError:
        raise UserError(f"{path}: a piece is not UTF-8") from None
    except RuntimeError as error:
        raise UserError(f"{path}: not a SentencePiece model: {str(error).splitlines()[0]}") from None
    if not size:
        raise UserError(f"{path}: not a SentencePiece model: it has no pieces")
    return processor


_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")


class SentencePieceTokenizer:
    """A tokenizer.model, run by sentencepiece. ``files`` are name -> bytes; ``where`` is the folder, for messages."""

    ends: frozenset[int] = frozenset()

    def __init__(self, files: dict[str, bytes], where: Path) -> None:
        self.files, self._where = files, where
        self.digest = sha256_of(b"tokenizer.model", files["tokenizer.model"])
        self._model = _processor(files["tokenizer.model"], where / "tokenizer.model")
        self.n_vocab: int = self._model.get_piece_size()
        self._pieces: dict[str, int] = {self._model.id_to_piece(i): i for i in range(self.n_vocab)}
        self.kind = "SentencePiece"
        eos: int = self._model.eos_id()
        self.eos_id: int | None = eos if eos >= 0 else None
        self.before: list[int] = []
        self.after: list[int] = []
        ids = {"bos_token": self._model.bos_id(), "eos_token": eos, "unk_token": self._model.unk_id()}
        self.named: dict[str, str] = {name: self._model.id_to_piece(i) for name, i in ids.items() if i >= 0}
        self.notes = ["tokenizer.model alone: run by sentencepiece; no class of transformers gives its ids"]
        self._controls = {
            self._model.id_to_piece(i): i
            for i in range(self.n_vocab)
            if self._model.is_control(i) or self._model.is_unknown(i)
        }
        self._names = {i: text for text, i in self._controls.items()}
        self.special = frozenset(self._names)
        found = "|".join(re.escape(text) for text in sorted(self._controls, key=len, reverse=True))
        self._control = re.compile(f"({found})") if found else None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; the text of a control token such as </s> gives that token."""
        return self.encode_batch([checked(text)])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32."""
        return [np.asarray(self._ids(text), dtype=np.int32) for text in texts]

    def encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32; the text of a control token is text."""
        return [np.asarray(self._model.encode(text), dtype=np.int32) for text in texts]

    @property
    def templates(self) -> dict[str, str]:
        """Chat templates by name."""
        return chat_templates(self.files, self._where)

    def id_of(self, token: str) -> int | None:
        """The id of a piece by its exact text."""
        return self._pieces.get(token)

    def token_of(self, i: int) -> str | None:
        """The exact text of a piece by its id."""
        return self._model.id_to_piece(i) if 0 <= i < self.n_vocab else None

    def bytes_of(self, i: int) -> bytes:
        """What a piece contributes in the middle of a text; a control token is its text."""
        if not 0 <= i < self.n_vocab:
            return b""
        piece: str = self._model.id_to_piece(i)
        if self._model.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        return (piece if i in self._names else piece.replace(_SPACE, " ")).encode()

    def _ids(self, text: str) -> list[int]:
        if self._control is None or not self._control.search(text):
            return self._model.encode(text)
        ids: list[int] = []
        for part in self._control.split(text):
            ids.extend([self._controls[part]] if part in self._controls else self._model.encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text; ids outside the vocabulary are left out, control tokens appear as their text."""
        text, run = "", []
        for i in (int(i) for i in ids):
            if i in self._names:
                text += (self._model.decode(run) if run else "") + self._names[i]
                run = []
            elif 0 <= i < self.n_vocab:
                run.append(i)
        return text + (self._model.decode(run) if run else "")

    def save(self, folder: Path) -> None:
        """Writes tokenizer.model and the settings that mark it."""
        write_files(folder, self.files)


def train_sentencepiece(kind: str, texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """``sp-bpe`` or ``sp-unigram`` with byte fallback, no normalization, ids 0 to 2 = <unk>, <s>, </s>.

    Raises:
        UserError: ``vocab_size`` below what bytes, special tokens and the texts' characters need.
    """
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=writer,
            vocab_size=vocab_size,
            model_type="bpe" if kind == "sp-bpe" else "unigram",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=0.9999,
            hard_vocab_limit=False,
            max_sentence_length=_LONGEST,
            num_threads=1,
            minloglevel=3,
        )
    except UserError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise UserError(f"tokenizer vocabulary of {vocab_size} for {kind}: sentencepiece refuses: {reason}") from None
    model = writer.getvalue()
    if kind == "sp-bpe":
        settings = _json(_LLAMA | {"add_prefix_space": False})
        return JsonTokenizer({"tokenizer.model": model, "tokenizer_config.json": settings}, Path("."))
    return _unigram(model)


_LONGEST = 8192  # bytes of a line that the trainer looks at; it would drop longer ones


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines short enough for the trainer, which takes one sentence at a time."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST // 4):
                yield line[start : start + _LONGEST // 4]


def _unigram(model: bytes) -> JsonTokenizer:
    """The trained unigram as a tokenizer.json whose pieces hold plain spaces."""
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    count = processor.get_piece_size()
    pieces = [(processor.id_to_piece(i).replace(_SPACE, " "), processor.get_score(i)) for i in range(count)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(_SPECIAL))
    return made(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
