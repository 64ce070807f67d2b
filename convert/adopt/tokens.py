"""The tokenizer of a home-made model: named by the user, in the checkpoint, or in a file beside it."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.load import has_tokenizer, load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

# what such projects call it, the likeliest first
_BESIDE = (
    "meta.pkl", "tokenizer.pkl", "stoi.json", "itos.json", "char_to_idx.json", "chars.json", "characters.json",
    "vocab.json", "vocabulary.json", "meta.json", "vocab.pkl", "stoi.pkl", "vocab.txt",
)  # fmt: skip
_KINDS = ("tok*.bin", "*.model", "*.tiktoken")
# rows of the token embeddings -> whose they usually are; nanoGPT rounds GPT-2's up
_USUAL = {256: "bytes", 50257: "gpt2", 50304: "gpt2", 50281: "p50k_base", 100277: "cl100k_base", 200019: "o200k_base"}


def find(
    extras: Mapping[str, Any], path: Path, given: str | None, vocab_size: int
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of the model in ``path``, and where it was taken from; None where there is none.

    Args:
        extras: plain values beside the weights in the file, nested.
        path: the file of the weights; other files of its folder may have the tokenizer.
        given: what the user named instead: a file, a folder or a name.
        vocab_size: rows of the token embeddings.

    Raises:
        UserError: ``given`` cannot be read; a table contradicts itself, another one, or the model's size.
    """
    if given:
        made = load_tokenizer(given, vocab_size)
        return _fitting(made, given, vocab_size), _told(given, made)
    notes: list[str] = []
    made = _inside(extras, path, vocab_size, notes) or _beside(extras, path, vocab_size, notes)
    if made is None:
        usual = _USUAL.get(vocab_size)
        hint = f" (a vocabulary of {vocab_size} is often that of --tokenizer {usual})" if usual else ""
        notes.append(f"no tokenizer in it; --tokenizer FILE adds one{hint}")
        return None, notes
    return made, notes


def _told(where: object, made: Tokenizer) -> list[str]:
    """Notes: where a tokenizer was taken from, and what it says of itself."""
    return [f"tokenizer: {where}: {made.kind}, {made.n_vocab} tokens", *made.notes]


def _fitting(tokenizer: Tokenizer, where: object, rows: int) -> Tokenizer:
    if tokenizer.n_vocab > rows:
        raise UserError(f"{where}: {tokenizer.n_vocab} tokens, but the model has a vocabulary of {rows}")
    return tokenizer


def prompt(folder: Path) -> str:
    """A first text that the tokenizer of a folder can encode, "" where there is none."""
    if not has_tokenizer(folder):
        return ""
    tokenizer = load_tokenizer(folder)
    texts = (tokenizer.decode([i]) for i in range(tokenizer.n_vocab) if i not in tokenizer.special)
    for text in ("Once", *itertools.islice((text for text in texts if text.isalpha()), 3)):
        try:
            tokenizer.encode(text)
        except UserError:
            continue
        return text
    return ""


def _inside(extras: Mapping[str, Any], path: Path, rows: int, notes: list[str]) -> Tokenizer | None:
    """The tokenizer of a table in the checkpoint."""
    from mlxgpt.common.tokenizers.foreign import find, tables

    table = find.table(extras, path.name, rows)
    if table is None:
        return None
    try:
        made = tables.tokenizer(table, rows)
    except tables.UnsplitError as error:
        notes.append(f"not taken: {error}")
        return None
    notes += _told(table.where, made)
    return made


def _beside(extras: Mapping[str, Any], path: Path, rows: int, notes: list[str]) -> Tokenizer | None:
    """The tokenizer of the first file of the folder that has one for no more tokens; others are noted."""
    folder = path if path.is_dir() else path.parent
    for place in [folder] if has_tokenizer(folder) else _places(extras, folder):
        try:
            made = _fitting(load_tokenizer(place, rows), place, rows)
        except UserError as error:
            notes.append(f"not taken: {error}")
            continue
        notes += _told(place, made)
        return made
    return None


def _places(extras: Mapping[str, Any], folder: Path) -> list[Path]:
    """Files that may hold the tokenizer; nanoGPT's lies with the data, which the checkpoint's config names."""
    names = [*_BESIDE, *sorted(path.name for kind in _KINDS for path in folder.glob(kind))]
    found = [folder / name for name in names]
    config = extras.get("config")
    dataset = config.get("dataset") if isinstance(config, Mapping) else None
    if isinstance(dataset, str) and Path(dataset).name == dataset:
        found.append(folder.parent / "data" / dataset / "meta.pkl")
    return [path for path in found if path.is_file()]
