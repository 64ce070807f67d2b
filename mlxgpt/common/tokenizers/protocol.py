"""What every tokenizer does, and the files that it consists of."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mlxgpt.common.errors import UserError

# Everything that transformers may read for a tokenizer; a loaded folder's files are saved again byte for byte.
FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates/"  # a folder of further templates, NAME.jinja

TIKTOKEN = ("gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony")
NAMES = ("bytes", *TIKTOKEN)
"""Tokenizers that have a name and no file: an id a byte, and tiktoken's."""


# What names the end of a text where no tokenizer_config.json does.
EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer."""

    n_vocab: int
    """One more than the largest id."""
    eos_id: int | None
    """The token between documents, where there is one."""
    before: list[int]
    """What AutoTokenizer puts before a text, such as Llama's <s>; ``encode`` does not add it."""
    after: list[int]
    """What AutoTokenizer puts after a text, such as T5's </s>; ``encode`` does not add it."""
    named: dict[str, str]
    """bos_token, eos_token, pad_token, unk_token and so on, as transformers resolves them; templates write them."""
    notes: list[str]
    """Where two files of the folder disagree: which one is taken."""
    ends: frozenset[int]
    """What ends a generated text beside ``eos_id``: the ids that the model folder's generation_config.json lists."""
    kind: str
    """In words, for messages: ``char``, ``byte-level BPE`` and so on."""
    digest: str
    """sha256 of what defines the ids."""
    files: dict[str, bytes]
    """What ``save`` writes, name -> bytes."""
    special: frozenset[int]
    """Tokens that mark a place and stand for no text, such as the one between documents."""

    @property
    def templates(self) -> dict[str, str]:
        """Chat templates (jinja) by name, as transformers resolves them: ``default``, ``tool_use``; {} for none.

        Raises:
            UserError: the folder's templates are not text.
        """
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact text; None where there is no such token."""
        ...

    def token_of(self, i: int) -> str | None:
        """The exact text of a token by its id, as the vocabulary has it; None where there is no such token."""
        ...

    def bytes_of(self, i: int) -> bytes:
        """What a token contributes in the middle of a text, UTF-8 or a part of a character; b"" for no token.

        A special token is its text. A tokenizer that tidies a decoded text (" ." to ".") does so to what these make.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, no special token added.

        Raises:
            UserError: a character that the tokenizer does not have.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as an integer array; the fast way for many."""
        ...

    def encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As ``encode_batch``, but the text of a special token is text (transformers' split_special_tokens)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files into ``folder``, which must exist."""
        ...


def sha256_of(*parts: bytes) -> str:
    """Hex sha256 of the parts, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def is_file_of(name: str) -> bool:
    """Whether a file of a model's folder belongs to its tokenizer, by its name in the folder."""
    return name in FILES or name.startswith(TEMPLATES)


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer files of ``folder``: name -> bytes."""
    found = [*(folder / name for name in FILES), *sorted((folder / TEMPLATES).glob("*.jinja"))]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found if path.is_file()}


def read_json(files: dict[str, bytes], name: str, where: Path) -> dict:
    """A JSON object among ``files``; {} where it is not there.

    Raises:
        UserError: the file is not a JSON object.
    """
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where / name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where / name}: expected a JSON object, found {type(value).__name__}")
    return value


def checked(text: str) -> str:
    """``text``, which must be Unicode: a half of a surrogate pair (as from undecodable arguments) is a UserError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text at position {error.start}: {text[error.start]!r} is no character: expected UTF-8 text"
        ) from None
    return text


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes name -> bytes into ``folder``."""
    for name, data in files.items():
        path = Path(folder) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


class StreamDecoder:
    """Text from ids that arrive one by one: each call returns what is certain, never half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._reset()

    def _reset(self) -> None:
        self._ids: list[int] = []  # a window of the latest ids: enough context for the next one
        self._ends: list[int] = []  # where in the window a character ends
        self._sent = 0  # characters of the window's text that were returned
        self._waiting = 0  # ids since a character ended

    def add(self, token: int) -> str:
        """The text that ``token`` completes; an unfinished UTF-8 character is held back."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        unfinished = len(text) - len(text.rstrip("\ufffd"))
        self._waiting = self._waiting + 1 if unfinished else 0
        if 0 < self._waiting <= 3:
            return ""
        # Four ids without an end are not UTF-8, but for at most three bytes (so three U+FFFD) at the end.
        certain = len(text) - min(unfinished, 3)
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if not unfinished:
            self._ends.append(len(self._ids))
        self._forget(min(unfinished, 3))
        return piece

    def _forget(self, held: int) -> None:
        """Shortens a long window from the left, at the end of a character where there is one."""
        count = len(self._ids)
        if count <= 24:
            return
        start = next((end for end in self._ends if 12 <= end < count), count - 12 if count > 256 else 0)
        if start:
            self._ids = self._ids[start:]
            self._ends = [end - start for end in self._ends if end > start]
            self._sent = len(self._tokenizer.decode(self._ids)) - held

    def flush(self) -> str:
        """What was held back; the decoder is then as new."""
        rest = self._tokenizer.decode(self._ids)[self._sent :]
        self._reset()
        return rest


_LAST_WORD_END = re.compile(r"[\s\S]*\S(?=[ \t\r\n])")


def cut_before_space(text: str, size: int) -> list[str] | None:
    """``text`` in pieces of at most ``size`` characters, cut between a visible character and white space.

    GPT-2's expression always ends a word there, so the pieces' tokens are the text's. None where a piece has no such
    place.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        found = _LAST_WORD_END.match(text, start, start + size)
        if found is None:
            return None
        pieces.append(found.group())
        start = found.end()
    return [*pieces, text[start:]]


def expect_own(tokenizer: object) -> None:
    """Raises UserError for what is neither None nor a Tokenizer, such as transformers'."""
    if tokenizer is not None and not isinstance(getattr(tokenizer, "named", None), dict):
        kind = type(tokenizer).__name__
        raise UserError(f"tokenizer is a {kind}: expected what load returns, or mlxgpt.common.tokenizers.load reads")
