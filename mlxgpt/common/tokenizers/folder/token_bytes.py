"""What one token of a tokenizer.json contributes to a text, in bytes: its decoder's rule for a token in the middle.

`tokenizers` decodes whole sequences to valid UTF-8 only; a token may hold half a character.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

from mlxgpt.common.tokenizers.fast_bpe import bytes_of_characters

_BYTES = bytes_of_characters()
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Step = Callable[[str], str | bytes]


def speller(part: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """The bytes of a token by its text in the vocabulary; ``part`` is the decoder as tokenizer.json has it.

    What a decoder does to a whole text, such as the space that it strips from the start, is left out.
    """
    steps = _steps(part)

    def spell(token: str) -> bytes:
        made: str | bytes = token
        for step in steps:
            made = step(made) if isinstance(made, str) else made
        return made.encode("utf-8", "surrogatepass") if isinstance(made, str) else made

    return spell


def _steps(part: Mapping[str, Any] | None) -> list[Step]:
    """What is done to a token, in order; bytes are final."""
    if part is None:  # tokens are joined by a space
        return [lambda token: " " + token]
    steps, joined = [], False
    for one in _flat(part):
        joined = joined or one["type"] == "Fuse"
        # behind Fuse a step is about the whole text, and only a replacement reaches a token in the middle
        if one["type"] != "Fuse" and not (joined and one["type"] != "Replace"):
            steps.append(_step(one))
    return steps


def _flat(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for inner in part["decoders"] for one in _flat(inner)] if part["type"] == "Sequence" else [part]


def _step(part: Mapping[str, Any]) -> Step:
    kind = part["type"]
    if kind == "ByteLevel":
        return _over_bytes
    if kind == "ByteFallback":
        return _byte
    if kind == "Metaspace":
        return lambda token: token.replace(part["replacement"], " ")
    if kind == "BPEDecoder":
        return lambda token: token.replace(part["suffix"], " ")
    if kind == "Replace" and "String" in part["pattern"]:
        return lambda token: token.replace(part["pattern"]["String"], part["content"])
    return _asked(part)


def _over_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTES[c] for c in token])
    except KeyError:  # an added token with a character that stands for no byte is text
        return token.encode("utf-8", "surrogatepass")


def _byte(token: str) -> str | bytes:
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token


def _asked(part: Mapping[str, Any]) -> Step:
    """Any other decoder by itself: what it makes of a token behind another one."""
    decoder = decoder_of(part)
    first = decoder.decode(["a"])
    return lambda token: decoder.decode(["a", token]).removeprefix(first)


def decoder_of(part: Mapping[str, Any]) -> Any:
    """A decoder of `tokenizers` from what tokenizer.json says."""
    plain = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}
    return tokenizers.Tokenizer.from_str(json.dumps({**plain, "decoder": part})).decoder
