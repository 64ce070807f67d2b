"""The cache of keys and values, in MLX: as they are or in 8 or 4 bits; a window lets go of what it has passed.

Sizes in the comments: B rows, K key and value heads, T new tokens, S places, D head_dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt import affine
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.inference import kv_cache
from mlxgpt.common.inference.kv_cache import BLOCK
from mlxgpt.layers import Array


class Held(NamedTuple):
    """What a layer holds of one row: parts (1, K, S, n), whose first place is that of token ``begin``."""

    parts: list[Array]
    begin: int
    window: int  # of the layer; 0: none

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts)

    def reaches(self, tokens: int) -> bool:
        """Whether a text may go on after the first ``tokens``: whether all is here that the next one looks at."""
        return self.begin <= max(0, tokens - self.window + 1)

    def first(self, tokens: int) -> "Held":
        """Of the first ``tokens``, what is held."""
        assert self.reaches(tokens)
        return self._replace(parts=[part[:, :, : tokens - self.begin] for part in self.parts])

    def last(self, most: int) -> "Held":
        """At most the last so many."""
        left = max(0, self.parts[0].shape[2] - most)
        return self._replace(parts=[part[:, :, left:] for part in self.parts], begin=self.begin + left)


class Cache:
    """Keys and values of one layer, of up to ``length`` tokens of each row, in arrays that grow by blocks.

    ``lengths`` say how many tokens of each row were read, ``begins`` which of them is the first that is held, at place
    0: the first of all, unless a window has passed it. What stands behind a row's tokens is not looked at.

    Args:
        window: tokens that a query looks at, itself included; 0: all.
        bits: 8 or 4, in MLX's affine format along D; 0 holds keys and values as they are.
    """

    starts: Array | None = None  # (B,) the places at which rows go on, if they differ

    def __init__(self, batch: int, length: int, config: ModelConfig, dtype: mx.Dtype, window: int = 0, bits: int = 0):
        self.length, self.window = length, window if window < length else 0
        self.bits, self.group_size = bits, kv_cache.group_size(config.head_dim, bits)
        self.lengths, self.begins = [0] * batch, [0] * batch
        self._dtype = dtype
        zeros = self._narrow(mx.zeros((1, config.n_kv_head, 1, config.head_dim), dtype))
        empty = [mx.zeros((batch, part.shape[1], 0, part.shape[3]), part.dtype) for part in zeros]
        self.parts = [*empty, *empty]  # of keys, then of values: (B, K, S, n)

    @property
    def offset(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def places(self) -> list[int]:
        """How many places each row takes."""
        return [length - begin for length, begin in zip(self.lengths, self.begins, strict=True)]

    @property
    def held(self) -> int:
        """Places that the fullest row takes."""
        return max(self.places, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(part.nbytes for part in self.parts)

    def make_room(self, tokens: int) -> None:
        """Before ``tokens`` are appended; see the function of this name."""
        assert self.offset + tokens <= self.length
        keep, shifts = kv_cache.kept(self.window), [0] * len(self.lengths)
        if self.window and self.held + tokens > keep + BLOCK:
            shifts = [max(0, places - keep) for places in self.places]
        if not any(shifts) and self.held + tokens <= self.parts[0].shape[2]:
            return
        self.begins = [begin + shift for begin, shift in zip(self.begins, shifts, strict=True)]
        room = self._room(self.held + tokens, any(shifts))
        self.parts = [self._moved(part, shifts, self.held, room) for part in self.parts]

    def append(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Holds k and v (B, K, T, D) as well, for which there is room; returns all that is held (B, K, S, D)."""
        start, end = self.held, self.held + k.shape[2]
        for part, new in zip(self.parts, [*self._narrow(k), *self._narrow(v)], strict=True):
            if self.starts is None:
                part[:, :, start:end] = new
            else:
                rows, places = mx.arange(len(k))[:, None], self.starts[:, None] + mx.arange(k.shape[2])
                part[rows, :, places] = new.swapaxes(1, 2)
        self.lengths = [length + k.shape[2] for length in self.lengths]
        held, half = [part[:, :, :end] for part in self.parts], len(self.parts) // 2
        return self._wide(held[:half]), self._wide(held[half:])

    def cut(self, tokens: int) -> None:
        """Leaves every row its first ``tokens``, which ``reaches`` allows."""
        assert self.reaches(tokens)
        self.lengths = [tokens] * len(self.lengths)
        self.begins = self.begins if tokens else [0] * len(self.begins)

    def reaches(self, tokens: int) -> bool:
        """Whether every row may go on after its first ``tokens``; none can be read anew from its beginning: 0 may."""
        return not tokens or max(self.begins) <= max(0, tokens - self.window + 1)

    def hold(self, held: Held) -> None:
        """Begins the only row with what another cache held of it."""
        self.parts, self.begins = held.parts, [held.begin]
        self.lengths = [held.begin + held.parts[0].shape[2]]

    def join(self, held: Held, count: int) -> None:
        """Adds a row ``count`` times."""
        held = held.last(kv_cache.kept(self.window)) if self.window else held
        old, new = self.held, held.parts[0].shape[2]
        room = self._room(max(old, new) + 1, False)
        self.parts = [
            _joined(part[:, :, :old], each, count, room) for part, each in zip(self.parts, held.parts, strict=True)
        ]
        self.lengths = self.lengths + [held.begin + new] * count
        self.begins = self.begins + [held.begin] * count

    def take(self, source: "Cache", rows: Sequence[int], index: Array, lengths: Sequence[int], tokens: int) -> None:
        """Begins each row with the first tokens, ``lengths``, of a row of another cache; ``index`` are its rows.

        There is room for ``tokens`` more where the other has it, which spares a copy.
        """
        self.begins, self.lengths = [source.begins[row] for row in rows], list(lengths)
        end = self.held + tokens
        self.parts = [part[:, :, :end][index] for part in source.parts]

    def keep(self, rows: Sequence[int], index: Array) -> None:
        """The rows that stay; ``index`` (n,) are the same on the device."""
        self.parts = [part[index] for part in self.parts]
        self.lengths, self.begins = [self.lengths[row] for row in rows], [self.begins[row] for row in rows]

    def row(self, row: int, tokens: int) -> Held:
        """What is held of the first tokens of a row, in memory of its own."""
        end = tokens - self.begins[row]
        return Held([mx.contiguous(part[row : row + 1, :, :end]) for part in self.parts], self.begins[row], self.window)

    def only(self) -> Held:
        """What is held of the only row."""
        return Held([part[:, :, : self.held] for part in self.parts], self.begins[0], self.window)

    def _room(self, places: int, passed: bool) -> int:
        """Places of arrays in which so many are needed; ``passed``: the window has let go of others."""
        room = -(-places // BLOCK) * BLOCK
        if self.window:
            most = kv_cache.kept(self.window) + BLOCK
            room = max(places, most if passed else min(room, most))
        return min(self.length, room)

    def _moved(self, part: Array, shifts: Sequence[int], places: int, room: int) -> Array:
        """The first ``places`` behind each row's shift, in an array that has room."""
        more = mx.zeros((*part.shape[:2], room - places, part.shape[3]), part.dtype)
        if not places:
            return more
        if len(set(shifts)) == 1:
            return mx.concatenate([part[:, :, shifts[0] : shifts[0] + places], more], axis=2)
        moved = [part[row : row + 1, :, shift : shift + places] for row, shift in enumerate(shifts)]
        return mx.concatenate([mx.concatenate(moved), more], axis=2)

    def _narrow(self, x: Array) -> list[Array]:
        """What is held of keys or values (B, K, T, D): (B, K, T, n) each."""
        return list(affine.quantize(x, self.bits, self.group_size)) if self.bits else [x]

    def _wide(self, parts: list[Array]) -> Array:
        """Keys or values (B, K, T, D) of what is held."""
        if not self.bits:
            return parts[0]
        words, scales, biases = parts
        return affine.dequantize(words, scales, biases, self.bits, self.group_size).astype(self._dtype)


def make_room(cache: Sequence[Cache], tokens: int) -> None:
    """Makes room for so many more tokens of each row; layers that hold alike share the places at which rows go on."""
    found: dict[tuple[int, ...], Array | None] = {}
    for layer in cache:
        layer.make_room(tokens)
        places = tuple(layer.places)
        if places not in found:
            found[places] = mx.array(places) if len(set(places)) > 1 else None
        layer.starts = found[places]


def _joined(old: Array, new: Array, count: int, room: int) -> Array:
    """Rows (B, K, S, n) and ``count`` times a row, in an array with room for more."""
    parts = [old] if len(old) else []
    parts.append(mx.repeat(new, count, axis=0) if count > 1 else new)
    return mx.concatenate([mx.pad(each, [(0, 0), (0, 0), (0, room - each.shape[2]), (0, 0)]) for each in parts])
