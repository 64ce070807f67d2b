"""Rotary tables from the host, in float64 and rounded once: both frameworks turn by the same angles."""

import numpy as np

from mlxgpt.common.config import ModelConfig


def frequencies(config: ModelConfig, local: bool = False) -> np.ndarray:
    """Radians a position of each pair, float64 (rotary_dim / 2,); ``local``: of the layers with a window.

    theta^(-2i / d) (Su et al. 2021, RoFormer). Linear scaling divides all of them (Chen et al. 2023); llama3 those
    whose wavelength is over original / low, and mixes in between up to original / high (Llama 3.1's reference code).
    """
    theta = config.rope_local_theta if local and config.rope_local_theta else config.rope_theta
    inverse = theta ** (-np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim)
    if (local and config.rope_local_theta) or config.rope_scaling == "none":
        return inverse
    if config.rope_scaling == "linear":
        return inverse / config.rope_factor
    turns = config.rope_original * inverse / (2 * np.pi)
    kept = np.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
    return inverse * (kept + (1 - kept) / config.rope_factor)


def tables(config: ModelConfig, local: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position * frequency as float32 (block_size, rotary_dim / 2)."""
    angles = np.arange(config.block_size, dtype=np.float64)[:, None] * frequencies(config, local)[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
