"""Tokens as text: how they are spelled in log-probabilities, and where they stand in an answer."""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mlxgpt.common.inference.generation import CONTEXT
from mlxgpt.common.serve.work import Drawn
from mlxgpt.common.tokenizers.protocol import StreamDecoder, Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")
LEAST = -9999.0  # what OpenAI's API says for a token that is as good as impossible


def bytes_of(tokenizer: Tokenizer | None, token: int) -> bytes | None:
    """The bytes of a token; None without a tokenizer."""
    return tokenizer.bytes_of(token) if tokenizer else None


def spelled(tokenizer: Tokenizer | None, token: int) -> str:
    """A token's text; ``bytes:\\xe2`` for a part of a character, ``token_id:5`` without a tokenizer."""
    found = bytes_of(tokenizer, token)
    if found is None:
        return f"token_id:{token}"
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def finite(logprob: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    return logprob if logprob is None else max(logprob, LEAST)


class Placed(NamedTuple):
    """A token in a text."""

    drawn: Drawn
    text: str
    start: int  # characters before it


class Placing:
    """Where tokens stand in the text that is made of them, each given out once its text is.

    ``before``: tokens before them, which decide how the first is spelled.
    """

    def __init__(self, tokenizer: Tokenizer | None, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._size = 0  # characters that are certain
        self._waiting: deque[Placed] = deque()
        for token in before[-CONTEXT:]:
            if self._decoder:
                self._decoder.add(token)

    def add(self, drawn: Drawn) -> None:
        """Takes the next token."""
        text, start = spelled(self._tokenizer, drawn.token), self._size
        if self._decoder:
            piece = self._decoder.add(drawn.token)
            self._size += len(piece)
            data = bytes_of(self._tokenizer, drawn.token) or b""
            if data and data[0] & 0xC0 != 0x80:  # it begins a character: broken ones before it are behind their tokens
                start = max(start, self._size - len(_UTF8("replace").decode(data)))
            if (
                piece and not text.startswith("bytes:") and text.endswith(piece)
            ):  # at the beginning of a text without its space
                text = piece
        self._waiting.append(Placed(drawn, text, start))

    def take(self, size: int, last: bool = False) -> list[Placed]:
        """The tokens of the first ``size`` characters that were not given out; ``last``: all of them are."""
        made = []
        while self._waiting and (last or self._waiting[0].start < size):
            made.append(self._waiting.popleft())
        return made


def placed_prompt(tokenizer: Tokenizer | None, scores: Sequence[Drawn], text: str, added: int) -> list[Placed]:
    """The tokens of a prompt whose text is echoed; the first ``added`` begin it and are no part of the text."""
    placing = Placing(tokenizer)
    for drawn in scores[added:]:
        placing.add(drawn)
    found = [Placed(one.drawn, one.text, min(one.start, len(text))) for one in placing.take(0, True)]
    return [*(Placed(drawn, "", 0) for drawn in scores[:added]), *found]


def chat_logprobs(tokenizer: Tokenizer | None, found: Iterable[Placed]) -> list[dict[str, Any]]:
    """The entries of logprobs.content."""

    def entry(token: int, text: str, logprob: float | None) -> dict[str, Any]:
        data = bytes_of(tokenizer, token)
        return {"token": text, "logprob": finite(logprob), "bytes": None if data is None else list(data)}

    return [
        entry(one.drawn.token, one.text, one.drawn.logprob)
        | {"top_logprobs": [entry(token, spelled(tokenizer, token), value) for token, value in one.drawn.top]}
        for one in found
    ]


def text_logprobs(tokenizer: Tokenizer | None, found: Sequence[Placed], base: int = 0) -> dict[str, Any]:
    """The logprobs of a choice of /v1/completions; ``base``: characters before the first token's text."""
    tops: list[dict[str, float] | None] = []
    for one in found:
        if one.drawn.logprob is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for token, value in one.drawn.top:
            top.setdefault(one.text if token == one.drawn.token else spelled(tokenizer, token), max(value, LEAST))
        top.setdefault(one.text, max(one.drawn.logprob, LEAST))
        tops.append(top)
    return {
        "tokens": [one.text for one in found],
        "token_logprobs": [finite(one.drawn.logprob) for one in found],
        "top_logprobs": tops,
        "text_offset": [base + one.start for one in found],
    }
