"""One token a character: a table lookup in numpy each way."""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.folder.specification import chat_templates
from mlxgpt.common.tokenizers.protocol import read_json, sha256_of, write_files

_SPLIT = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}


def decoder(entries: Collection[str], unknown: bool = False) -> dict[str, Any]:
    """How tokens are joined: as they are.

    mlx-lm encodes "a ,b" to see how other decoders treat spaces, which fails where one of them is missing (and there
    is no token for the ``unknown``); SentencePiece's decoder it knows.
    """
    odd = any(entry.startswith("<0x") or "\u2581" in entry for entry in entries)
    if unknown or odd or set("a ,b") <= set(entries):
        return {"type": "Fuse"}
    space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}


def _tokenizer_json(characters: str) -> bytes:
    """The tokenizer.json in which every character is a word; a character it lacks is an error there, too."""
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": _SPLIT,
        "post_processor": None,
        "decoder": decoder(characters),
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(characters)}, "unk_token": "<unk>"},
    }
    return json.dumps(content, ensure_ascii=True, indent=1).encode()


_CONFIG = json.dumps(
    {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}, indent=1
).encode()


def characters_of(files: dict[str, bytes], where: Path) -> str | None:
    """The characters by id where ``files`` (of the folder ``where``) are ours; None for any other tokenizer."""
    if b'"WordLevel"' not in files["tokenizer.json"]:
        return None
    content = read_json(files, "tokenizer.json", where)
    settings = read_json(files, "tokenizer_config.json", where)
    named = {key for key in settings if key.endswith(("_token", "_tokens", "_tokens_decoder"))}
    if named or "special_tokens_map.json" in files or "added_tokens.json" in files:
        return None
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "WordLevel" or content.get("pre_tokenizer") != _SPLIT:
        return None
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
        return None
    by_id = sorted(vocabulary.items(), key=lambda item: item[1])
    plain = not content.get("added_tokens") and not content.get("normalizer")
    if not plain or [i for _, i in by_id] != list(range(len(by_id))) or any(len(c) != 1 for c, _ in by_id):
        return None
    return "".join(c for c, _ in by_id)


def train_characters(texts: Iterable[str]) -> "CharTokenizer":
    """The tokenizer of the distinct characters of ``texts``, in code point order as nanoGPT numbers them."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    return CharTokenizer("".join(sorted(seen)))


def _codes(text: str) -> np.ndarray:
    """The code points of ``text``."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class CharTokenizer:
    """Ids are positions in ``characters``; there is no token between documents."""

    kind = "char"
    eos_id: int | None = None
    special: frozenset[int] = frozenset()
    ends: frozenset[int] = frozenset()

    def __init__(self, characters: str, files: dict[str, bytes] | None = None) -> None:
        self.characters = characters
        self.n_vocab = len(characters)
        self.before: list[int] = []
        self.after: list[int] = []
        self.named: dict[str, str] = {}
        self.notes: list[str] = []
        self.digest = sha256_of(b"char", characters.encode())
        self.files = files or {"tokenizer.json": _tokenizer_json(characters), "tokenizer_config.json": _CONFIG}
        self._ids = np.full(0x110000, -1, np.int32)  # code point -> id
        self._ids[_codes(characters)] = np.arange(len(characters), dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """The id of every character."""
        return self._array(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32."""
        return [self._array(text) for text in texts]

    def encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same: no token is special."""
        return self.encode_batch(texts)

    @property
    def templates(self) -> dict[str, str]:
        """Chat templates by name."""
        return chat_templates(self.files, Path("."))

    def id_of(self, token: str) -> int | None:
        """The id of a character."""
        found = self.characters.find(token) if len(token) == 1 else -1
        return found if found >= 0 else None

    def token_of(self, i: int) -> str | None:
        """The character of an id."""
        return self.characters[i] if 0 <= i < self.n_vocab else None

    def bytes_of(self, i: int) -> bytes:
        """The character in UTF-8."""
        return self.characters[i].encode("utf-8", "surrogatepass") if 0 <= i < self.n_vocab else b""

    def _array(self, text: str) -> np.ndarray:
        ids = self._ids.take(_codes(text))
        if ids.size and ids.min() < 0:
            position = int(np.argmax(ids < 0))
            c = text[position]
            raise UserError(
                f"character {c!r} (U+{ord(c):04X}) at position {position}: expected one of the tokenizer's "
                f"{self.n_vocab} characters {_shown(self.characters)}"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The characters; an id outside the vocabulary becomes U+FFFD."""
        characters, count = self.characters, self.n_vocab
        return "".join(characters[i] if 0 <= i < count else "\ufffd" for i in ids)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        write_files(folder, self.files)


def _shown(characters: str, most: int = 40) -> str:
    return repr(characters if len(characters) <= most else characters[:most])[1:-1] + (
        " ..." if len(characters) > most else ""
    )
