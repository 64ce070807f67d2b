"""Tokenizer, chat template and card in GGUF's metadata, and a Hugging Face folder's files from them.

``tokenizer.ggml.*`` is what llama.cpp reads: byte-level BPE (model gpt2: tokens, merges, and a name of how text is
split) or SentencePiece's BPE (model llama: pieces with scores). The folder's own files travel beside, as they are:
tokenizer.json under ``tokenizer.huggingface.json``, which the specification has, the others under ``mlxgpt.file.NAME``.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.gguf.file import Value
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers import sp_model

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # also SentencePiece's numbers
_HF_JSON = "tokenizer.huggingface.json"
_FILE = "mlxgpt.file."
_GGML = "tokenizer.ggml."
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def _byte_level(regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


# tokenizer.ggml.pre -> how text is normalized and split; llama.cpp has each in code of its own
_PRE: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt-2": (None, _byte_level(True)),
    "llama-bpe": (None, _split(_LLAMA3)),
    "qwen2": ({"type": "NFC"}, _split(_QWEN2)),
    "smollm": (
        None,
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]},
    ),
}
_SAME_PRE = {"phi-2": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def describe(companions: Mapping[str, Path | bytes], n_vocab: int, extra: Mapping[str, Any]) -> tuple[dict, list[str]]:
    """The metadata that says the companions, and what llama.cpp cannot follow. ``n_vocab``: rows of the embedding."""
    files = {name: one if isinstance(one, bytes) else one.read_bytes() for name, one in companions.items()}
    made: dict[str, Value] = {}
    for name, data in files.items():
        try:
            made[_HF_JSON if name == "tokenizer.json" else _FILE + name] = Value("str", data.decode("utf-8"))
        except UnicodeDecodeError:
            made[_FILE + name] = Value("u8[]", np.frombuffer(data, np.uint8))
    settings, notes = _object(files.get("tokenizer_config.json")), []
    license = re.search(
        r"\A---\n(?:.*\n)*?license: *[\"']?([\w.-]+)", files.get("README.md", b"").decode("utf-8", "replace")
    )
    if license:
        made["general.license"] = Value("str", license[1])
    try:
        vocabulary = _vocabulary(files, n_vocab)
    except UserError as error:
        notes.append(f"llama.cpp gets no tokenizer: {error}")
        vocabulary = {}
    made |= vocabulary or {_GGML + "model": Value("str", "none")}
    if vocabulary:
        made |= _ids(vocabulary[_GGML + "tokens"].value, settings, extra)
        by_default = vocabulary[_GGML + "model"].value == "llama"
        adds = settings.get("add_bos_token", by_default)
        made[_GGML + "add_bos_token"] = Value("bool", adds if type(adds) is bool else by_default)
    template = _template(settings, files)
    if template is not None:
        made["tokenizer.chat_template"] = Value("str", template)
    return made, notes


def _object(data: bytes | None) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _template(settings: Mapping[str, Any], files: Mapping[str, bytes]) -> str | None:
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if found is None and "chat_template.jinja" in files:
        found = files["chat_template.jinja"].decode("utf-8", "replace")
    return found if isinstance(found, str) else None


def _ids(tokens: list[str], settings: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Value]:
    """The special ids, by tokenizer_config.json's names, else by config.json's numbers."""
    made, where = {}, {token: i for i, token in enumerate(tokens)}
    for name, key in _IDS.items():
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found = where.get(token) if isinstance(token, str) else extra.get(f"{name}_token_id")
        found = found[0] if isinstance(found, list) and found else found
        if type(found) is int and 0 <= found < len(tokens):
            made[_GGML + key] = Value("u32", found)
    return made


def _vocabulary(files: Mapping[str, bytes], n_vocab: int) -> dict[str, Value]:
    """The tokens as llama.cpp takes them; {} where there is no tokenizer.

    Raises:
        UserError: it has no such kind, or splits text otherwise.
    """
    if "tokenizer.model" in files:
        return _pieces(files["tokenizer.model"], n_vocab)
    if "tokenizer.json" not in files:
        if not ({"vocab.json", "merges.txt"} <= set(files)):
            return {}
        from mlxgpt.common.tokenizers.hf import from_gpt2_files

        content = json.loads(from_gpt2_files(dict(files), Path(".")).backend.to_str())
    else:
        content = _object(files["tokenizer.json"])
    model = content.get("model")
    decoder = content.get("decoder") or {}
    if not isinstance(model, dict) or model.get("type") != "BPE" or decoder.get("type") != "ByteLevel":
        raise UserError("tokenizer.json is no byte-level BPE")
    pre = next((name for name, (norm, split) in _PRE.items() if _same(content, norm, split)), None)
    if pre is None:
        raise UserError(f"its rule for splitting text is none of {', '.join(_PRE)}")
    tokens, types = _padded(n_vocab)
    added = {one["id"]: one for one in content.get("added_tokens", [])}
    for token, i in [*model["vocab"].items(), *((one["content"], i) for i, one in added.items())]:
        if not 0 <= i < n_vocab:
            raise UserError(f"token {token!r} has id {i}, the model {n_vocab} rows")
        tokens[i] = token
        types[i] = (CONTROL if added[i].get("special") else USER) if i in added else NORMAL
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return _listed("gpt2", pre, tokens, types) | {_GGML + "merges": Value("str[]", merges)}


def _padded(n_vocab: int) -> tuple[list[str], list[int]]:
    """A row of the embedding without a token is called so by llama.cpp's converter."""
    return [f"[PAD{i}]" for i in range(n_vocab)], [UNUSED] * n_vocab


def _listed(model: str, pre: str, tokens: list[str], types: list[int]) -> dict[str, Value]:
    return {
        _GGML + "model": Value("str", model),
        _GGML + "pre": Value("str", pre),
        _GGML + "tokens": Value("str[]", tokens),
        _GGML + "token_type": Value("i32[]", types),
    }


def _same(content: Mapping[str, Any], normalizer: Any, split: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json splits text so; what only moves offsets does not count."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if key not in ("trim_offsets", "prepend_scheme")}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain(content.get("normalizer")) == normalizer and plain(content.get("pre_tokenizer")) == plain(split)


def _pieces(model: bytes, n_vocab: int) -> dict[str, Value]:
    """The pieces of a SentencePiece BPE."""
    import sentencepiece

    trainer = next((value for field, value in _fields(model) if field == 2), b"")
    normalizer = dict(_fields(next((value for field, value in _fields(model) if field == 3), b"")))
    if dict(_fields(trainer)).get(3, 1) != 2:
        raise UserError("tokenizer.model is no BPE")
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    if processor.get_piece_size() > n_vocab:
        raise UserError(f"tokenizer.model has {processor.get_piece_size()} pieces, the model {n_vocab} rows")
    tokens, types = _padded(n_vocab)
    scores = [-10000.0] * n_vocab
    for i in range(processor.get_piece_size()):
        tokens[i], scores[i], types[i] = processor.id_to_piece(i), processor.get_score(i), NORMAL
        for kind, holds in ((UNKNOWN, "is_unknown"), (CONTROL, "is_control"), (UNUSED, "is_unused"), (BYTE, "is_byte")):
            if getattr(processor, holds)(i):
                types[i] = kind
    made = _listed("llama", "default", tokens, types)
    made[_GGML + "scores"] = Value("f32[]", scores)
    made[_GGML + "add_space_prefix"] = Value("bool", bool(normalizer.get(3, 1)))
    made[_GGML + "remove_extra_whitespaces"] = Value("bool", bool(normalizer.get(4, 1)))
    return made


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer: varints as int, the rest as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(message) and shift < 64:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        return value

    while at < len(message):
        tag = varint()
        width = {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        if width is None:
            width = varint() if tag & 7 == 2 else len(message)
        yield tag >> 3, message[at : at + width]
        at += width


def restore(values: Mapping[str, Any], where: Path, n_vocab: int) -> tuple[dict[str, bytes], list[str]]:
    """The files of a Hugging Face folder: those that traveled, else made from ``tokenizer.ggml.*``; and notes.

    Raises:
        UserError: values of a wrong type or length, or files that are not true of ``tokenizer.ggml.*``.
    """
    files: dict[str, bytes] = {}
    for key, value in values.items():
        name = "tokenizer.json" if key == _HF_JSON else key.removeprefix(_FILE) if key.startswith(_FILE) else None
        if name is None:
            continue
        if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII) or name in ("config.json",):
            raise UserError(f"{where}: {key}: expected the name of a file")
        if isinstance(value, str):
            files[name] = value.encode()
        elif isinstance(value, np.ndarray) and value.dtype == np.uint8:
            files[name] = value.tobytes()
        else:
            raise UserError(f"{where}: {key}: expected a string or bytes")
    if {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(files):
        _check(values, where, files, n_vocab)
        return files, []
    kind = values.get(_GGML + "model", "none")
    if isinstance(kind, str) and kind in ("none", "no_vocab"):
        return files, []
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        return files, [f"{where}: {_GGML}model = {kind!r} is not supported: the tokenizer is left out"]
    tokens, types = _lists(values, where, n_vocab)
    settings = _settings(values, tokens)
    if kind == "llama":
        return files | _sentencepiece(values, where, tokens, types, settings), []
    named = values.get(_GGML + "pre", "gpt-2")
    pre = _SAME_PRE.get(named, named) if isinstance(named, str) else ""
    if pre not in _PRE:
        return files, [f"{where}: {_GGML}pre = {named!r} is not supported: the tokenizer is left out"]
    return files | _bpe(values, where, tokens, types, settings, pre), []


def _check(values: Mapping[str, Any], where: Path, files: Mapping[str, bytes], n_vocab: int) -> None:
    """Files and ``tokenizer.ggml.*`` say the same tokens."""
    if _GGML + "tokens" not in values:
        return
    try:
        expected = _vocabulary(files, n_vocab)
    except (UserError, RuntimeError, KeyError, TypeError, AttributeError, ValueError):
        return  # another kind: whoever loads the files says what is wrong with them
    for key in (_GGML + "tokens", _GGML + "merges"):
        found = values.get(key)
        if key in expected and (not isinstance(found, list) or expected[key].value != found):
            raise UserError(f"{where}: {key} differs from the tokenizer files in the same metadata")


def _lists(values: Mapping[str, Any], where: Path, n_vocab: int) -> tuple[list[str], list[int]]:
    tokens = values.get(_GGML + "tokens")
    if not isinstance(tokens, list) or len(tokens) != n_vocab or not all(isinstance(one, str) for one in tokens):
        found = len(tokens) if isinstance(tokens, list) else type(tokens).__name__
        raise UserError(f"{where}: {_GGML}tokens: {found}, expected {n_vocab} strings, one a row of token_embd.weight")
    types = values.get(_GGML + "token_type", np.full(n_vocab, NORMAL))
    if not isinstance(types, np.ndarray) or types.shape != (n_vocab,) or types.dtype.kind not in "iu":
        raise UserError(f"{where}: {_GGML}token_type: expected {n_vocab} whole numbers")
    return tokens, types.tolist()


def _settings(values: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json, as far as the metadata has it."""
    made: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name, key in _IDS.items():
        i = values.get(_GGML + key)
        if type(i) is int and 0 <= i < len(tokens):
            made[f"{name}_token"] = tokens[i]
    if isinstance(values.get("tokenizer.chat_template"), str):
        made["chat_template"] = values["tokenizer.chat_template"]
    return made


def _bpe(
    values: Mapping[str, Any], where: Path, tokens: list[str], types: list[int], settings: dict[str, Any], pre: str
) -> dict[str, bytes]:
    import tokenizers

    normalizer, split = _PRE[pre]
    added = [(i, token) for i, token in enumerate(tokens) if types[i] in (UNKNOWN, CONTROL, USER)]
    vocab = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    merges = values.get(_GGML + "merges")
    if not isinstance(merges, list) or not all(isinstance(one, str) and one.count(" ") == 1 for one in merges):
        raise UserError(f"{where}: {_GGML}merges: expected strings of two tokens")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags, "special": types[i] != USER} for i, token in added],
        "normalizer": normalizer,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {"type": "BPE", "vocab": vocab | {token: i for i, token in added}, "merges": merges}
        | {"ignore_merges": pre == "llama-bpe"},
    }
    data = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        tokenizers.Tokenizer.from_buffer(data)
    except ValueError as error:
        raise UserError(f"{where}: {_GGML}merges and tokens make no tokenizer: {error}") from None
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": data, "tokenizer_config.json": json.dumps(settings, indent=1).encode()}


def _sentencepiece(
    values: Mapping[str, Any], where: Path, tokens: list[str], types: list[int], settings: dict[str, Any]
) -> dict[str, bytes]:
    """tokenizer.model with LlamaTokenizer's settings."""
    import sentencepiece

    scores = values.get(_GGML + "scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),) or scores.dtype != np.float32:
        raise UserError(f"{where}: {_GGML}scores: expected {len(tokens)} float32 numbers")
    prefix = values.get(_GGML + "add_space_prefix", True)
    unknown = values.get(_GGML + "unknown_token_id")
    unknown = unknown if type(unknown) is int else types.index(UNKNOWN) if UNKNOWN in types else 0
    ends = (values.get(_GGML + key) for key in ("bos_token_id", "eos_token_id"))
    bos, eos = (i if type(i) is int else -1 for i in ends)
    message = sp_model.build(
        [
            sp_model.Piece(*each)
            for each in zip(tokens, (s.tobytes() for s in scores), (max(k, 0) for k in types), strict=True)
        ],
        (unknown, bos, eos),
        byte_fallback=BYTE in types,
        add_prefix_space=prefix is True,
        trim_spaces=values.get(_GGML + "remove_extra_whitespaces", False) is True,
    )
    try:
        sentencepiece.SentencePieceProcessor(model_proto=message)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {_GGML}tokens make no SentencePiece model: {reason}") from None
    settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": prefix is True}
    settings["add_bos_token"] = values.get(_GGML + "add_bos_token", True) is True
    return {"tokenizer.model": message, "tokenizer_config.json": json.dumps(settings, indent=1).encode()}
