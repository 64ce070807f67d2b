"""Control tokens that a message spells: found, and encoded as the text they are.

Of a template and its tokenizer, the control tokens are the special tokens and the added tokens that the template
writes, or those of tokenizer_config.json's ``chat_control_tokens``. What transformers' ``sanitize_control_tokens`` does
is done here with the same ids: the strings of messages are marked before they are rendered, and a marked token is
encoded without any added token.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.messages import text_of
from mlxgpt.common.tokenizers.hf import JsonTokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer, read_json

# transformers marks with these private-use characters, so templates see the same strings
_START, _END = "\U000f0000", "\U000f0001"


class Control:
    """The control tokens of a tokenizer, of which ``text`` holds those that the template writes."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer = tokenizer
        added = _added(tokenizer)
        special = {token: n for token, n in added.items() if n in tokenizer.special}
        written = {token: n for token, n in added.items() if token in text and not token.isspace()}
        self.texts = (*special, *(token for token in written if token not in special))
        """The special tokens and those that the template writes: what may end an answer."""
        listed = read_json(tokenizer.files, "tokenizer_config.json", Path(".")).get("chat_control_tokens")
        if isinstance(listed, list):  # transformers' setting, in place of what the template writes
            written = {token: n for token, n in added.items() if token in listed}
        self._found = _any({**special, **written})
        self._special, self._text = _any(special), _any(self.texts)
        self._marked = re.compile(f"{_START}({_any(added).pattern}){_END}|[{_START}{_END}]")

    def mark(self, value: Any) -> Any:
        """``value`` with the control tokens in its strings marked; keys stay as they are."""
        if isinstance(value, str):
            return self._found.sub(f"{_START}\\g<0>{_END}", value.replace(_START, "").replace(_END, ""))
        if isinstance(value, dict):
            return {key: self.mark(held) for key, held in value.items()}
        return [self.mark(held) for held in value] if isinstance(value, (list, tuple)) else value

    def spelled(self, message: dict[str, Any]) -> str | None:
        """A control token in a message's content; of an assistant's only a special one, since it writes the others."""
        text = text_of(message.get("content"))
        found = (self._special if message.get("role") == "assistant" else self._found).search(text)
        return found.group() if found else None

    def all(self, text: str) -> list[str]:
        """The control tokens in ``text``."""
        return self._text.findall(text)

    def leading(self, text: str) -> list[str]:
        """Those that ``text`` begins with, one directly behind the other."""
        found: list[str] = []
        place = 0
        while match := self._text.match(text, place):
            found.append(match.group())
            place = match.end()
        return found

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text rendered from marked messages: what is marked as text, the rest as ever.

        Raises:
            UserError: the tokenizer makes a control token of its plain text.
        """
        newline = self._tokenizer.encode("\n")
        first, *pieces = self._marked.split(text)
        ids = self._tokenizer.encode(first)
        for number, piece in enumerate(pieces):
            if not piece:
                continue
            plain = number % 2 == 0
            found = self._after_newline(piece, plain, newline)
            if plain and self._tokenizer.id_of(piece) in found:
                raise UserError(
                    f"{piece!r} in a message: this {self._tokenizer.kind} tokenizer makes the same token of its plain "
                    "text: expected messages without it, or tune.sanitize = false"
                )
            ids = [*ids, *found]
        return np.asarray(ids, np.int32)

    def _after_newline(self, piece: str, plain: bool, newline: list[int]) -> list[int]:
        """The ids of a piece inside a text: behind a newline SentencePiece adds no space to it."""
        encode = self._plain if plain else self._tokenizer.encode
        ids = encode("\n" + piece)
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)

    def _plain(self, text: str) -> list[int]:
        """The ids without any added token."""
        if not isinstance(self._tokenizer, JsonTokenizer):
            return self._tokenizer.encode_plain([text])[0].tolist()
        backend = self._tokenizer.backend
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        return [token.id for word in words for token in backend.model.tokenize(word)]


def _added(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokens beside the vocabulary's own, with their ids."""
    special = {tokenizer.decode([n]): n for n in tokenizer.special}
    if not isinstance(tokenizer, JsonTokenizer):
        return {token: n for token, n in special.items() if token}
    return {token.content: n for n, token in tokenizer.backend.get_added_tokens_decoder().items()}


def _any(tokens: Iterable[str]) -> re.Pattern[str]:
    """Any of the tokens, the longest first; of none nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def first_spelled(control: Control, messages: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    """(role, token) of the first message that spells a control token."""
    for message in messages:
        if token := control.spelled(message):
            return str(message.get("role")), token
    return None
