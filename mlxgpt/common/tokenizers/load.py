"""Text <-> token ids behind one small protocol, and the folders in which tokenizers are kept.

A tokenizer folder is what transformers' AutoTokenizer reads: loaded there it gives the ids that it gives here. As
there, the text of a special token such as <|endoftext|> encodes to that token, and nothing is added to a text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mlxgpt.common.errors import UserError

KINDS = ("char", "bpe", "sp-bpe", "sp-unigram")

# Everything that transformers may read for a tokenizer; a loaded folder's files are saved again byte for byte.
FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "chat_template.jinja",
)  # fmt: skip

# What names the end of a text where no tokenizer_config.json does.
EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer."""

    n_vocab: int
    """One more than the largest id."""
    eos_id: int | None
    """The token between documents, where there is one."""
    before: list[int]
    """What a model is given before a text, such as Llama's <s>; ``encode`` does not add it."""
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

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, no special token added.

        Raises:
            UserError: a character that the tokenizer does not have.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as an integer array; the fast way for many."""
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


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer files of ``folder``: name -> bytes."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


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


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds the files of a tokenizer."""
    folder = Path(folder)
    pairs = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    alone = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return alone or any(all((folder / name).is_file() for name in pair) for pair in pairs)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a folder, or one file of it: tokenizer.json, a .model, or one of GPT-2's two files.

    Raises:
        UserError: nothing there, a damaged file, or a kind that cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if not has_tokenizer(path):
            raise UserError(
                f"{path}: no tokenizer here: expected tokenizer.json, tokenizer.model or vocab.json with merges.txt"
            )
        folder, files = path, read_files(path)
    elif path.is_file():
        folder, files = path.parent, _files_beside(path)
    else:
        raise UserError(f"{path}: no such tokenizer file or folder (or one of: {', '.join(KINDS)})")
    made = from_files(files, folder)
    if path.is_dir():
        made.ends = frozenset(generation_ends(path)) - {made.eos_id}
    return made


def load_last(folders: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer of the last of these folders that has one; None where none has."""
    found = [folder for folder in folders if has_tokenizer(folder)]
    return load_tokenizer(found[-1]) if found else None


def generation_ends(folder: Path) -> list[int]:
    """The eos_token_id of generation_config.json, else of config.json: none, one or several.

    Raises:
        UserError: the file is not a JSON object, or says anything but ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        said = read_json({name: path.read_bytes()}, name, folder).get("eos_token_id") if path.is_file() else None
        if said is None:
            continue
        ids = said if isinstance(said, list) else [said]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{path}: eos_token_id {said!r}: expected a token id or a list of them")
        return ids
    return []


def from_files(files: dict[str, bytes], folder: Path) -> Tokenizer:
    """The tokenizer that files make, name -> bytes; ``folder`` is where they lie, for messages."""
    if "tokenizer.json" in files:
        from mlxgpt.common.tokenizers.char import CharTokenizer, characters_of

        characters = characters_of(read_json(files, "tokenizer.json", folder))
        if characters is not None:
            return CharTokenizer(characters, files)
        from mlxgpt.common.tokenizers.hf import JsonTokenizer

        return JsonTokenizer(files, folder)
    if "tokenizer.model" in files:
        from mlxgpt.common.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(files, folder)
    from mlxgpt.common.tokenizers.hf import from_gpt2_files

    return from_gpt2_files(files, folder)


def _files_beside(path: Path) -> dict[str, bytes]:
    """The file under its standard name, with the settings that lie beside it."""
    siblings = read_files(path.parent)
    settings = {
        name: siblings[name] for name in ("tokenizer_config.json", "special_tokens_map.json") if name in siblings
    }
    pairs = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
    pairs |= {second: first for first, second in pairs.items()}
    if path.name in pairs:
        other = pairs[path.name]
        if other not in siblings:
            raise UserError(f"{path}: expected {other} beside it")
        return settings | {path.name: siblings[path.name], other: siblings[other]}
    if path.suffix == ".json":
        return settings | {"tokenizer.json": path.read_bytes()}
    if path.suffix == ".model":
        return settings | {"tokenizer.model": path.read_bytes()}
    raise UserError(f"{path}: not a tokenizer file: expected tokenizer.json, a .model, vocab.json or vocab.bpe")


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer learned from ``texts``, which are read once and as a stream; char ignores ``vocab_size``.

    The vocabulary may come out smaller than asked for where the texts are short: see ``n_vocab``.

    Raises:
        UserError: an unknown kind, no text, or a vocabulary too small for the kind.
    """
    if kind not in KINDS:
        raise UserError(f"tokenizer kind {kind!r}: expected one of {', '.join(KINDS)}")
    texts = _not_empty(texts)
    if kind == "char":
        from mlxgpt.common.tokenizers.char import train_characters

        return train_characters(texts)
    if kind == "bpe":
        from mlxgpt.common.tokenizers.hf import train_byte_bpe

        return train_byte_bpe(texts, vocab_size)
    from mlxgpt.common.tokenizers.sentencepiece import train_sentencepiece

    return train_sentencepiece(kind, texts, vocab_size)


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    found = False
    for text in texts:
        if text:
            found = True
            yield text
    if not found:
        raise UserError("no text to train a tokenizer on")


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes name -> bytes into ``folder``."""
    for name, data in files.items():
        (Path(folder) / name).write_bytes(data)


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
