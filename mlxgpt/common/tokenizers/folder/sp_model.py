"""The protocol buffer of a SentencePiece tokenizer.model, read and written without protobuf."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MARKS = (UNKNOWN, CONTROL, USER)  # what stands for itself in a text
UNIGRAM, BPE = 1, 2


class Piece(NamedTuple):
    """One token: its text with spaces as U+2581, its score (float32), and what kind it is."""

    text: str
    score: bytes  # four bytes, little-endian: -0.0 and 0.0 are two scores
    kind: int


@dataclass(frozen=True)
class Model:
    """What a tokenizer.model says; fields that it leaves out have SentencePiece's defaults."""

    pieces: list[Piece]
    kind: int  # UNIGRAM or BPE
    byte_fallback: bool
    ids: tuple[int, ...]  # of <unk>, <s>, </s>; -1 for none
    names: tuple[str, ...]  # their texts
    charsmap: bytes  # the normalizer's table; b"" for identity
    add_prefix_space: bool
    trim_spaces: bool
    as_it_is: bool  # spaces are U+2581 and belong to the word after them, nothing is normalized

    def scores(self) -> list[tuple[str, float]]:
        """(text, score) by id."""
        return [(piece.text, struct.unpack("<f", piece.score)[0]) for piece in self.pieces]


def read(message: bytes) -> Model:
    """The model in the bytes of a file; what is no protocol buffer has no pieces.

    Raises:
        UnicodeDecodeError: a piece is not UTF-8.
    """
    pieces: list[Piece] = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}  # the trainer's settings, the normalizer's
    for field, value in _fields(message):
        if field == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            pieces.append(Piece(_text(piece, 1), piece.get(2, bytes(4)), _whole(piece, 3, NORMAL)))
        elif field in specs and isinstance(value, bytes):
            specs[field] |= dict(_fields(value))
    trainer, spaces = specs[2], specs[3]
    charsmap = spaces.get(2, b"")
    return Model(
        pieces=pieces,
        kind=_whole(trainer, 3, UNIGRAM),
        byte_fallback=bool(_whole(trainer, 35, 0)),
        ids=tuple(_whole(trainer, 40 + n, n) for n in range(3)),
        names=tuple(_text(trainer, 45 + n) or name for n, name in enumerate(("<unk>", "<s>", "</s>"))),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        add_prefix_space=bool(_whole(spaces, 3, 1)),
        trim_spaces=bool(_whole(spaces, 4, 1)),
        as_it_is=not charsmap and not _whole(trainer, 24, 0) and bool(_whole(spaces, 5, 1)),
    )


def _text(fields: dict[int, Any], field: int) -> str:
    value = fields.get(field, b"")
    return value.decode() if isinstance(value, bytes) else ""


def _whole(fields: dict[int, Any], field: int, default: int) -> int:
    value = fields.get(field, default)
    value = value if isinstance(value, int) else default
    return value - (1 << 64) if value >> 63 else value


def build(
    pieces: Sequence[Piece],
    ids: tuple[int, int, int] = (0, 1, 2),
    byte_fallback: bool = True,
    add_prefix_space: bool = True,
    trim_spaces: bool = False,
    charsmap: bytes = b"",
    unigram: bool = False,
) -> bytes:
    """The model; ``ids`` are of <unk>, <s> and </s>, -1 for none; ``charsmap``: compiled normalizing, b"" for none."""
    message = b"".join(
        _bytes(1, _bytes(1, piece.text.encode()) + b"\x15" + piece.score + _number(3, piece.kind)) for piece in pieces
    )
    trainer = _number(3, 1 if unigram else 2) + _number(35, int(byte_fallback))
    trainer += b"".join(_number(field, i) for field, i in zip((40, 41, 42, 43), (*ids, -1), strict=True))
    spaces = _bytes(1, b"user_defined" if charsmap else b"identity") + (_bytes(2, charsmap) if charsmap else b"")
    spaces += _number(3, int(add_prefix_space)) + _number(4, int(trim_spaces))
    return message + _bytes(2, trainer) + _bytes(3, spaces)


def merges_as_run_c(message: bytes) -> bool:
    """Whether a model is what run.c of llama2.c is: BPE, a space before every text, the others kept, no normalizing."""
    model = read(message)
    return model.kind == BPE and model.as_it_is and model.add_prefix_space and not model.trim_spaces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value): varints as int, the rest as bytes. What is no protocol buffer ends early."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(message) and shift < 64:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 2: -1, 5: 4}.get(tag & 7, len(message))
        size = varint() if size < 0 else size
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # -1 is ten bytes, as protocol buffers have it
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
