"""Tokens one by one, as a person can read them: half a character, a control character or a space is seen, too."""

import functools
import unicodedata
from collections.abc import Callable

from mlxgpt.common.tokenizers.fast_bpe import bytes_of_characters
from mlxgpt.common.tokenizers.protocol import Tokenizer

_SIGNS = {" ": "·", "\n": "↵", "\t": "⇥"}
_ANCHORS = "abcdefghijklmnopqrstuvwxyz0123456789"


def speller(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """The text of a token as it continues a text, by its id.

    Bytes that are no whole character are ``<E2><80>``; an id that is no token, or has no tokenizer, is ``#17``.
    """
    if tokenizer is None:
        return lambda i: f"#{i}"
    known = (tokenizer.id_of(c) for c in _ANCHORS)
    anchor = next((i for i in known if i is not None), None)

    @functools.cache
    def spell(i: int) -> str:
        name = tokenizer.token_of(i)
        if name is None:
            return f"#{i}"
        if i in tokenizer.special:
            return name
        text = _after(tokenizer, anchor, i)
        return _bytes(name) if "\ufffd" in text and "\ufffd" not in name else text

    return spell


def _after(tokenizer: Tokenizer, anchor: int | None, i: int) -> str:
    """The token's text behind another, where SentencePiece keeps the space that it drops from a text's start."""
    before = tokenizer.decode([anchor]) if anchor is not None else ""
    both = tokenizer.decode([anchor, i]) if anchor is not None else ""
    return both.removeprefix(before) if before and both.startswith(before) else tokenizer.decode([i])


def _bytes(name: str) -> str:
    """A token of byte-level BPE, or a byte such as <0xE2>, with what is not UTF-8 as <E2>."""
    if len(name) == 6 and name.startswith("<0x"):
        return f"<{name[3:5].upper()}>"
    table = bytes_of_characters()
    if any(c not in table for c in name):
        return name
    data = bytes(table[c] for c in name)
    text = data.decode("utf-8", "surrogateescape")  # a byte that is not UTF-8 is U+DC00 + byte
    return "".join(f"<{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)


def visible(text: str) -> str:
    """``text`` with a sign for what has no picture of its own: a space is ``·``, U+202E is ``<U+202E>``."""
    made = "".join(map(_sign, text))
    return ("◌" + made if text and unicodedata.category(text[0]).startswith("M") else made) or "∅"


def _sign(c: str) -> str:
    if c in _SIGNS:
        return _SIGNS[c]
    kind = unicodedata.category(c)
    return f"<U+{ord(c):04X}>" if kind[0] == "C" or kind in ("Zs", "Zl", "Zp") else c
