"""The token between documents as a post-processor in tokenizer.json: AutoTokenizer then begins every text with it.

transformers reads no other setting beside a tokenizer.json. What stood there is kept, so that it can be taken out
again, byte for byte: a tokenizer's digest is that of its file without this.
"""

import json
import re

_OPEN, _CLOSE = '{"type": "Sequence", "processors": [', "]}"


def _template(token: str, number: int) -> str:
    """TemplateProcessing that puts ``token`` before a text, in one line with sorted keys: the form we know again."""
    first, second = ({"SpecialToken": {"id": token, "type_id": n}} for n in (0, 1))
    text, pair = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    value = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second, pair],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    return json.dumps(value, sort_keys=True)


def _known() -> re.Pattern[str]:
    """What ``_template`` writes, for any token."""
    escaped = re.escape(_template("TOKEN", 7)).replace('"TOKEN"', "(?P=token)").replace(r"\[7\]", r"\[\d+\]")
    return re.compile(escaped.replace("(?P=token)", r'(?P<token>"(?:[^"\\]|\\.)*")', 1))


_KNOWN = _known()


def _span(text: str) -> tuple[int, int]:
    """Where the value of the outermost ``post_processor`` stands; tokenizer.json is an object that has one."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,:]*")

    def skip(place: int) -> int:
        found = gap.match(text, place)
        assert found
        return found.end()

    place = text.index("{") + 1
    while True:
        key, place = decoder.raw_decode(text, skip(place))
        start = skip(place)
        _, place = decoder.raw_decode(text, start)
        if key == "post_processor":
            return start, place


def put(data: bytes, token: str, number: int) -> bytes:
    """A tokenizer.json whose post-processor also puts ``token`` (id ``number``) before a text."""
    text = data.decode()
    start, stop = _span(text)
    added, held = _template(token, number), text[start:stop]
    value = added if held == "null" else f"{_OPEN}{held}, {added}{_CLOSE}"
    return (text[:start] + value + text[stop:]).encode()


def taken_out(data: bytes) -> bytes:
    """The tokenizer.json that was given to ``put``; any other as it is."""
    if b'"type": "TemplateProcessing"}' not in data:
        return data
    text = data.decode()
    start, stop = _span(text)
    value = text[start:stop]
    found = _KNOWN.search(value)
    if found and found.group() == value:
        value = "null"
    elif found and value.startswith(_OPEN) and value[found.start() - 2 :] == f", {found.group()}{_CLOSE}":
        value = value[len(_OPEN) : found.start() - 2]
    return (text[:start] + value + text[stop:]).encode()
