"""A tokenizer as llguidance knows it: the bytes of every token, and which stand for no text.

llguidance keeps special tokens apart by a byte that UTF-8 never has, and needs a token that ends texts, which here is
one behind the vocabulary: where a text may end is asked, and the model's own end tokens are put into the mask.
"""

from collections.abc import Collection
from typing import Any

import llguidance
import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.protocol import Tokenizer

_LONGEST = 1000  # bytes of a token; llguidance's tree has no room for longer ones
_BYTES = frozenset(range(0xF5)) - {0xC0, 0xC1}  # of UTF-8
_VISIBLE = frozenset(range(0x20, 0x7F))


class Vocabulary:
    """The tokens that a grammar may choose from.

    Args:
        tokenizer: whose tokens they are.
        n_vocab: tokens that may be drawn, (n_vocab,) the shape of masks.
        special: tokens that are never a part of a text.

    Raises:
        UserError: llguidance refuses the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, special: Collection[int]) -> None:
        self.n_vocab = n_vocab
        self._special = frozenset(special)
        tokens = [_usable(tokenizer.bytes_of(i), i in self._special) for i in range(n_vocab)]
        self._known = {token for i, token in enumerate(tokens) if i not in self._special and token}
        self._longest = max(map(len, self._known), default=1)
        self._one = frozenset(token[0] for token in self._known if len(token) == 1)
        # two tokens of the same bytes: the grammar is asked about the first, the other goes with it
        first: dict[bytes, int] = {}
        self.same: dict[int, int] = {}
        for i, token in enumerate(tokens):
            if token and i not in self._special and first.setdefault(token, i) != i:
                self.same[i] = first[token]
                tokens[i] = b""
        self.copies = np.fromiter(self.same, np.intp)
        self.originals = np.fromiter(self.same.values(), np.intp)
        given: Any = _Given(tokens, [i for i in sorted(self._special) if 0 <= i < n_vocab and tokens[i]])
        try:
            self.tokenizer = llguidance.LLTokenizer(given, slices=llguidance.LLTokenizer.json_slices())
        except BaseException as error:  # a panic of its Rust is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"no grammar over this vocabulary: llguidance says: {' '.join(str(error).split())}"
            ) from None

    def is_special(self, i: int) -> bool:
        """Whether a token stands for no text."""
        return i in self._special

    def unwritable(self, text: str) -> str | None:
        """The first character of ``text`` that no row of tokens reaches; None where the tokens can write the text."""
        if self._one >= _VISIBLE and (text.isascii() or self._one >= _BYTES):
            return None
        data, reached = text.encode(), {0}
        for at in range(len(data)):
            if at not in reached:
                continue
            for size in range(1, min(self._longest, len(data) - at) + 1):
                if data[at : at + size] in self._known:
                    reached.add(at + size)
        if len(data) in reached:
            return None
        return data[max(reached) :].decode("utf-8", "replace")[:1]


def _usable(token: bytes, special: bool) -> bytes:
    """The token as llguidance's tree takes it; b"" for one that no text has."""
    if special:
        return token[:_LONGEST]
    return b"" if len(token) > _LONGEST else token


class _Given:
    """What LLTokenizer reads of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens = [*tokens, b"<|end of text|>"]
        self.eos_token_id = len(tokens)
        self.special_token_ids = [*special, len(tokens)]

    def __call__(self, text: str) -> list[int]:
        """Asked for forced texts only, which no grammar here has: the model chooses among all tokens that fit."""
        raise AssertionError("no grammar here forces a text")
