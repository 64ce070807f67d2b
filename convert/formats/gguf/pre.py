"""How byte-level BPE splits text before it merges, and what llama.cpp calls each way (``tokenizer.ggml.pre``).

llama.cpp has each way in code of its own, under the names of the tokenizers that it first met it in. A tokenizer.json
spells a way out as a chain of splits; two chains are the same here if their steps are, however they are nested.

Source: llama.cpp's src/llama-vocab.cpp, and the tokenizer.json of the models that the names are of.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mlxgpt.common.errors import UserError

Step = tuple[str, str]  # ("split", an expression), ("punctuation", behavior), ("digits", "")

_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*END"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = (
    _CASES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}" + _REST.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
)
_TEKKEN = _CASED.replace("END", "") + r"|\p{N}" + _REST_SLASH
_GPT4O = _CASED.replace("END", _CASES + "?") + r"|\p{N}{1,3}" + _REST_SLASH
_SEED = _CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DIGIT = r"\p{N}"
# deepseek-llm lists every letter that has a case, as of Unicode 11; its list begins so
_LISTED, _CASED_LETTERS = "\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"


def _splits(*expressions: str) -> tuple[Step, ...]:
    return tuple(("split", one) for one in expressions)


class Rule(NamedTuple):
    """A way of splitting: ``nfc`` where the tokenizers of this name normalize first, which llama.cpp never does."""

    steps: tuple[Step, ...]
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is taken without merging
    adds_bos: bool = False  # what llama.cpp does where add_bos_token is not said


# of names with one rule the first is written, unless the architecture has one of its own in _OF_ARCH
RULES: dict[str, Rule] = {
    "gpt-2": Rule(_splits(_GPT2)),
    "phi-2": Rule(_splits(_GPT2)),
    "olmo": Rule(_splits(_GPT2), nfc=True),
    "mpt": Rule(_splits(_GPT2), nfc=True),
    "llama-bpe": Rule(_splits(_LLAMA3), ignore_merges=True, adds_bos=True),
    "dbrx": Rule(_splits(_LLAMA3)),
    "smaug-bpe": Rule(_splits(_LLAMA3)),
    "qwen2": Rule(_splits(_QWEN2), nfc=True),
    "stablelm2": Rule(_splits(_QWEN2), nfc=True),
    "qwen35": Rule(_splits(_QWEN35), nfc=True),
    "tekken": Rule(_splits(_TEKKEN), ignore_merges=True, adds_bos=True),
    "gpt-4o": Rule(_splits(_GPT4O)),
    "seed-coder": Rule(_splits(_SEED)),
    "smollm": Rule(_splits(_DIGIT, _GPT2)),
    "starcoder": Rule(_splits(_DIGIT, _GPT2)),
    "refact": Rule(_splits(_DIGIT, _GPT2)),
    "codeshell": Rule(_splits(_DIGIT, _GPT2)),
    "command-r": Rule(_splits(_DIGIT, _GPT2), nfc=True),
    "deepseek-llm": Rule(_splits("[\r\n]", _CASED_LETTERS, _MARKS, r"\s+$", _HAN, _DIGIT)),
    "deepseek-coder": Rule(_splits("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _DIGIT)),
    "deepseek-v3": Rule(_splits(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3)),
    "falcon": Rule((("punctuation", "Contiguous"), *_splits(_GPT2), ("digits", ""), *_splits("[0-9][0-9][0-9]"))),
}
_SAME = {
    "gpt-2": ("jais", "gigachat", "mellum", "modern-bert", "exaone4", "trillion", "granite-docling"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "qwen2": ("deepseek-r1-qwen", "megrez", "kormo"),
    "gpt-4o": ("llama4", "kanana2", "talkie"),
    "smollm": ("exaone", "minerva-7b"),
}
RULES |= {name: RULES[first] for first, names in _SAME.items() for name in names}
# what llama.cpp's converter calls the tokenizers of these architectures, if the rule is that
_OF_ARCH = {
    "phi2": "phi-2", "starcoder2": "starcoder", "granite": "refact", "stablelm": "stablelm2", "smollm3": "smaug-bpe",
}  # fmt: skip


def name_of(content: Mapping[str, Any], arch: str) -> str:
    """llama.cpp's name of how a tokenizer.json splits text.

    Raises:
        UserError: it has none for it.
    """
    normalizers = list(chain_of(content.get("normalizer"), "normalizers"))
    if any(one != {"type": "NFC"} for one in normalizers):
        raise UserError(f"it normalizes text ({_types(normalizers)}), llama.cpp does not")
    chain = list(chain_of(content.get("pre_tokenizer"), "pretokenizers"))
    steps = _steps(chain)
    same = [name for name, rule in RULES.items() if rule.steps == steps]
    if not same:
        raise UserError(f"its rule for splitting text ({_types(chain) or 'none'}) is none of {', '.join(RULES)}")
    skips = bool(content["model"].get("ignore_merges"))
    fitting = [name for name in same if RULES[name].ignore_merges == skips]
    if not fitting:
        if not _all_merge(content):
            does = "merges" if skips else "does not merge"
            raise UserError(f"llama.cpp {does} words that are tokens with {same[0]}, this tokenizer does otherwise")
        fitting = same
    nfc = [name for name in fitting if RULES[name].nfc == bool(normalizers)] or fitting
    return _OF_ARCH[arch] if _OF_ARCH.get(arch) in nfc else nfc[0]


def _all_merge(content: Mapping[str, Any]) -> bool:
    """Whether merging alone makes every token, so that it is the same to take words that are tokens as they are."""
    import tokenizers

    model = {**content["model"], "ignore_merges": False}
    plain = {"version": "1.0", "added_tokens": [], "model": model}
    backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
    added = {one["content"] for one in content.get("added_tokens", [])}
    tokens = [token for token in model["vocab"] if token not in added]
    return all(len(one.ids) == 1 for one in backend.encode_batch_fast(tokens, add_special_tokens=False))


def chain_of(value: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in order, however deep its sequences are."""
    if isinstance(value, Mapping) and value.get("type") == "Sequence":
        for one in value.get(inner) or ():
            yield from chain_of(one, inner)
    elif isinstance(value, Mapping):
        yield value


def _types(chain: list[Mapping[str, Any]]) -> str:
    return ", ".join(str(one.get("type")) for one in chain)


def _steps(chain: list[Mapping[str, Any]]) -> tuple[Step, ...] | None:
    """The splits of a byte-level pre-tokenizer; None where a step is something else."""
    made: list[Step] = []
    byte_level = False
    for one in chain:
        kind, pattern = one.get("type"), one.get("pattern")
        if byte_level and kind not in ("Digits", "Split"):
            return None
        if kind == "ByteLevel" and not one.get("add_prefix_space"):
            byte_level = True
            made += _splits(_GPT2) if one.get("use_regex", True) else ()
        elif kind == "Split" and isinstance(pattern, Mapping) and "Regex" in pattern:
            # what is between matches stays a piece, or there is nothing between them
            if (one.get("behavior"), bool(one.get("invert"))) not in (("Isolated", False), ("Removed", True)):
                return None
            listed = str(pattern["Regex"]).startswith(_LISTED)
            made += _splits(_CASED_LETTERS if listed else pattern["Regex"])
        elif kind == "Digits":
            made += _splits(_DIGIT) if one.get("individual_digits") else [("digits", "")]
        elif kind == "Punctuation":
            made.append(("punctuation", str(one.get("behavior"))))
        else:
            return None
    return tuple(made) if byte_level else None


def byte_level(regex: bool) -> dict[str, Any]:
    """The pre-tokenizer that spells bytes as characters, and the decoder that undoes it."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def written(name: str) -> tuple[Any, dict[str, Any]]:
    """Normalizer and pre-tokenizer of a tokenizer.json that splits as ``name`` says."""
    rule = RULES[name]
    made: list[dict[str, Any]] = []
    for kind, what in rule.steps:
        if kind == "digits":
            made.append({"type": "Digits", "individual_digits": False})
        elif kind == "punctuation":
            made.append({"type": "Punctuation", "behavior": what})
        elif what == _DIGIT:
            made.append({"type": "Digits", "individual_digits": True})
        elif what == _GPT2:
            made.append(byte_level(True))
        else:
            made.append({"type": "Split", "pattern": {"Regex": what}, "behavior": "Isolated", "invert": False})
    if not any(one["type"] == "ByteLevel" for one in made):
        made.append(byte_level(False))
    pre = made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}
    return ({"type": "NFC"} if rule.nfc else None), pre
