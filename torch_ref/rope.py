"""cos and sin of rotary positions, in PyTorch, from the tables of common/model/rotary.py.

Sizes in the comments: B rows, T tokens, d dimensions of a head that turn.
"""

from collections.abc import Sequence

import torch

from mlxgpt.common.config import ModelConfig
from torch_ref.layers import Array


def lengths(positions: Array, segments: Array | None) -> Array:
    """How long the sequence of each token is: its last position, and one. (1,) or (B, 1); by segments (B, T)."""
    if segments is None:
        return positions.amax(dim=-1, keepdim=True) + 1
    B, T = segments.shape
    ends = torch.cat([segments[:, 1:] != segments[:, :-1], segments.new_ones(B, 1, dtype=torch.bool)], dim=1)
    places = torch.where(ends, torch.arange(T, device=ends.device), T).flip(1)
    last = places.cummin(dim=1).values.flip(1)  # where each token's segment ends
    return positions.expand(B, T).gather(1, last) + 1


def turn(config: ModelConfig, tables: Sequence[Array], positions: Array, lengths: Array | None) -> tuple[Array, Array]:
    """cos and sin (..., T, d / 2) at the positions (..., T); ``lengths`` where the frequencies depend on them."""
    if lengths is None:
        return tables[0][positions], tables[1][positions]
    if config.rope_scaling == "dynamic":
        beyond = lengths.clamp(config.rope_original, config.block_size) - config.rope_original
        angles = positions[..., None].to(tables[0].dtype) * tables[0][beyond]
        return torch.cos(angles), torch.sin(angles)
    positions = positions + config.block_size * (lengths > config.rope_original)
    return tables[0][positions], tables[1][positions]
