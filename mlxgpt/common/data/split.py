"""Which text trains and which validates, and how far apart the two are."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlxgpt.common.data.corpus import Piece, Scan
from mlxgpt.common.data.shards import Tokens
from mlxgpt.common.units import counted

FEW = 100
"""Documents: with fewer, whole documents are too coarse a measure, so each one is cut."""
WHOLE = 1000
"""Characters: a shorter document is never cut."""
_NAME = 40  # characters of a document's name that are shown
_LINE, _WORD = 400, 100  # characters before the cut in which a line or a word may end


def split(pieces: Iterator[Piece], scanned: Scan, val_fraction: float) -> Iterator[tuple[str, Piece]]:
    """Each piece with its split, ``train`` or ``val``; empty documents are dropped.

    A document validates when its hash is below ``val_fraction`` of all hashes. Among fewer than FEW documents each one
    of WHOLE characters or more is cut instead, as is, among more, one longer than all of the validation text is to be:
    about its first 1 - ``val_fraction`` trains, up to the end of a line or a word. Where nothing is cut, and the hashes
    would send all documents one way, the one with the smallest hash validates; of equal documents the first does.

    A single document is cut at int((1 - val_fraction) * characters), as nanoGPT cuts Tiny Shakespeare.
    """
    single = scanned.documents == 1
    limit = int(val_fraction * (1 << 64))
    long = WHOLE if scanned.documents < FEW else val_fraction * scanned.characters
    cut = {number: length for length, number in scanned.longest if single or length >= long}
    if not cut and (scanned.smallest >= limit or scanned.largest < limit):
        limit = scanned.smallest + 1
    equal, here, number = scanned.smallest == scanned.largest, "train", -1
    place = 0
    for piece in pieces:
        if not piece.text:
            continue
        if piece.first:
            number += 1
            here = "val" if (number == 0 if equal else piece.hash < limit) else "train"
            place = max(int((1 - val_fraction) * cut.get(number, 0)), 0 if single else 1)
        if number not in cut:
            yield here, piece
            continue
        end = piece.start + len(piece.text)
        if not single and piece.start < place < end:
            place = piece.start + _boundary(piece.text, place - piece.start)
        yield from _parts(piece, place, ends=not single)


def _boundary(text: str, place: int) -> int:
    """The last end of a line, else of a word, shortly before ``place``; ``place`` itself where there is none."""
    line = text.rfind("\n", max(place - _LINE, 0), place)
    if line >= 0:
        return line + 1
    word = text.rfind(" ", max(place - _WORD, 1), place)
    return word if word > 0 else place


def _parts(piece: Piece, place: int, ends: bool) -> Iterator[tuple[str, Piece]]:
    """A piece of a document that is cut at character ``place`` of it; ``ends``: both parts end as documents do."""
    here = min(max(place - piece.start, 0), len(piece.text))
    head, tail = piece.text[:here], piece.text[here:]
    if head:
        last = ends and piece.start + here == place
        yield "train", Piece(head, piece.name, piece.first, last, piece.start, cut=ends)
    if tail:
        start = piece.start + here
        yield "val", Piece(tail, piece.name, start == place, ends and piece.last, start, cut=ends)


def without_gap(tokens: Tokens, index: dict[str, Any], gap: int) -> Tokens:
    """The training ``tokens`` of shards without the last ``gap`` of each document that was cut.

    Of a document whose validation part is shorter than ``gap``, as many tokens go as that part has.
    """
    cuts = index["splits"]["train"].get("cuts", [])
    return tokens.without([(max(end - min(gap, held), 0), end) for end, held in cuts])


def describe(index: dict[str, Any]) -> dict[str, Any]:
    """Of the validation text of shards: its share of all tokens, its longest document, its distance from the rest.

    ``unigram`` has, for each split, the nats a token under the unigram distribution of its ``own`` text and under that
    of the ``other`` split's. Empty for shards that an earlier version made.
    """
    train, val = index["splits"]["train"], index["splits"]["val"]
    if not {"unigram", "longest"} <= set(val) or "unigram" not in train:
        return {}
    return {
        "share": val["tokens"] / (train["tokens"] + val["tokens"]),
        "documents": val["documents"],
        "cut": len(train["cuts"]),
        "longest": val["longest"] | {"share": val["longest"]["tokens"] / val["tokens"]},
        "unigram": {"train": train["unigram"], "val": val["unigram"]},
    }


def told(held_out: dict[str, Any], gap: str = "one block") -> list[str]:
    """The lines that a person reads of ``describe``'s figures; none where there are none. ``gap`` is its length."""
    if not held_out:
        return []
    longest, unigram = held_out["longest"], held_out["unigram"]
    documents = counted(held_out["documents"], "document")
    if held_out["cut"]:
        documents = f"the ends of {held_out['cut']:,} of {documents}, a gap of up to {gap} before each"
    name = longest["document"]
    name = name if len(name) <= _NAME else f"...{name[-_NAME:]}"
    train, val = unigram["train"], unigram["val"]
    return [
        f"validation: {held_out['share']:.1%} of all tokens: {documents}; {longest['share']:.1%} of it is {name}",
        f"validation: unigram nats a token: {val['other']:.2f} from the training text's counts, {val['own']:.2f} from "
        f"its own; the other way {train['other']:.2f} and {train['own']:.2f}",
    ]


def cross_entropy(counts: np.ndarray, under: np.ndarray) -> float:
    """Nats a token of text with token ``counts`` (V,) under the unigram distribution of ``under`` (V,).

    Witten-Bell smoothing: with N tokens of T kinds, p(w) = (count(w) + T / V) / (N + T) (Witten and Bell, 1991).
    """
    kinds = int((under > 0).sum())
    p = (under + kinds / len(under)) / (under.sum() + kinds)
    return float(-(counts * np.log(p)).sum() / counts.sum())
