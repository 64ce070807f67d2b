"""Bytes: what a framework's footprint says of a training step, by component, and what fits."""

from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """Memory that was held at the peak: whose it is, where that is known, the array's shape, and bytes."""

    label: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Footprint:
    """The most bytes that a step holds at a time, and what they are."""

    peak: int
    pieces: list[Piece]
