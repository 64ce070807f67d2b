"""Random bits without a generator: a counter hash, integer arithmetic only, the same bits in both frameworks.

The mixer is lowbias32 (Chris Wellons, hash-prospector). The bits of element e of row r under a 32-bit key are
``mix(e ^ mix(r + key))``: a pure function, so a resumed run or another micro-batch draws what it would have drawn.
"""

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxgpt.common import rng
from mlxgpt.layers import Array, Dropout

SITES = 3  # of a block: attention weights, attention output, MLP output; site 0 of a model is the embedding


def mix(x: Array) -> Array:
    """lowbias32 on every element; uint32 in and out."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


def bits_at(key: Array, first_row: Array, rows: int, elements: Array) -> Array:
    """24 random bits of each row's ``elements``, uint32 (rows, ...); rows count from ``first_row``; uint32 scalars."""
    each = mix(mx.arange(rows, dtype=mx.uint32) + first_row + key)
    return mix(elements[None] ^ each.reshape(-1, *[1] * elements.ndim)) >> 8


def bits(key: Array, first_row: Array, shape: tuple[int, ...]) -> Array:
    """24 random bits an element, uint32 of ``shape``; axis 0 counts rows from ``first_row``; uint32 scalars."""
    size = 1
    for n in shape[1:]:
        size *= n
    return bits_at(key, first_row, shape[0], mx.arange(size, dtype=mx.uint32)).reshape(shape)


def dropout(x: Array, rate: float, key: Array, first_row: Array, elements: Array | None = None) -> Array:
    """Zeroes a share ``rate`` of the elements and scales the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    ``elements``: where those of a row lie in a larger array, of which x is a part; all of its rows are in x.
    """
    if elements is None:
        drawn = bits(key, first_row, x.shape)
    else:
        drawn = bits_at(key, first_row, x.shape[0], elements).reshape(x.shape)
    return mx.where(drawn >= mx.array(int(rate * 2**24), mx.uint32), x * (1 / (1 - rate)), mx.array(0, x.dtype))


def neftune(x: Array, alpha: float, key: Array, first_row: Array, segments: Array | None) -> Array:
    """Embeddings x (B, T, C) plus alpha / sqrt(L C) times noise from [-1, 1) (Jain et al. 2023, NEFTune).

    L is the number of tokens of the segment that a token is in, T where a row is one segment.
    """
    if segments is None:
        length = x.shape[1]
    else:
        length = (segments[:, :, None] == segments[:, None, :]).sum(axis=-1, keepdims=True)  # (B, T, 1)
    uniform = bits(key, first_row, x.shape).astype(mx.float32) * 2**-23 - 1
    return x + (uniform * (alpha / (length * x.shape[-1]) ** 0.5)).astype(x.dtype)


class Masks(nn.Module):
    """The dropout of a model that is called without an engine: masks are a function of (seed, number of the call)."""

    def __init__(self, rate: float, seed: int, n_layer: int):
        super().__init__()
        self.rate = rate
        keys = [rng.key32(seed, "call-dropout", site) for site in range(1 + SITES * n_layer)]
        self._sites, self._calls = mx.array(np.array(keys, np.uint32)), mx.array(0, mx.uint32)

    def draw(self) -> Dropout:
        """The masks of the next call; the count is on the device, so that a compiled step goes on counting."""
        keys, zero = mix(self._sites ^ mix(self._calls)), mx.zeros_like(self._calls)
        self._calls = self._calls + 1
        return Dropout(self.rate, keys, zero, 0.0, zero, 0.0, keys[:0])
