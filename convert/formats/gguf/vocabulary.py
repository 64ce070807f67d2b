"""``tokenizer.ggml.*`` of a tokenizer: its tokens with their types and scores, as llama.cpp takes them.

llama.cpp knows, of what decoders have: ``gpt2``, byte-level BPE with merges; ``llama``, SentencePiece's BPE, which
merges what has the highest score; ``t5``, SentencePiece's unigram. A tokenizer.json with spaces as U+2581 and bytes as
<0x0A> is the second kind, if its merges are those that scores give.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.formats.gguf import pre
from convert.formats.gguf.file import Value
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.folder import sp_model
from mlxgpt.common.tokenizers.protocol import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # also SentencePiece's numbers
GGML = "tokenizer.ggml."
SPACE = "\u2581"
_ADDED, _PADDED = -1000.0, -10000.0  # scores of tokens that no merge makes, as llama.cpp's converter has them


@dataclass
class Vocabulary:
    """A tokenizer as llama.cpp has it: ``model`` of tokenizer.ggml, tokens by id, and what that kind has beside."""

    model: str
    tokens: list[str]
    types: list[int]
    pre: str = "default"
    scores: list[float] = field(default_factory=list)
    merges: list[str] | None = None
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    notes: list[str] = field(default_factory=list)

    def values(self) -> dict[str, Value]:
        """The metadata."""
        made = {
            "model": Value("str", self.model),
            "pre": Value("str", self.pre),
            "tokens": Value("str[]", self.tokens),
            "token_type": Value("i32[]", self.types),
        }
        if self.scores:
            made["scores"] = Value("f32[]", self.scores)
            made["add_space_prefix"] = Value("bool", self.add_space_prefix)
            made["remove_extra_whitespaces"] = Value("bool", self.remove_extra_whitespaces)
        if self.merges is not None:
            made["merges"] = Value("str[]", self.merges)
        if self.charsmap:
            made["precompiled_charsmap"] = Value("u8[]", np.frombuffer(self.charsmap, np.uint8))
        return {GGML + key: value for key, value in made.items()}


def of(tokenizer: Tokenizer, files: Mapping[str, bytes], n_vocab: int, arch: str) -> Vocabulary:
    """What llama.cpp needs of a tokenizer, but what it does with spaces: see ``observed.observe``.

    Args:
        tokenizer: the one that ``files`` make.
        n_vocab: rows of the embedding.
        arch: llama.cpp's architecture.

    Raises:
        UserError: llama.cpp has no such kind, splits text otherwise, or the model has too few rows.
    """
    backend = getattr(tokenizer, "backend", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    if "tokenizer.model" in files and _same_pieces(files["tokenizer.model"], content):
        made = _of_pieces(files["tokenizer.model"], n_vocab)
        _add(made, content.get("added_tokens", []))
    elif content:
        made = _of_json(content, n_vocab, arch, tokenizer.named.get("unk_token"))
    else:
        raise UserError(f"it has no kind for {tokenizer.kind}")
    _pad(made, n_vocab)
    return made


def _of_json(content: Mapping[str, Any], n_vocab: int, arch: str, unknown_token: str | None) -> Vocabulary:
    model = content["model"]
    kind = model.get("type")
    largest = max(_ids(model), default=0)
    if largest >= n_vocab:
        raise UserError(f"token with id {largest}, the model has {n_vocab} rows")
    affix = next((key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)), None)
    if affix and kind == "BPE":
        raise UserError(f"its pieces have the {affix} {model[affix]!r}, llama.cpp's have none")
    if kind == "BPE" and (content.get("decoder") or {}).get("type") == "ByteLevel":
        made = Vocabulary("gpt2", [], [], pre.name_of(content, arch))
        made.merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    elif kind == "BPE" and model.get("byte_fallback"):
        made = Vocabulary("llama", [], [])
        _scored(made, model, n_vocab)
    elif kind == "Unigram":
        made = Vocabulary("t5", [], [], scores=[score for _, score in model["vocab"]], charsmap=_charsmap(content))
    else:
        raise UserError(f"it has no kind for {kind} with the decoder {(content.get('decoder') or {}).get('type')}")
    made.tokens, made.types = [""] * n_vocab, [0] * n_vocab
    if made.scores:
        made.scores += [_PADDED] * (n_vocab - len(made.scores))
    tokens = (
        enumerate(token for token, _ in model["vocab"]) if kind == "Unigram" else map(_turned, model["vocab"].items())
    )
    for i, token in tokens:
        made.tokens[i], made.types[i] = token, NORMAL
        if made.model != "gpt2" and model.get("byte_fallback") and _is_byte(token):
            made.types[i] = BYTE
    named = model.get("unk_token") or unknown_token
    unknown = model.get("unk_id") if kind == "Unigram" else model["vocab"].get(named)
    _add(made, content["added_tokens"])
    if made.model != "gpt2" and isinstance(unknown, int):
        made.types = [CONTROL if kind == UNKNOWN else kind for kind in made.types]
        made.types[unknown] = UNKNOWN
    return made


def _same_pieces(model: bytes, content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.model has the tokens of the tokenizer.json beside it, or there is none."""
    vocab = content.get("model", {}).get("vocab") if content else None
    if vocab is None:
        return True
    tokens = {token: i for i, (token, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    tokens = tokens | {one["content"]: one["id"] for one in content.get("added_tokens", [])}
    return all(tokens.get(piece.text, i) == i for i, piece in enumerate(sp_model.read(model).pieces))


def _turned(item: tuple[str, int]) -> tuple[int, str]:
    return item[1], item[0]


def _ids(model: Mapping[str, Any]) -> range | list[int]:
    vocab = model.get("vocab", {})
    return list(vocab.values()) if isinstance(vocab, dict) else range(len(vocab))


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scored(made: Vocabulary, model: Mapping[str, Any], n_vocab: int) -> None:
    """Scores that merge in the order of a tokenizer.json's merges: minus the place of the first that makes a token."""
    made.scores = [_ADDED] * n_vocab
    for rank, one in enumerate(model["merges"]):
        left, right = one.split(" ") if isinstance(one, str) else one
        i = model["vocab"].get(left + right)
        if i is not None and made.scores[i] == _ADDED:
            made.scores[i] = -float(rank)
    for token, i in model["vocab"].items():
        if made.scores[i] == _ADDED and len(token) == 1:
            made.scores[i] = -float(len(model["merges"]))


def _charsmap(content: Mapping[str, Any]) -> bytes:
    """SentencePiece's compiled normalizer among a tokenizer.json's."""
    chain = list(pre.chain_of(content.get("normalizer"), "normalizers"))
    found = next((one for one in chain if one.get("type") == "Precompiled"), None)
    return base64.b64decode(found["precompiled_charsmap"]) if found else b""


def _of_pieces(model: bytes, n_vocab: int) -> Vocabulary:
    """The pieces of a tokenizer.model."""
    found = sp_model.read(model)
    pieces, kind = found.pieces, {sp_model.UNIGRAM: "t5", sp_model.BPE: "llama"}.get(found.kind)
    if kind is None:
        raise UserError("tokenizer.model is neither BPE nor unigram")
    if len(pieces) > n_vocab:
        raise UserError(f"tokenizer.model has {len(pieces)} pieces, the model {n_vocab} rows")
    made = Vocabulary(kind, [piece.text for piece in pieces], [piece.kind for piece in pieces])
    made.scores = [score for _, score in found.scores()]
    made.charsmap = found.charsmap if kind == "t5" else b""
    extra = n_vocab - len(pieces)
    made.tokens += [""] * extra
    made.types += [0] * extra
    made.scores += [_PADDED] * extra
    for i, token in enumerate(made.tokens):
        if made.types[i] == USER:
            made.tokens[i] = token.replace(SPACE, " ")
    return made


def _add(made: Vocabulary, added: list[dict[str, Any]]) -> None:
    """Added tokens; llama.cpp looks for them in the text as it is, where spaces are spaces."""
    flagged = []
    for one in added:
        i, token = one["id"], one["content"]
        if i >= len(made.tokens):  # as transformers adds names that a tokenizer has not
            made.notes.append(f"token {token!r} has id {i}, the model {len(made.tokens)} rows: llama.cpp gets none")
            continue
        special = one.get("special")
        made.tokens[i] = token if special or made.model == "gpt2" else token.replace(SPACE, " ")
        if made.scores and not made.types[i]:
            made.scores[i] = _ADDED
        if made.types[i] not in (UNKNOWN, UNUSED, BYTE):
            made.types[i] = CONTROL if special else USER
        flagged += [token] if any(one.get(flag) for flag in ("lstrip", "rstrip", "single_word")) else []
    if flagged:
        shown = ", ".join([*map(repr, flagged[:3]), *(["..."] if len(flagged) > 3 else [])])
        made.notes.append(
            f"llama.cpp takes {shown} wherever the text stands and keeps the spaces beside it, this tokenizer does not "
            "(lstrip, rstrip, single_word)"
        )


def _pad(made: Vocabulary, n_vocab: int) -> None:
    """Rows of the embedding without a token get a name, as llama.cpp's converter gives it; no two may be equal."""
    taken = set(made.tokens)
    for i in range(n_vocab):
        if made.types[i]:
            continue
        name = f"[PAD{i}]"
        while name in taken:
            name += "]"
        taken.add(name)
        made.tokens[i], made.types[i] = name, UNUSED
