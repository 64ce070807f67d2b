"""Rotary tables from the host, in float64 and rounded once: both frameworks turn by the same angles."""

import numpy as np

from mlxgpt.common.config import ModelConfig


def tables(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position * theta^(-2i / D) as float32 (block_size, D / 2) (Su et al. 2021, RoFormer)."""
    inverse = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    angles = np.arange(config.block_size, dtype=np.float64)[:, None] * inverse[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
