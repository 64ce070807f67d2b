"""What eval scores: a corpus tokenized here, a split of prepared shards, or nanoGPT's flat .bin."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxgpt.common.data import shards
from mlxgpt.common.data.corpus import open_corpus
from mlxgpt.common.data.shards import Tokens
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.beginning import begin, begins_with, opening, wrap
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Text:
    """Tokens to score. ``size``: bytes of UTF-8 that the scored ones spell, None where nobody knows.

    A text begins at each of ``starts``; its first ``context`` tokens are not scored.
    """

    name: str
    tokens: np.ndarray | Tokens
    size: int | None
    begins_with: tuple[int, ...] = ()
    starts: tuple[int, ...] = (0,)

    @property
    def context(self) -> int:
        """What a text begins with is given; where it begins with nothing, its first token is."""
        return max(1, len(self.begins_with))


def open_text(path: str, tokenizer: Tokenizer | None, text_key: str, split: str) -> Text:
    """The text at ``path`` in the tokens of a model.

    Raises:
        UserError: nothing there, nothing to score, text without a tokenizer, or shards of another tokenizer.
    """
    place = Path(path)
    if place.is_dir() and shards.is_shards(place):
        return _prepared(place, tokenizer, split)
    if place.suffix == ".bin" or (place / f"{split}.bin").is_file():
        return _flat(place if place.is_file() else place / f"{split}.bin", tokenizer)
    if tokenizer is None:
        raise UserError(
            f"{path}: text needs a tokenizer, and this model has none; expected shards or a flat .bin, or a model with "
            "one: mlxgpt convert MODEL NEW --tokenizer FILE"
        )
    return _corpus(path, tokenizer, text_key)


def _corpus(path: str, tokenizer: Tokenizer, text_key: str) -> Text:
    """Documents: each alone from its BOS, or one stream with the end-of-text token between them.

    The stream is for models that were trained on one: their texts begin with that token, or with nothing.
    """
    documents, size = _documents(path, tokenizer, text_key)
    before = begins_with(tokenizer)
    if opening(tokenizer) or tokenizer.after:
        made = [wrap(tokenizer, ids) for ids in documents]
        starts = np.cumsum([0, *map(len, made[:-1])]).tolist()
        put = [len(begin(tokenizer, ids)) - len(ids) for ids in documents]
    else:
        separator = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        made = [begin(tokenizer, documents[0]), *(begin(separator, ids) for ids in documents[1:])]
        starts, put = [0], [len(made[0]) - len(documents[0])]
    text = Text(path, np.concatenate(made), size, tuple(before), tuple(starts))
    size -= sum(_first(tokenizer, ids, text.context - count) for ids, count in zip(documents, put, strict=False))
    return dataclasses.replace(text, size=size)


def _first(tokenizer: Tokenizer, ids: np.ndarray, count: int) -> int:
    """Bytes of the text of the first ``count`` tokens, which may be none, or end within a character."""
    text = tokenizer.decode(ids[: max(0, count)].tolist())
    if "\ufffd" not in text:
        return len(text.encode())
    whole, rest = tokenizer.decode(ids[: count + 16].tolist()), tokenizer.decode(ids[count : count + 16].tolist())
    cut = len(rest) - len(rest.lstrip("\ufffd"))  # a byte each, in three
    return len(whole.encode()) - len(rest.encode()) + 2 * cut


def _documents(path: str, tokenizer: Tokenizer, text_key: str) -> tuple[list[np.ndarray], int]:
    """The ids of each document that has text, and the bytes of all."""
    made: list[np.ndarray] = []
    held: list[np.ndarray] = []
    size = 0
    for piece in open_corpus(path, text_key).read():
        if piece.text:
            try:
                held += tokenizer.encode_batch([piece.text])
            except UserError as error:
                raise UserError(f"{piece.name}: {error}") from None
            size += len(piece.text.encode())
        if piece.last and held:
            made.append(np.concatenate(held))
            held = []
    if not size:
        raise UserError(f"{path}: empty; expected text")
    return made, size


def _prepared(folder: Path, tokenizer: Tokenizer | None, split: str) -> Text:
    index = shards.read_index(folder)
    shards.verify(folder, index)
    expected = index["tokenizer"]["digest"]
    if tokenizer is not None and tokenizer.digest != expected:
        raise UserError(
            f"{folder}: shards of a tokenizer with sha256 {expected[:16]}...; the model's is {tokenizer.digest[:16]}..."
        )
    if split not in index["splits"]:
        raise UserError(f"{folder}: shards have no split {split}; expected train or val")
    tokenizer = tokenizer or load_tokenizer(folder / "tokenizer")
    tokens = shards.open_split(folder, index, split)
    size = index["splits"][split]["bytes"]
    before = tuple(index.get("begins_with", ()))
    return Text(f"{folder} {split}", tokens, size - _spelled(tokenizer, tokens[: max(1, len(before))]), before)


def _flat(path: Path, tokenizer: Tokenizer | None) -> Text:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"{path}: {size} bytes; expected uint16 tokens, an even number of bytes")
    tokens = Tokens([shards.Part(path, 0, size // 2)], np.dtype("<u2"))
    if tokenizer is None:
        return Text(str(path), tokens, None)
    known = tokens[:]
    if int(known.max()) >= tokenizer.n_vocab:
        raise UserError(f"{path}: token id {known.max()}; expected below {tokenizer.n_vocab}, the tokenizer's size")
    return Text(str(path), tokens, _spelled(tokenizer, known) - _spelled(tokenizer, known[:1]))


def _spelled(tokenizer: Tokenizer, tokens: np.ndarray) -> int:
    """Bytes of the text of ``tokens``, which what stands before and after a text adds nothing to."""
    silent = {tokenizer.eos_id, *tokenizer.before}
    return len(tokenizer.decode([token for token in tokens.tolist() if token not in silent]).encode())
