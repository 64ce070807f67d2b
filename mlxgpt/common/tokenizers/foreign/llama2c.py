"""llama2.c's tokenizer .bin: the longest token's length, then score, length and bytes of each token.

Ids 0 to 2 are <unk>, <s> and </s>, the next 256 single bytes; run.c puts a space before a text and merges the pair
with the best score until there is none. The tokenizer.json made of it does the same, with ranks in place of scores; the
tokenizer.model beside keeps the scores, so that the .bin comes back byte for byte.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.folder.sp_model import BYTE, CONTROL, NORMAL, UNKNOWN, Piece, build, merges_as_run_c

_SPACE = "\u2581"
_FIRST = 259  # of the tokens that are text
_SPECIAL = {0: b"<unk>", 1: b"\n<s>\n", 2: b"\n</s>\n"}
_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """tokenizer.json, tokenizer.model and tokenizer_config.json of a .bin.

    Raises:
        UserError: truncated, no such file, or tokens that run.c would not work with.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    tokens = _tokens(path, raw)
    pieces = [_piece(path, i, text, score) for i, (text, score) in enumerate(tokens)]
    if len({piece.text for piece in pieces}) < len(pieces):
        texts = [piece.text for piece in pieces]
        twice = next(text for text in texts if texts.count(text) > 1)
        raise UserError(f"{path}: token {twice!r} is there twice")
    if _SPACE not in {piece.text for piece in pieces[_FIRST:]}:
        raise UserError(f"{path}: no token for a space, which run.c puts before every text")
    return {
        "tokenizer.json": _json(pieces),
        "tokenizer.model": build(pieces),
        "tokenizer_config.json": json.dumps(_SETTINGS, indent=1).encode(),
    }


def _tokens(path: Path, raw: bytes) -> list[tuple[bytes, bytes]]:
    """(bytes, score) of every token; a length is believed once the file has as many bytes."""
    found: list[tuple[bytes, bytes]] = []
    longest, at = int.from_bytes(raw[:4], "little"), 4
    while at < len(raw):
        size = int.from_bytes(raw[at + 4 : at + 8], "little")
        if len(raw) < at + 8 + size:
            raise UserError(f"{path}: token {len(found)}: {size} bytes at byte {at + 8} of {len(raw)}: truncated?")
        found.append((raw[at + 8 : at + 8 + size], raw[at : at + 4]))
        at += 8 + size
    if len(found) <= _FIRST:
        raise UserError(f"{path}: {len(found)} tokens, expected more than the {_FIRST} that every vocabulary has")
    actual = max(len(text) for text, _ in found)
    if longest != actual:
        raise UserError(f"{path}: says that its longest token has {longest} bytes, but that has {actual}")
    return found


def _piece(path: Path, i: int, text: bytes, score: bytes) -> Piece:
    """One token as SentencePiece has it."""
    if i in _SPECIAL or i < _FIRST:
        expected = _SPECIAL.get(i, b"<0x%02X>" % (i - 3))
        if text != expected:
            raise UserError(f"{path}: token {i} is {text!r}, expected {expected!r}")
        return Piece(text.decode().strip(), score, UNKNOWN if i == 0 else CONTROL if i < 3 else BYTE)
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: token {i} is {text!r}, which is not UTF-8") from None
    value = struct.unpack("<f", score)[0]
    if not decoded or _SPACE in decoded or not abs(value) < 1e9:
        raise UserError(f"{path}: token {i} is {text!r} with score {value}, which run.c does not merge")
    return Piece(decoded.replace(" ", _SPACE), score, NORMAL)


def _json(pieces: list[Piece]) -> bytes:
    """The tokenizer.json that gives run.c's ids: Llama's, with a space before every text."""
    scores = {piece.text: struct.unpack("<f", piece.score)[0] for piece in pieces[_FIRST:]}
    best_first = sorted(scores, key=lambda text: -scores[text])
    pairs = ((text[:n], text[n:]) for text in best_first for n in range(1, len(text)))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i].text, **flags} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, space]},
        "pre_tokenizer": None,
        "post_processor": _begins(),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                back,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": [pair for pair in pairs if pair[0] in scores and pair[1] in scores],
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def _begins() -> dict:
    """What transformers does with special tokens asked for: <s> before a text, as run.c always has it."""
    one = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    two = [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    return {"type": "TemplateProcessing", "single": one, "pair": one + two, "special_tokens": tokens}


def write_tokenizer(companions: Mapping[str, Path | bytes], n_vocab: int) -> bytes:
    """The .bin of the SentencePiece model among a folder's files, for a model with ``n_vocab`` rows.

    Raises:
        UserError: there is none, or run.c would give other ids: says why.
    """
    import sentencepiece

    found = companions.get("tokenizer.model")
    if found is None:
        raise UserError("no tokenizer.model, whose scores run.c merges by")
    found = found if isinstance(found, bytes) else found.read_bytes()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=found)
    except RuntimeError as error:
        raise UserError(f"tokenizer.model: not a SentencePiece model: {str(error).splitlines()[0]}") from None
    count = model.get_piece_size()
    if count != n_vocab:
        raise UserError(f"tokenizer.model has {count} pieces, the model {n_vocab} rows; run.c expects as many")
    ids = model.unk_id(), model.bos_id(), model.eos_id()
    if ids != (0, 1, 2) or not all(model.is_byte(i) for i in range(3, min(_FIRST, count))) or count < _FIRST:
        raise UserError(f"tokenizer.model has <unk>, <s>, </s> as {ids}; run.c needs 0, 1, 2, and the bytes after them")
    if not merges_as_run_c(found):
        raise UserError(
            "tokenizer.model is no BPE that puts a space before every text and leaves the rest, as run.c does"
        )
    pieces = [_SPECIAL.get(i) or model.id_to_piece(i).replace(_SPACE, " ").encode() for i in range(count)]
    parts = [struct.pack("<fI", model.get_score(i), len(piece)) + piece for i, piece in enumerate(pieces)]
    return struct.pack("<I", max(map(len, pieces))) + b"".join(parts)
