"""Random bits without a generator: a counter hash, integer arithmetic only, the same bits in both frameworks.

The mixer is lowbias32 (Chris Wellons, hash-prospector). The bits of element e of row r under a 32-bit key are
``mix(e ^ mix(r + key))``: a pure function, so a resumed run or another micro-batch draws what it would have drawn.
torch has no uint32 arithmetic, so int32 stands for it: it wraps alike, and a mask makes the shifts logical.
"""

import numpy as np
import torch
import torch.nn as nn

from mlxgpt.common import rng
from torch_ref.layers import Array, Dropout

SITES = 3  # of a block: attention weights, attention output, MLP output; site 0 of a model is the embedding


def mix(x: Array) -> Array:
    """lowbias32 on every element; int32 in and out."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def bits_at(key: Array, first_row: Array, rows: int, elements: Array) -> Array:
    """24 random bits of each row's ``elements``, int32 (rows, ...); rows count from ``first_row``; int32 scalars."""
    each = mix(torch.arange(rows, dtype=torch.int32, device=key.device) + first_row + key)
    return (mix(elements[None] ^ each.reshape(-1, *[1] * elements.ndim)) >> 8) & 0xFFFFFF


def bits(key: Array, first_row: Array, shape: tuple[int, ...]) -> Array:
    """24 random bits an element, int32 of ``shape``; axis 0 counts rows from ``first_row``; int32 scalars."""
    size = 1
    for n in shape[1:]:
        size *= n
    return bits_at(key, first_row, shape[0], torch.arange(size, dtype=torch.int32, device=key.device)).reshape(shape)


def dropout(x: Array, rate: float, key: Array, first_row: Array, elements: Array | None = None) -> Array:
    """Zeroes a share ``rate`` of the elements and scales the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    ``elements``: where those of a row lie in a larger array, of which x is a part; all of its rows are in x.
    """
    if elements is None:
        drawn = bits(key, first_row, x.shape)
    else:
        drawn = bits_at(key, first_row, x.shape[0], elements).reshape(x.shape)
    return torch.where(
        drawn >= int(rate * 2**24), x * (1 / (1 - rate)), torch.zeros((), dtype=x.dtype, device=x.device)
    )


def neftune(x: Array, alpha: float, key: Array, first_row: Array, segments: Array | None) -> Array:
    """Embeddings x (B, T, C) plus alpha / sqrt(L C) times noise from [-1, 1) (Jain et al. 2023, NEFTune).

    L is the number of tokens of the segment that a token is in, T where a row is one segment.
    """
    if segments is None:
        length = x.shape[1]
    else:
        length = (segments[:, :, None] == segments[:, None, :]).sum(dim=-1, keepdim=True)  # (B, T, 1)
    uniform = bits(key, first_row, x.shape).to(torch.float32) * 2**-23 - 1
    return x + (uniform * (alpha / (length * x.shape[-1]) ** 0.5)).to(x.dtype)


class Masks(nn.Module):
    """The dropout of a model that is called without an engine: masks are a function of (seed, number of the call)."""

    _sites: Array
    _calls: Array

    def __init__(self, rate: float, seed: int, n_layer: int):
        super().__init__()
        self.rate = rate
        keys = [rng.key32(seed, "call-dropout", site) for site in range(1 + SITES * n_layer)]
        sites = torch.from_numpy(np.array(keys, np.uint32).view(np.int32))
        self.register_buffer("_sites", sites, persistent=False)
        self.register_buffer("_calls", torch.tensor(0, dtype=torch.int32), persistent=False)

    def draw(self) -> Dropout:
        """The masks of the next call; the count is on the device, so that a compiled step goes on counting."""
        keys, zero = mix(self._sites ^ mix(self._calls)), torch.zeros_like(self._calls)
        self._calls = self._calls + 1
        return Dropout(self.rate, keys, zero, 0.0, zero, 0.0, keys[:0])
