"""What eval scores: a corpus tokenized here, a split of prepared shards, or nanoGPT's flat .bin."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxgpt.common.data import shards
from mlxgpt.common.data.corpus import open_corpus
from mlxgpt.common.data.shards import Tokens
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Text:
    """Tokens of which all but the first are scored; ``size``: bytes of UTF-8 these spell, None where nobody knows."""

    name: str
    tokens: np.ndarray | Tokens
    size: int | None


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
        raise UserError(f"{path}: text needs a tokenizer, and this model has none; expected shards or a flat .bin")
    return _corpus(path, tokenizer, text_key)


def _corpus(path: str, tokenizer: Tokenizer, text_key: str) -> Text:
    """Documents with the end-of-text token before each; where there is none, the first token stays unscored."""
    separator = [] if tokenizer.eos_id is None else [np.array([tokenizer.eos_id], dtype=np.int32)]
    made: list[np.ndarray] = []
    size = 0
    for piece in open_corpus(path, text_key).read():
        if piece.text:
            made += separator * piece.first
            try:
                made += tokenizer.encode_batch([piece.text])
            except UserError as error:
                raise UserError(f"{piece.name}: {error}") from None
            size += len(piece.text.encode())
    if not size:
        raise UserError(f"{path}: empty; expected text")
    tokens = np.concatenate(made)
    if not separator:
        size -= _spelled(tokenizer, tokens[:1])
    return Text(path, tokens, size)


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
    return Text(f"{folder} {split}", tokens, size - _spelled(tokenizer, tokens[:1]))


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
    """Bytes of the text of ``tokens``, which the end-of-text token adds nothing to."""
    return len(tokenizer.decode([token for token in tokens.tolist() if token != tokenizer.eos_id]).encode())
