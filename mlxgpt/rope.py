"""cos and sin of rotary positions, in MLX, from the tables of common/model/rotary.py.

Sizes in the comments: B rows, T tokens, d dimensions of a head that turn.
"""

from collections.abc import Sequence

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt.common.config import ModelConfig
from mlxgpt.layers import Array


def lengths(positions: Array, segments: Array | None) -> Array:
    """How long the sequence of each token is: its last position, and one. (1,) or (B, 1); by segments (B, T)."""
    if segments is None:
        return positions.max(axis=-1, keepdims=True) + 1
    B, T = segments.shape
    ends = mx.concatenate([segments[:, 1:] != segments[:, :-1], mx.ones((B, 1), dtype=mx.bool_)], axis=1)
    last = mx.cummin(mx.where(ends, mx.arange(T), T), axis=1, reverse=True)  # where each token's segment ends
    return mx.take_along_axis(mx.broadcast_to(positions, (B, T)), last, axis=1) + 1


def turn(config: ModelConfig, tables: Sequence[Array], positions: Array, lengths: Array | None) -> tuple[Array, Array]:
    """cos and sin (..., T, d / 2) at the positions (..., T); ``lengths`` where the frequencies depend on them."""
    if lengths is None:
        return tables[0][positions], tables[1][positions]
    if config.rope_scaling == "dynamic":
        beyond = mx.clip(lengths, config.rope_original, config.block_size) - config.rope_original
        angles = positions[..., None].astype(tables[0].dtype) * tables[0][beyond]
        return mx.cos(angles), mx.sin(angles)
    positions = positions + config.block_size * (lengths > config.rope_original).astype(mx.int32)
    return tables[0][positions], tables[1][positions]
