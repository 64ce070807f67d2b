"""A Hugging Face folder's tokenizer files from GGUF's metadata: those that traveled, else made from tokenizer.ggml.*.

Byte-level BPE and unigram become a tokenizer.json; SentencePiece's BPE a tokenizer.json that merges in the order of its
scores, as transformers reads such a GGUF file, and a tokenizer.model of the same pieces.
"""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.gguf import pre, vocabulary
from convert.formats.gguf.tokenizer import FILE, HF_JSON, IDS, TEMPLATE, tokenizer_of, turn_end
from convert.formats.gguf.vocabulary import BYTE, CONTROL, GGML, NORMAL, SPACE, UNKNOWN, UNUSED, USER
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers import ends
from mlxgpt.common.tokenizers.folder import sp_model

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_OWN_NAME = re.compile(r"(additional_chat_templates/)?[\w-][\w.-]*", re.ASCII)


def restore(
    values: Mapping[str, Any], where: Path, n_vocab: int, arch: str, model: Mapping[str, Any]
) -> tuple[dict[str, bytes], list[str]]:
    """The files of a Hugging Face folder, and notes. ``n_vocab``: rows of the embedding; ``model``: config.json.

    Raises:
        UserError: values of a wrong type or length, or files that are not true of ``tokenizer.ggml.*``.
    """
    files = _traveled(values, where)
    if {"tokenizer.json", "tokenizer.model", "vocab.json", "encoder.json"} & set(files):
        _check(values, where, files, n_vocab, arch, model)
        return files, []
    kind = values.get(GGML + "model", "none")
    if isinstance(kind, str) and kind in ("none", "no_vocab"):
        return files, []
    made = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram}.get(kind) if isinstance(kind, str) else None
    if made is None:
        return files, [_left_out(where, "model", kind, ("gpt2", "llama", "t5"))]
    given = _Given(values, where, n_vocab, arch)
    named = values.get(GGML + "pre")
    if kind == "gpt2" and named is not None and (not isinstance(named, str) or named not in pre.RULES):
        return files, [_left_out(where, "pre", named, tuple(pre.RULES))]
    notes = []
    if kind == "gpt2" and named is None:
        notes.append(f"{where}: no {GGML}pre: text is split as gpt-2 does, llama.cpp takes a rule of its own")
    return files | made(given), notes


def _left_out(where: Path, key: str, found: Any, known: tuple[str, ...]) -> str:
    cure = "--tokenizer FILE gives the model's own"
    return (
        f"{where}: {GGML}{key} = {found!r} is not supported (expected one of {', '.join(known)}): "
        f"the tokenizer is left out; {cure}"
    )


def ends_of(values: Mapping[str, Any], files: Mapping[str, bytes], model: Mapping[str, Any]) -> int | list[int] | None:
    """What ends a generated text: eos, the ends of turn and message, and the end of a turn in the chat template."""
    found = [values.get(GGML + key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    if values.get(TEMPLATE) is not None:
        try:
            tokenizer = tokenizer_of(files, model)
        except UserError:
            tokenizer = None
        found.append(turn_end(tokenizer) if tokenizer else None)
    return ends.as_value(ends.union(i for i in found if type(i) is int))


def _traveled(values: Mapping[str, Any], where: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for key, value in values.items():
        name = "tokenizer.json" if key == HF_JSON else key.removeprefix(FILE) if key.startswith(FILE) else None
        if name is None:
            continue
        if not _OWN_NAME.fullmatch(name) or name in ("config.json",):
            raise UserError(f"{where}: {key}: expected the name of a file")
        if isinstance(value, str):
            files[name] = value.encode()
        elif isinstance(value, np.ndarray) and value.dtype == np.uint8:
            files[name] = value.tobytes()
        else:
            raise UserError(f"{where}: {key}: expected a string or bytes")
    return files


def _check(
    values: Mapping[str, Any],
    where: Path,
    files: Mapping[str, bytes],
    n_vocab: int,
    arch: str,
    model: Mapping[str, Any],
) -> None:
    """Files and ``tokenizer.ggml.*`` say the same tokens."""
    if GGML + "tokens" not in values:
        return
    try:
        tokenizer = tokenizer_of(files, model)
        expected = vocabulary.of(tokenizer, files, n_vocab, arch).values() if tokenizer else {}
    except (UserError, RuntimeError, KeyError, TypeError, AttributeError, ValueError):
        return  # another kind: whoever loads the files says what is wrong with them
    for key in (GGML + "tokens", GGML + "merges"):
        found = values.get(key)
        if key in expected and (not isinstance(found, list) or expected[key].value != found):
            raise UserError(f"{where}: {key} differs from the tokenizer files in the same metadata")


class _Given:
    """``tokenizer.ggml.*`` of one file, checked."""

    def __init__(self, values: Mapping[str, Any], where: Path, n_vocab: int, arch: str) -> None:
        self.values, self.where, self.arch = values, where, arch
        tokens = values.get(GGML + "tokens")
        if not isinstance(tokens, list) or len(tokens) != n_vocab or not all(isinstance(one, str) for one in tokens):
            found = len(tokens) if isinstance(tokens, list) else type(tokens).__name__
            raise UserError(
                f"{where}: {GGML}tokens: {found}, expected {n_vocab} strings, one a row of token_embd.weight"
            )
        types = values.get(GGML + "token_type", np.full(n_vocab, NORMAL))
        if not isinstance(types, np.ndarray) or types.shape != (n_vocab,) or types.dtype.kind not in "iu":
            raise UserError(f"{where}: {GGML}token_type: expected {n_vocab} whole numbers")
        self.tokens: list[str] = tokens
        self.types: list[int] = types.tolist()
        # a row without a token, and no piece of text
        self.padding = [
            kind == UNUSED and token.startswith("[PAD") for token, kind in zip(tokens, self.types, strict=True)
        ]
        self.named = {name: i for name, key in IDS.items() if (i := self.id(key)) is not None}

    def id(self, key: str) -> int | None:
        """A token's id under a key; None where there is none."""
        i = self.values.get(GGML + key)
        return i if type(i) is int and 0 <= i < len(self.tokens) else None

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        found = self.values.get(GGML + key, default)
        if type(found) is not bool:
            raise UserError(f"{self.where}: {GGML}{key} = {found!r}: expected a boolean")
        return found

    def scores(self) -> np.ndarray:
        """float32 by id."""
        found = self.values.get(GGML + "scores")
        if not isinstance(found, np.ndarray) or found.shape != (len(self.tokens),) or found.dtype != np.float32:
            raise UserError(f"{self.where}: {GGML}scores: expected {len(self.tokens)} float32 numbers")
        return found

    def around(self, bos: bool = False, eos: bool = False) -> tuple[int | None, int | None]:
        """What is put before and after a text; ``bos``, ``eos``: whether it is where no key says so."""
        before = self.named.get("bos_token") if self.flag("add_bos_token", bos) else None
        return before, self.named.get("eos_token") if self.flag("add_eos_token", eos) else None

    def added(self) -> list[dict[str, Any]]:
        """The tokens that are found in a text before it is split."""
        special = set(self.named.values())
        return [
            {"id": i, "content": token, **_FLAGS, "special": kind != USER or i in special}
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER) or i in special
        ]

    def settings(self, around: tuple[int | None, int | None], **more: Any) -> bytes:
        """tokenizer_config.json, as far as the metadata has it."""
        made: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        made |= {name: self.tokens[i] for name, i in self.named.items()}
        made |= {"add_bos_token": around[0] is not None, "add_eos_token": around[1] is not None} | more
        found = {"default": self.values.get(TEMPLATE)}
        others = self.values.get(TEMPLATE + "s", [])
        for name in others if isinstance(others, list) else []:
            found[name] = self.values.get(f"{TEMPLATE}.{name}")
        texts = {name: source for name, source in found.items() if isinstance(source, str)}
        if list(texts) == ["default"]:
            made["chat_template"] = texts["default"]
        elif texts:
            made["chat_template"] = [{"name": name, "template": source} for name, source in texts.items()]
        return json.dumps(made, indent=1).encode()

    def json(self, around: tuple[int | None, int | None], **parts: Any) -> bytes:
        """tokenizer.json of these parts.

        Raises:
            UserError: they make no tokenizer.
        """
        import tokenizers

        content = {"version": "1.0", "truncation": None, "padding": None, **parts, "post_processor": self._post(around)}
        data = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
        try:
            tokenizers.Tokenizer.from_buffer(data)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.where}: {GGML}tokens, merges and scores make no tokenizer: {reason}") from None
        return data

    def _post(self, around: tuple[int | None, int | None]) -> dict[str, Any] | None:
        if around == (None, None):
            return None
        tokens = {self.tokens[i]: i for i in around if i is not None}

        def sequence(name: str, number: int) -> list[dict[str, Any]]:
            marks = [[] if i is None else [{"SpecialToken": {"id": self.tokens[i], "type_id": number}}] for i in around]
            return [*marks[0], {"Sequence": {"id": name, "type_id": number}}, *marks[1]]

        special = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in tokens.items()}
        return {
            "type": "TemplateProcessing",
            "single": sequence("A", 0),
            "pair": [*sequence("A", 0), *sequence("B", 1)],
            "special_tokens": special,
        }


def _byte_level(given: _Given) -> dict[str, bytes]:
    name = given.values.get(GGML + "pre", "gpt-2")
    rule, (normalizer, split) = pre.RULES[name], pre.written(name)
    merges = given.values.get(GGML + "merges")
    if not isinstance(merges, list) or not all(isinstance(one, str) and one.count(" ") == 1 for one in merges):
        raise UserError(f"{given.where}: {GGML}merges: expected strings of two tokens")
    vocab = {token: i for i, token in enumerate(given.tokens) if not given.padding[i]}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": rule.ignore_merges}
    around = given.around(bos=rule.adds_bos)
    data = given.json(
        around,
        added_tokens=given.added(),
        normalizer=normalizer,
        pre_tokenizer=split,
        decoder=pre.byte_level(True),
        model=model,
    )
    return {"tokenizer.json": data, "tokenizer_config.json": given.settings(around)}


def _sentencepiece(given: _Given) -> dict[str, bytes]:
    """As transformers has the architecture: Gemma without a space in front, Phi-3 with one after every token too."""
    scores = given.scores()
    prefix = given.flag("add_space_prefix", True)
    # llama.cpp looks for user-defined tokens in the text as it is, where spaces are spaces
    pieces = [token.replace(" ", SPACE) for token in given.tokens]
    vocab = {token: i for i, token in enumerate(pieces) if not given.padding[i]}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if prefix and given.arch == "phi3":
        normalizer: Any = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
        split: Any = None
    elif prefix:
        normalizer = None
        split = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    else:
        normalizer, split = replace, None
    decoder = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    unknown = given.named.get("unk_token", given.types.index(UNKNOWN) if UNKNOWN in given.types else None)
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": _merges(vocab, scores, given.arch.startswith("gemma")),
        "byte_fallback": BYTE in given.types,
        "fuse_unk": True,
        "unk_token": None if unknown is None else pieces[unknown],
    }
    around = given.around(bos=True)
    data = given.json(
        around,
        added_tokens=[one for one in given.added() if " " not in one["content"]],
        normalizer=normalizer,
        pre_tokenizer=split,
        decoder={"type": "Sequence", "decoders": decoder},
        model=model,
    )
    message = _model(given, pieces, scores, unknown, prefix)
    return {
        "tokenizer.json": data,
        "tokenizer.model": message,
        "tokenizer_config.json": given.settings(around, add_prefix_space=prefix),
    }


def _merges(vocab: Mapping[str, int], scores: np.ndarray, by_id: bool) -> list[list[str]]:
    """Every pair of tokens that makes a token, the token of the highest score first.

    ``by_id``: in the order of ids instead, which Gemma's merges have and its scores have not.
    """
    made = []
    for token, i in vocab.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        for left, right in sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])):
            made.append((i if by_id else -float(scores[i]), left, right))
    made.sort(key=lambda one: (one[0], -len(one[1]), -len(one[2])))
    return [[left, right] for _, left, right in made]


def _model(given: _Given, pieces: list[str], scores: np.ndarray, unknown: int | None, prefix: bool) -> bytes:
    import sentencepiece

    ids = (given.named.get("bos_token", -1), given.named.get("eos_token", -1))
    kinds = [max(kind, 0) for kind in given.types]
    message = sp_model.build(
        [sp_model.Piece(*each) for each in zip(pieces, (score.tobytes() for score in scores), kinds, strict=True)],
        (0 if unknown is None else unknown, *ids),
        byte_fallback=BYTE in given.types,
        add_prefix_space=prefix,
        trim_spaces=given.flag("remove_extra_whitespaces", False),
    )
    try:
        sentencepiece.SentencePieceProcessor(model_proto=message)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{given.where}: {GGML}tokens make no SentencePiece model: {reason}") from None
    return message


def _unigram(given: _Given) -> dict[str, bytes]:
    scores = given.scores()
    count = len(given.tokens) - next((n for n, padded in enumerate(reversed(given.padding)) if not padded), 0)
    charsmap = given.values.get(GGML + "precompiled_charsmap", np.zeros(0, np.uint8))
    if not isinstance(charsmap, np.ndarray) or charsmap.dtype.kind not in "iu" or charsmap.dtype.itemsize != 1:
        raise UserError(f"{given.where}: {GGML}precompiled_charsmap: expected bytes")
    compiled = base64.b64encode(charsmap.tobytes()).decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": compiled} if charsmap.size else None
    trims = given.flag("remove_extra_whitespaces", False)
    prefix = "always" if given.flag("add_space_prefix", True) else "never"
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prefix, "split": trims}
    split = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]} if trims else spaces
    unknown = given.named.get("unk_token", given.types.index(UNKNOWN) if UNKNOWN in given.types else 2)
    vocab = [[token.replace(" ", SPACE), float(score)] for token, score in zip(given.tokens, scores, strict=True)]
    around = given.around(eos=True)
    data = given.json(
        around,
        added_tokens=[one for one in given.added() if " " not in one["content"]],
        normalizer=normalizer,
        pre_tokenizer=split,
        decoder={"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prefix, "split": trims},
        model={"type": "Unigram", "unk_id": unknown, "vocab": vocab[:count], "byte_fallback": False},
    )
    return {"tokenizer.json": data, "tokenizer_config.json": given.settings(around)}
