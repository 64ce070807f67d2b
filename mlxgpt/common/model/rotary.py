"""Rotary tables from the host, in float64 and rounded once: both frameworks turn by the same angles.

Those of longrope and dynamic depend on the length of the sequence: the last position that it has in a call, and one.
"""

import math

import numpy as np

from mlxgpt.common.config import ModelConfig


def by_length(config: ModelConfig) -> bool:
    """Whether frequencies depend on the length of the sequence."""
    return config.rope_scaling in ("longrope", "dynamic")


def frequencies(config: ModelConfig, local: bool = False, length: int = 0) -> np.ndarray:
    """Radians a position of each pair, float64 (rotary_dim / 2,).

    ``local``: of the layers with a window. ``length``: tokens of the sequence, where that counts.

    theta^(-2i / d) (Su et al. 2021, RoFormer). Linear scaling divides all of them (Chen et al. 2023); llama3 those
    whose wavelength is over original / low, and mixes in between up to original / high (Llama 3.1's reference code);
    yarn mixes by dimension between those that turn beta_slow and beta_fast times in the original context (Peng et al.
    2023); dynamic grows theta with what is beyond the original context (NTK, Peng et al. 2023, appendix B); longrope
    divides by one of two lists (Ding et al. 2024).
    """
    d, original, kind = config.rotary_dim, config.rope_original, config.rope_scaling
    theta = config.rope_local_theta if local and config.rope_local_theta else config.rope_theta
    plain = bool(local and config.rope_local_theta) or kind == "none"
    if kind == "dynamic" and not plain:
        theta *= (config.rope_factor * max(length, original) / original - config.rope_factor + 1) ** (d / (d - 2))
    inverse = theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    if plain or kind == "dynamic":
        return inverse
    if kind == "linear":
        return inverse / config.rope_factor
    if kind == "longrope":
        return inverse / np.array(config.rope_long if length > original else config.rope_short)
    if kind == "yarn":
        kept = 1 - _ramp(config)
    else:
        turns = original * inverse / (2 * np.pi)
        kept = np.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
    return inverse * (kept + (1 - kept) / config.rope_factor)


def _ramp(config: ModelConfig) -> np.ndarray:
    """0 for the pairs that yarn keeps, 1 for those that it slows down, between them in a line; (rotary_dim / 2,)."""
    d = config.rotary_dim

    def pair(turns: float) -> float:
        """The pair, as a real number, that turns so often in the original context."""
        return d * math.log(config.rope_original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair(config.rope_beta_fast), pair(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    return np.clip((np.arange(d // 2) - low) / (high - low or 0.001), 0, 1)


def attention(config: ModelConfig) -> float:
    """What cos and sin are multiplied by: rope_attention, or what follows from how much longer sequences become."""
    if config.rope_attention or config.rope_scaling not in ("yarn", "longrope"):
        return config.rope_attention or 1.0
    factor = config.rope_factor if config.rope_scaling == "yarn" else config.block_size / config.rope_original
    return usual_attention(config.rope_scaling, factor, config.rope_original)


def usual_attention(kind: str, factor: float, original: int, scale: float = 1.0) -> float:
    """yarn: 0.1 scale ln(factor) + 1. longrope: sqrt(1 + ln(factor) / ln(original)). 1 where nothing is longer."""
    if factor <= 1:
        return 1.0
    if kind == "yarn":
        return 0.1 * scale * math.log(factor) + 1
    return math.sqrt(1 + math.log(factor) / math.log(original))


def tables(config: ModelConfig, local: bool = False) -> tuple[np.ndarray, ...]:
    """cos and sin of position * frequency as float32 (block_size, rotary_dim / 2).

    longrope: those of short sequences, and below them those of long ones, (2 block_size, rotary_dim / 2). dynamic: the
    frequencies alone, a row for each length from the original context on, since no table could hold all angles.
    """
    fixed = bool(local and config.rope_local_theta)
    lengths = (config.rope_original, config.rope_original + 1) if config.rope_scaling == "longrope" else (0,)
    if config.rope_scaling == "dynamic":
        lengths = range(config.rope_original, max(config.block_size, config.rope_original) + 1)
    rates = [frequencies(config, local, length) for length in lengths]
    if config.rope_scaling == "dynamic":
        return (np.array(rates, np.float32),)
    scale = 1.0 if fixed else attention(config)
    positions = np.arange(config.block_size, dtype=np.float64)[:, None]
    angles = np.concatenate([positions * each[None, :] for each in rates])
    return tuple((turn(angles) * scale).astype(np.float32) for turn in (np.cos, np.sin))


def table_bytes(config: ModelConfig) -> int:
    """Bytes of the tables of layers with a window and of those without."""
    if config.position != "rope":
        return 0
    if config.rope_scaling == "dynamic":
        return 4 * config.rotary_dim * (max(config.block_size - config.rope_original, 0) + 1)
    return 4 * 2 * config.block_size * config.rotary_dim * (2 if config.rope_scaling == "longrope" else 1)
