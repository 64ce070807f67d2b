"""From a specification and the vocabulary to a `tokenizers` tokenizer, as each class of transformers makes it.

A class other than ``PLAIN`` takes only the vocabulary, the merges and the post-processor of a tokenizer.json, and
handles text in its own way; from a tokenizer.model it takes the pieces, and makes the merges of them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mlxgpt.common.tokenizers.folder import sp_model
from mlxgpt.common.tokenizers.folder.classes import PLAIN
from mlxgpt.common.tokenizers.folder.specification import NAMES, Specification, Token

_SPACE = "\u2581"
_TEXT = "<|endoftext|>"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_QWEN2 = _CONTRACTIONS + (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN3_5 = _CONTRACTIONS + (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class Vocabulary:
    """What a file gives a class: pieces by id or with scores, merges, and what else it says."""

    pieces: Any  # {text: id} for BPE, [(text, score)] for Unigram
    merges: list[tuple[str, str]] | None = None
    post_processor: Any = None
    padding: dict[str, Any] | None = None
    charsmap: bytes = b""


@dataclass
class Made:
    """A tokenizer and the tokens that it has names for."""

    backend: tokenizers.Tokenizer
    named: dict[str, Token]
    extra: list[Token] = field(default_factory=list)


def _llama(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = _bpe(given, fuse_unk=True, byte_fallback=True)
    prefixed = settings.get("add_prefix_space")
    prefixed = True if prefixed is None else bool(prefixed)
    scheme = "never" if not prefixed else "always" if settings.get("legacy", False) else "first"
    _spaces(backend, scheme, strip=prefixed)
    return backend


def _code_llama(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = _bpe(given, fuse_unk=True, byte_fallback=True, unk_token=str(settings["unk_token"]))
    prefixed = settings.get("add_prefix_space")
    _spaces(backend, "first" if prefixed is None or prefixed else "never", strip=True)
    return backend


def _spaces(backend: tokenizers.Tokenizer, scheme: str, strip: bool) -> None:
    """Spaces as U+2581, one more before the text as ``scheme`` says."""
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = _from_pieces(*([decoders.Strip(content=" ", left=1)] if strip else []))


def _from_pieces(*more: Any) -> Any:
    return decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *more])


def _gemma(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = _bpe(given, fuse_unk=True, byte_fallback=True, unk_token=str(settings["unk_token"]))
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    backend.decoder = _from_pieces()
    return backend


def _gpt2(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = _byte_level(given, settings)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    return backend


def _code_gen(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = _gpt2(given, settings)
    backend.post_processor = processors.ByteLevel(add_prefix_space=True, use_regex=True, trim_offsets=False)
    return backend


def _gpt_neox(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = _gpt2(given, settings)
    backend.normalizer = normalizers.NFC()
    return backend


def _cohere(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = _gpt_neox(given, settings)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    return backend


def _qwen(expression: str) -> Callable[[Vocabulary, dict[str, Any]], tokenizers.Tokenizer]:
    def make(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
        backend = _byte_level(given, settings)
        backend.normalizer = normalizers.NFC()
        prefixed = bool(settings.get("add_prefix_space") or False)
        words = pre_tokenizers.Split(tokenizers.Regex(expression), behavior="isolated", invert=False)
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=prefixed, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of])
        return backend

    return make


def _byte_level(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = _bpe(given, fuse_unk=False, continuing_subword_prefix="", end_of_word_suffix="")
    backend.decoder = decoders.ByteLevel()
    return backend


def _t5(given: Vocabulary, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram(given.pieces, unk_id=2, byte_fallback=False))
    if given.charsmap:
        backend.normalizer = normalizers.Precompiled(given.charsmap)
    spaces = {"replacement": _SPACE, "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    backend.decoder = decoders.Metaspace(**spaces)
    return backend


def _bpe(given: Vocabulary, **how: Any) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.BPE(vocab=given.pieces, merges=given.merges or [], dropout=None, **how))


@dataclass(frozen=True)
class _Class:
    """How a class makes its tokenizer, and its tokens where the settings name none."""

    make: Callable[[Vocabulary, dict[str, Any]], tokenizers.Tokenizer]
    names: Mapping[str, str | None]
    unigram: bool = False
    pair: bool = False  # reads vocab.json and merges.txt


_BYTES = {"unk_token": _TEXT, "bos_token": _TEXT, "eos_token": _TEXT}
_QWEN = {"unk_token": _TEXT, "bos_token": None, "eos_token": _TEXT, "pad_token": _TEXT}
_ANGLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_FILL = {
    "prefix_token": _SPACE + "<PRE>", "middle_token": _SPACE + "<MID>", "suffix_token": _SPACE + "<SUF>",
    "eot_token": _SPACE + "<EOT>", "fill_token": "<FILL_ME>",
}  # fmt: skip
CLASSES = {
    "LlamaTokenizer": _Class(_llama, _ANGLES),
    "CodeLlamaTokenizer": _Class(_code_llama, _ANGLES | _FILL),
    "GemmaTokenizer": _Class(
        _gemma,
        {
            "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
    ),
    "GPT2Tokenizer": _Class(_gpt2, _BYTES | {"pad_token": None}, pair=True),
    "CodeGenTokenizer": _Class(_code_gen, _BYTES | {"pad_token": None}, pair=True),
    "GPTNeoXTokenizer": _Class(_gpt_neox, _BYTES | {"pad_token": "<|padding|>"}, pair=True),
    "Qwen2Tokenizer": _Class(_qwen(_QWEN2), _QWEN, pair=True),
    "Qwen3_5Tokenizer": _Class(_qwen(_QWEN3_5), _QWEN),
    "CohereTokenizer": _Class(
        _cohere,
        {
            "unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>",
            "pad_token": "<PAD>", "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>",
        },
        pair=True,
    ),
    "T5Tokenizer": _Class(_t5, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}, unigram=True),
}  # fmt: skip


def of_json(spec: Specification, data: bytes, content: dict[str, Any]) -> Made:
    """The tokenizer of a tokenizer.json: its bytes and what they say."""
    if spec.class_name == PLAIN:
        backend = tokenizers.Tokenizer.from_buffer(data)
        return _finish(spec, backend, Vocabulary(None, padding=backend.padding))
    model, kind = content["model"], CLASSES[spec.class_name]
    if model.get("type") not in (None, "Unigram"):  # its vocabulary is not needed to read the rest
        empty = {"vocab": {}} | ({"merges": []} if model["type"] == "BPE" else {})
        data = json.dumps(content | {"model": model | empty, "added_tokens": []}).encode()
    rest = tokenizers.Tokenizer.from_buffer(data)
    given = Vocabulary(model.get("vocab"), None, rest.post_processor, rest.padding)
    if kind.unigram:
        given.charsmap = _charsmap(rest)
        given.pieces = [tuple(piece) for piece in given.pieces]
    elif isinstance(given.pieces, list):
        given.pieces = {piece[0] if isinstance(piece, list) else piece: i for i, piece in enumerate(given.pieces)}
    if not kind.unigram and "merges" in model:
        given.merges = [_pair(merge) for merge in model["merges"]]
    return _of_class(spec, given)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _charsmap(backend: tokenizers.Tokenizer) -> bytes:
    import base64

    found = json.loads(backend.to_str())["normalizer"] or {}
    parts = found["normalizers"] if found.get("type") == "Sequence" else [found]
    maps = [part["precompiled_charsmap"] for part in parts if part.get("type") == "Precompiled"]
    return base64.b64decode(maps[0]) if maps else b""


def of_pair(spec: Specification, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Made:
    """The tokenizer of vocab.json and merges.txt."""
    return _of_class(spec, Vocabulary(vocabulary, merges))


def of_model(spec: Specification, model: sp_model.Model) -> Made:
    """The tokenizer of a tokenizer.model."""
    settings = spec.settings
    plain = spec.class_name == PLAIN
    unigram = model.kind == sp_model.UNIGRAM if plain else CLASSES[spec.class_name].unigram
    given = Vocabulary(model.scores(), charsmap=model.charsmap)
    if not unigram:
        given.pieces = {piece.text: i for i, piece in enumerate(model.pieces)}
        given.merges = merges_of(given.pieces)
    settings["additional_special_tokens"] = [
        tokenizers.AddedToken(piece.text, normalized=False, special=piece.kind == sp_model.CONTROL)
        for piece in model.pieces
        if piece.kind in (sp_model.CONTROL, sp_model.USER)
    ]
    if not plain:
        if unigram:
            count = settings.get("extra_ids", 100)
            given.pieces += [(f"<extra_id_{i}>", 0.0) for i in range(count - 1, -1, -1)]
        return _of_class(spec, given)
    if spec.added:
        _rename(given.pieces, spec.added)
    backend = _plain(given, model, unigram)
    for name, number, text in zip(("unk_token", "bos_token", "eos_token"), model.ids, model.names, strict=True):
        if number >= 0:
            settings.setdefault(name, text)
    return _finish(spec, backend, given)


def _rename(pieces: dict[str, int], added: dict[int, tokenizers.AddedToken]) -> None:
    """Placeholders get the names that added tokens give their ids."""
    by_id = {number: text for text, number in pieces.items()}
    for number, token in added.items():
        if number in by_id and by_id[number] != token.content and token.content not in pieces:
            pieces[token.content] = pieces.pop(by_id[number])
            by_id[number] = token.content


def _plain(given: Vocabulary, model: sp_model.Model, unigram: bool) -> tokenizers.Tokenizer:
    """What transformers makes of a tokenizer.model that no class reads: no space is put before a text."""
    if unigram:
        backend = tokenizers.Tokenizer(
            models.Unigram(given.pieces, unk_id=model.ids[0], byte_fallback=model.byte_fallback)
        )
    else:
        backend = _bpe(given, unk_token=model.names[0], fuse_unk=True, byte_fallback=model.byte_fallback)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(model.charsmap), spaces] if model.charsmap else [spaces]
    )
    backend.decoder = _from_pieces() if model.byte_fallback else decoders.Sequence([decoders.Replace(_SPACE, " ")])
    return backend


def merges_of(pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order of what they make, then of the halves' lengths and ids."""
    merges = []
    for text, number in pieces.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in pieces and right in pieces:
                merges.append((number, cut, len(right), left, right))
    return [(left, right) for _, _, _, left, right in sorted(merges, key=lambda merge: merge[:3])]


def _of_class(spec: Specification, given: Vocabulary) -> Made:
    """The tokenizer of a class that handles text in its own way."""
    kind, settings = CLASSES[spec.class_name], spec.settings
    for name, text in kind.names.items():
        settings.setdefault(name, text)
    if spec.class_name == "CodeLlamaTokenizer":
        settings.setdefault("add_bos_token", True)
        own = [settings[name] for name in _FILL if settings[name] is not None]
        settings["additional_special_tokens"] = [*(settings.get("additional_special_tokens") or []), *own]
    if spec.class_name == "T5Tokenizer":
        listed = settings.get("additional_special_tokens") or []
        numbered = [f"<extra_id_{i}>" for i in range(settings.get("extra_ids", 100))]
        known = [token for token in listed if "<extra_id_" in _content(token)]
        if known and numbered and len(known) != len(numbered):
            raise ValueError(f"{len(known)} tokens <extra_id_N> with extra_ids = {len(numbered)}")
        settings["additional_special_tokens"] = listed if known else [*listed, *numbered]
    made = _finish(spec, kind.make(given, settings), given)
    backend, named = made.backend, made.named
    if spec.class_name == "T5Tokenizer":
        ids = [("</s>", _id(made, named.get("eos_token")))]
        backend.post_processor = processors.TemplateProcessing(
            single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=ids
        )
    elif spec.class_name == "GPTNeoXTokenizer":
        _put_around(made, settings)
    elif spec.class_name == "Qwen2Tokenizer":
        texts = dict.fromkeys(_content(token) for token in (*named.values(), *made.extra))
        backend.add_tokens([tokenizers.AddedToken(text, special=True) for text in texts])
    elif spec.class_name == "CohereTokenizer":
        tokens = [_as_added(token, normalized=False) for token in (*named.values(), *made.extra)]
        backend.add_special_tokens(tokens)
    return made


def _finish(spec: Specification, backend: tokenizers.Tokenizer, given: Vocabulary) -> Made:
    """Names, added tokens and what is put around a text."""
    settings = spec.settings
    if "additional_special_tokens" in settings and "extra_special_tokens" not in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if given.padding:
        settings.setdefault("pad_token", given.padding["pad_token"])
    flagged = "add_bos_token" in settings or "add_eos_token" in settings
    if given.post_processor is not None:
        backend.post_processor = given.post_processor
    update = flagged or backend.post_processor is None
    own = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and name not in NAMES and isinstance(value, Token)
    }
    names = {name: settings.get(name) for name in NAMES} | own | settings.get("model_specific_special_tokens", {})
    extra = settings.get("extra_special_tokens") or []
    for token in (*names.values(), *extra):
        if token is not None and not isinstance(token, Token):
            raise TypeError(f"special token {token!r} is no text")
    made = Made(backend, {name: token for name, token in names.items() if token is not None}, list(extra))
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    _add(made, [token for _, token in sorted(spec.added.items(), key=lambda item: item[0])])
    if update or backend.post_processor is None:
        _put_around(made, settings)
    return made


def _add(made: Made, tokens: list[Token]) -> None:
    """The listed tokens, then those with a name or listed as extra that are not there yet."""
    there = [token.content for token in made.backend.get_added_tokens_decoder().values()]
    there += [_content(token) for token in tokens]
    for token in (*made.named.values(), *made.extra):
        if _content(token) not in there and token not in tokens:
            tokens.append(token)
    roles = {_content(token) for token in made.named.values()}
    ready = []
    for token in tokens:
        if isinstance(token, str):
            token = tokenizers.AddedToken(token, special=True)
        elif not token.special and token.content in roles:
            token.special = True
        ready.append(token)
    made.backend.add_tokens(ready)


def _put_around(made: Made, settings: dict[str, Any]) -> None:
    """bos_token before and eos_token after a text, as add_bos_token and add_eos_token say."""
    before = made.named.get("bos_token") if settings.get("add_bos_token", False) else None
    after = made.named.get("eos_token") if settings.get("add_eos_token", False) else None
    one = [f"{_content(before)}:0"] if before else []
    two = [f"{_content(after)}:0"] if after else []
    second = [f"{_content(token)}:1" for token in (before, after) if token]
    made.backend.post_processor = processors.TemplateProcessing(
        single=[*one, "$A:0", *two],
        pair=[*one, "$A:0", *two, *second[: len(one)], "$B:1", *second[len(one) :]],
        special_tokens=[(_content(token), _id(made, token)) for token in (before, after) if token],
    )


def _content(token: Token) -> str:
    return token if isinstance(token, str) else token.content


def _as_added(token: Token, **flags: Any) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=True, **flags) if isinstance(token, str) else token


def _id(made: Made, token: Token | None) -> int | None:
    """The id of a token, or of unk_token where the vocabulary lacks it."""
    for each in (token, made.named.get("unk_token")):
        found = made.backend.token_to_id(_content(each)) if each is not None else None
        if found is not None:
            return found
    return None
