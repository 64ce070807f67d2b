"""Tables of tokens, such as a notebook's stoi and itos: what they say, and the tokenizer that has the same ids."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers import char
from mlxgpt.common.tokenizers.char import CharTokenizer
from mlxgpt.common.tokenizers.folder.token_bytes import decoder_of
from mlxgpt.common.tokenizers.hf import EOS, JsonTokenizer, made

SPLITS = ("characters", "spaces", "words")
"""How a text becomes entries: each character; at white space; at white space and punctuation, which are entries."""

_MOST = 1 << 22  # entries, and the largest id
_SPECIAL = re.compile(r"<\|?[^<>\s]+\|?>|\[[A-Za-z]+\d*\]|__[A-Za-z]+__|PAD|UNK|BOS|EOS|SOS")
_ROLES = {
    "eos_token": ("endoftext", "eos", "/s", "endoftoken", "end", "eot", "stop"),
    "bos_token": ("bos", "sos", "s", "start", "begin", "startoftext"),
    "pad_token": ("pad", "padding"),
    "unk_token": ("unk", "unknown", "oov"),
}
_PLAIN = re.compile(r"[<>\[\]|_ ]")
# Python's white space; Rust's has no \x1c to \x1f
_SPACES = r"[\s\x1c-\x1f]+"
_PUNCTUATION = r"""[,.:;?_!"()']|--"""


class UnsplitError(UserError):
    """Entries of several characters, and nothing that says how a text is split into them."""


@dataclass(frozen=True)
class Table:
    """The text of each id; an id may have none."""

    texts: Mapping[int, str]
    where: str  # for messages: "meta.pkl: itos"
    split: str | None = None


def of_value(value: Any, where: str, split: str | None = None) -> Table | None:
    """The table that a dict either way round, a list or a text of characters is; None for anything else.

    Raises:
        UserError: a table that contradicts itself: an id or a text twice, an id that is none.
    """
    if isinstance(value, str | list | tuple):
        pairs = list(enumerate(value))
    elif isinstance(value, Mapping):
        forward = [(i, text) for text, i in value.items() if type(i) is int and isinstance(text, str)]
        backward = [(_number(i), text) for i, text in value.items() if isinstance(text, str) and _number(i) is not None]
        pairs = forward if len(forward) == len(value) else backward if len(backward) == len(value) else []
    else:
        return None
    if not pairs or not all(isinstance(text, str) for _, text in pairs):
        return None
    return Table(_checked(pairs, where), where, split)


def _number(key: Any) -> int | None:
    """An id that is a key; JSON makes texts of them."""
    if type(key) is int:
        return key
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else None


def _checked(pairs: Sequence[tuple[Any, str]], where: str) -> dict[int, str]:
    if len(pairs) > _MOST:
        raise UserError(f"{where}: {len(pairs)} entries, expected at most {_MOST}")
    texts: dict[int, str] = {}
    ids: dict[str, int] = {}
    for i, text in pairs:
        if not 0 <= i < _MOST:
            raise UserError(f"{where}: {shown(text)} has the id {shown(i)}: expected 0 to {_MOST - 1}")
        if i in texts:
            raise UserError(f"{where}: id {i} is {shown(texts[i])} and {shown(text)}: expected one entry an id")
        if text in ids and text:
            raise UserError(f"{where}: {shown(text)} has the ids {ids[text]} and {i}: expected one id an entry")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{where}: id {i} is {shown(text)}, half of a surrogate pair: expected characters")
        texts[i], ids[text] = text, i
    return texts


def shown(value: Any) -> str:
    """A value in a message: never long."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"of {value.bit_length()} bits"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def tokenizer(table: Table, rows: int | None = None) -> CharTokenizer | JsonTokenizer:
    """The tokenizer with a table's ids, for a model whose vocabulary has ``rows``; its notes say what it is.

    Raises:
        UserError: an id that the model does not have.
        UnsplitError: entries of several characters, and no ``split``.
    """
    # an entry without text stands for nothing: as if it were not there
    texts = {i: text for i, text in sorted(table.texts.items()) if text}
    if not texts:
        raise UserError(f"{table.where}: no text in it: expected the text of each id")
    largest = max(texts)
    if rows is not None and largest >= rows:
        raise UserError(
            f"{table.where}: {shown(texts[largest])} has the id {largest}, but the model has a vocabulary of {rows}"
        )
    several = {i: text for i, text in texts.items() if len(text) > 1}
    words = [text for text in several.values() if not is_special(text)]
    split = table.split or ("characters" if not words else None)
    if split is None:
        raise UnsplitError(
            f"{table.where}: {len(words)} entries of several characters, such as {shown(words[0])}, and nothing that "
            'says how a text is split into them: expected a .json file with {"split": S, "stoi": {...}}, S one of '
            + ", ".join(SPLITS)
        )
    if split not in SPLITS:
        raise UserError(f"{table.where}: split {shown(split)}: expected one of {', '.join(SPLITS)}")
    gaps = sorted(set(range(largest + 1)) - set(texts))
    notes = [f"a text is split into {split}"] if split != "characters" else []
    if split == "characters" and not several and not gaps:
        result = CharTokenizer("".join(texts.values()))
    else:
        if gaps == [0] and not several:
            texts[0] = EOS
            notes.append(f"id 0 has no character: here {EOS}, as it begins and ends a name in makemore")
        elif gaps:
            _fill(texts, gaps, table.where)
            notes.append(f"ids without text: {_listed(gaps)}; here <|{gaps[0]}|> and so on")
        result = _of_words(texts, split, notes)
    if rows is not None and result.n_vocab < rows:
        notes.append(f"the model has a vocabulary of {rows}: ids from {result.n_vocab} on have no text")
    result.notes = [*result.notes, *notes]
    return result


def _fill(texts: dict[int, str], gaps: list[int], where: str) -> None:
    """Gives ids without text a mark each: mlx-lm counts through all ids, and what is decoded is seen."""
    if len(gaps) > max(len(texts), 1024):
        raise UserError(f"{where}: {len(texts)} entries with ids up to {max(texts)}: expected fewer gaps than entries")
    taken = set(texts.values())
    for i in gaps:
        texts[i] = f"<|{i}|>" if f"<|{i}|>" not in taken else f"<||{i}||>"


def is_special(text: str) -> bool:
    """Whether an entry looks like a mark and not like text: <pad>, [UNK], <|endoftext|>."""
    return len(text) > 1 and _SPECIAL.fullmatch(text) is not None


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def role(text: str) -> str | None:
    """What transformers calls a mark of this name: eos_token, bos_token, pad_token, unk_token; None for another."""
    bare = _PLAIN.sub("", text).lower()
    return next((role for role, names in _ROLES.items() if bare in names), None)


def roles(marks: Iterable[str]) -> dict[str, str]:
    """Role -> the first mark that has it, for tokenizer_config.json."""
    found = {role(text): text for text in reversed(list(marks))}
    return {name: text for name, text in found.items() if name}


def _of_words(texts: Mapping[int, str], split: str, notes: list[str]) -> JsonTokenizer:
    """A WordLevel tokenizer: every entry is a word, and a mark a special token."""
    marks = [text for text in texts.values() if is_special(text)]
    named = roles(marks)
    unknown = named.get("unk_token")
    ids = {text: i for i, text in sorted(texts.items())}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=ids, unk_token=unknown or "<unk>"))
    space = pre_tokenizers.Split(Regex(_SPACES), "removed")
    if split == "characters":
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoder_of(char.decoder(ids, bool(unknown)))
    elif split == "spaces":
        backend.pre_tokenizer = space
        backend.decoder = _spaced()
    else:
        mark = pre_tokenizers.Split(Regex(_PUNCTUATION), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([mark, space])
        backend.decoder = decoders.Sequence([_spaced(), _joined_punctuation(), decoders.Fuse()])
    backend.add_special_tokens(marks)
    if unknown:
        notes.append(f"what the table lacks becomes {unknown}")
    elif split != "characters" and not {"a", ",", "b"} <= set(ids):
        notes.append("mlx-lm loads no table of words without a token for the unknown, such as <unk>")
    return made(backend, named)


def _spaced() -> Any:
    """A space between two entries: WordPiece's decoder, with a prefix that no entry has."""
    return decoders.WordPiece(prefix="\x00\x00", cleanup=False)


def _joined_punctuation() -> Any:
    """No space before these, as LLMs-from-scratch's decode has it."""
    return decoders.Replace(Regex(r"""^\s(?=[,.?!"()'])"""), "")
