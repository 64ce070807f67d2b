"""Positions that are added, from the host in float64 and rounded once: sinusoids to embeddings, slopes to scores."""

import numpy as np

from mlxgpt.common.config import ModelConfig


def sinusoids(config: ModelConfig) -> np.ndarray:
    """What is added to the embedding at each position, times position_multiplier: float32 (block_size, C).

    With frequencies theta^(-2i / C) of i = 0 to C / 2 - 1 (Vaswani et al. 2017, section 3.5), pairs: sin and cos of one
    frequency are neighbors; halves: all sines, then all cosines. span: as halves, but from 1 down to 1 / theta itself,
    theta^(-i / (C / 2 - 1)), as tensor2tensor, fairseq and mlx.nn.SinusoidalPositionalEncoding have it.
    """
    half = config.n_embd // 2
    steps = max(half - 1, 1) if config.sinusoid == "span" else half
    angles = np.arange(config.block_size, dtype=np.float64)[:, None] * config.rope_theta ** (-np.arange(half) / steps)
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=2 if config.sinusoid == "pairs" else 1)
    return (config.position_multiplier * waves.reshape(config.block_size, config.n_embd)).astype(np.float32)


def slopes(n_head: int) -> np.ndarray:
    """ALiBi's slope of each head (Press et al. 2022), float32 (n_head,).

    2^(-8 i / n) of i = 1 to n where n is a power of two; else those of the power below, and of the power above every
    other one.
    """
    below = 1 << (n_head.bit_length() - 1)
    powers = [i / below for i in range(1, below + 1)] + [i / (2 * below) for i in range(1, 2 * (n_head - below), 2)]
    return (2.0 ** (-8 * np.array(powers))).astype(np.float32)
