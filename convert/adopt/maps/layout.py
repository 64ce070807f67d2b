"""How one of their tensors lies, as a rule's ``axes`` say: its shape, and its parts as ours and back.

What a letter is worth follows from our shape: the letters of heads (g, h, d) make up a matrix's outputs, or the inputs
of attn.c_proj, beside o and i.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convert.adopt.rules import Rule, has_number, named
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.model import params

LETTERS = "oihdnpg1"
_KEYS = ("k_proj", "v_proj", "k_norm")  # what has n_kv_head heads


@dataclass(frozen=True)
class Piece:
    """One of our tensors in one of theirs: its shape, and the einops pattern of the part of theirs that it is."""

    shape: tuple[int, ...]
    left: str
    right: str
    sizes: Mapping[str, int]
    rows: int  # how much of the axis of pieces it takes, within each of what stands before p


@dataclass(frozen=True)
class Layout:
    """How one of their tensors (all heads' of one name) holds pieces of ours; ``axis`` is the one with p, or None."""

    rule: Rule
    shape: tuple[int, ...]
    axis: int | None
    outer: int  # what stands before p in its axis
    pieces: tuple[Piece, ...]
    stacked: bool  # n is an axis
    heads: int  # tensors a head; 0: one

    @property
    def one(self) -> tuple[int, ...]:
        """The shape of one tensor of theirs."""
        return self.shape[1:] if self.heads else self.shape

    def apart(self, theirs: np.ndarray) -> list[np.ndarray]:
        """The pieces, with the blocks first where they are stacked."""
        if self.axis is None:
            parts = [theirs]
        else:
            shape = theirs.shape
            split = theirs.reshape(*shape[: self.axis], self.outer, -1, *shape[self.axis + 1 :])
            ends = np.cumsum([piece.rows for piece in self.pieces])[:-1]
            parts = np.split(split, ends, axis=self.axis + 1)
        return [
            _rearrange(part, piece.left, piece.right, piece.sizes)
            for part, piece in zip(parts, self.pieces, strict=True)
        ]

    def together(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of ``apart``."""
        parts = [
            _rearrange(part, piece.right, piece.left, piece.sizes)
            for part, piece in zip(pieces, self.pieces, strict=True)
        ]
        whole = parts[0] if self.axis is None else np.concatenate(parts, axis=self.axis + 1)
        return np.ascontiguousarray(whole).reshape(self.shape)


def _rearrange(array: np.ndarray, left: str, right: str, sizes: Mapping[str, int]) -> np.ndarray:
    import einops

    return einops.rearrange(array, f"{left} -> {right}", **sizes)


def layout(rule: Rule, config: ModelConfig, table: Mapping[str, params.Param]) -> Layout:
    """How a rule's tensors lie in a model.

    Raises:
        UserError: names the rule: a letter or parenthesis that is none, a name that is not ours, sizes that do not fit.
    """
    shapes = []
    for name in rule.to:
        ours = named(name)
        if ours not in table:
            raise UserError(f"{rule.theirs}: {name} is no tensor of this model{nearest(ours, table)}")
        shapes.append(tuple(table[ours].shape))
    if len({len(shape) for shape in shapes}) != 1:
        raise UserError(f"{rule.theirs}: {' and '.join(rule.to)} are not alike: expected all matrices or all vectors")
    by_head = has_number(rule.theirs, "h")
    groups = parse(rule, len(shapes[0]), by_head)
    letters = [letter for group in groups for letter in group]
    stacked = "n" in letters
    if stacked == has_number(rule.theirs, "n") and any(has_number(name, "n") for name in rule.to):
        raise UserError(f"{rule.theirs}: expected either {{n}} in its name or n in axes {rule.axes!r}")
    sizes = [_sizes(rule, name, shape, letters, config) for name, shape in zip(rule.to, shapes, strict=True)]
    axis = next((at for at, group in enumerate(groups) if "p" in group), None)
    if (axis is None) != (len(rule.to) == 1):
        raise UserError(
            f"{rule.theirs}: axes {rule.axes!r} for {len(rule.to)} pieces: expected p once, if there are several"
        )
    before = groups[axis][: groups[axis].index("p")] if axis is not None else []
    after = groups[axis][groups[axis].index("p") + 1 :] if axis is not None else []
    for letter in set(letters) - set(after) - {"p", "1"}:
        if axis is not None and len({size[letter] for size in sizes}) > 1:
            raise UserError(f"{rule.theirs}: axes {rule.axes!r}: {letter} differs between pieces: expected it after p")
    pieces = []
    for name, shape, size in zip(rule.to, shapes, sizes, strict=True):
        shown = [_group(group) for group in groups]
        if axis is not None:
            shown[axis : axis + 1] = [_group(before), _group(after)]
        rows = math.prod(size[letter] for letter in after)
        used = {letter: value for letter, value in size.items() if letter in letters and letter != "1"}
        pieces.append(Piece(shape, " ".join(shown), _right(name, shape, letters, stacked), used, rows))
    whole = []
    for at, group in enumerate(groups):
        outer = math.prod(sizes[0][letter] for letter in (before if at == axis else group) if letter not in "1p")
        whole.append(outer * sum(piece.rows for piece in pieces) if at == axis else outer)
    heads = sizes[0]["h"] if by_head else 0
    return Layout(rule, tuple(whole), axis, math.prod(sizes[0][each] for each in before), tuple(pieces), stacked, heads)


def _group(letters: Sequence[str]) -> str:
    return f"({' '.join(letters)})" if len(letters) > 1 else letters[0] if letters else "1"


def parse(rule: Rule, ndim: int, by_head: bool) -> list[list[str]]:
    """The letters of each axis; that of tensors a head stands before them."""
    several = len(rule.to) > 1
    if rule.axes:
        axes = rule.axes
    elif by_head:
        axes = f"{'(p d)' if several else 'd'}{' i' * (ndim == 2)}"
    else:
        axes = f"{'(p o)' if several else 'o'}{' i' * (ndim == 2)}"
    words = re.findall(r"\([^()]*\)|\S+", axes)
    groups = [list(word.strip("()").replace(" ", "")) for word in words]
    whole = re.fullmatch(r"\s*(\(\s*\w(\s*\w)*\s*\)|\w)(\s+(\(\s*\w(\s*\w)*\s*\)|\w))*\s*", axes)
    letters = [letter for group in groups for letter in group]
    strange = next((letter for letter in letters if letter not in LETTERS), None)
    if strange or not whole:
        what = f"unknown letter {strange!r}" if strange else "not letters and parentheses with spaces between axes"
        raise UserError(
            f"{rule.theirs}: axes {rule.axes!r}: {what}: expected such as '(p o) i', of {' '.join(LETTERS)}"
        )
    twice = next((letter for letter in letters if letter != "1" and letters.count(letter) > 1), None)
    if twice:
        raise UserError(f"{rule.theirs}: axes {rule.axes!r}: {twice} is there twice")
    if by_head and "h" in letters:
        raise UserError(f"{rule.theirs}: axes {rule.axes!r}: h is in the name already")
    if any(len(group) > 1 and "1" in group for group in groups):
        raise UserError(f"{rule.theirs}: axes {rule.axes!r}: 1 stands alone, outside of parentheses")
    return [["h"], *groups] if by_head else groups


def _inside(name: str) -> bool:
    """Whether the heads are a matrix's inputs."""
    return name.endswith("attn.c_proj.weight")


def heads_of(name: str, config: ModelConfig) -> int:
    """How many heads one of our tensors of attention has."""
    return config.n_kv_head if name.split(".")[-2] in _KEYS else config.n_head


def _sizes(
    rule: Rule, name: str, shape: tuple[int, ...], letters: Sequence[str], config: ModelConfig
) -> dict[str, int]:
    """What each letter is worth for a piece."""
    heads = heads_of(name, config)
    made = {"n": config.n_layer, "1": 1}
    if "g" in letters:
        made["g"] = config.n_kv_head
    if "h" in letters:
        made["h"] = heads // config.n_kv_head if "g" in letters else heads
    sides = {"o": shape[0]} | ({"i": shape[1]} if len(shape) == 2 else {})
    at_heads = "i" if _inside(name) else "o"
    rest = sides[at_heads]
    for letter in "gh":
        if letter in letters:
            if rest % made[letter]:
                raise UserError(
                    f"{rule.theirs}: axes {rule.axes!r}: {letter} = {made[letter]} does not divide {rest} of {name}"
                )
            rest //= made[letter]
    if "d" in letters:
        made["d"] = rest
        rest = 1
    sides[at_heads] = rest
    for letter, size in sides.items():
        if letter in letters:
            made[letter] = size
        elif size != 1:
            raise UserError(f"{rule.theirs}: axes {rule.axes!r}: {letter} is missing, of which {name} has {shape}")
    extra = next((letter for letter in letters if letter not in made and letter != "p"), None)
    if extra:
        raise UserError(f"{rule.theirs}: axes {rule.axes!r}: {name} is a vector {list(shape)}, which has no {extra}")
    return made


def _right(name: str, shape: tuple[int, ...], letters: Sequence[str], stacked: bool) -> str:
    """Our layout in einops' words."""
    heads = [letter for letter in "ghd" if letter in letters]
    out, into = ["o"] if "o" in letters else [], ["i"] if "i" in letters else []
    if _inside(name):
        into = heads + into
    else:
        out = heads + out
    sides = [out, into] if len(shape) == 2 else [out]
    return " ".join([*(["n"] if stacked else []), *(_group(side) for side in sides)])
