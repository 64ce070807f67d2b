"""What a calibration text gives a model's matrices: sums over its tokens, which calibrate.py gathers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import params
from mlxgpt.common.model.affine import Quantized

TOKENS = 4096  # that pass through a block at once
Weights = Mapping[str, np.ndarray | Quantized]
"""The model's parameters by name, or those of one place of it."""


@dataclass(frozen=True)
class Inputs:
    """What a matrix was given by the calibration text."""

    gram: np.ndarray  # (n_in, n_in) float64: the sum of x^T x
    mean: np.ndarray  # (n_in,) float64: the mean of |x|
    tokens: int


class Stream(NamedTuple):
    """A model's last part: the weights of ``head_names``, and what the last block gave, (N, T, C) float32."""

    weights: Weights
    x: np.ndarray


class Compared(NamedTuple):
    """Of two models on the same tokens, (N, T) float32 each: their losses in nats, and KL(before || after)."""

    before: np.ndarray
    after: np.ndarray
    kl: np.ndarray


class Sums:
    """Adds up, in float64, what float32 products of some tokens at a time give."""

    def __init__(self) -> None:
        self.gram: np.ndarray | float = 0.0
        self.total: np.ndarray | float = 0.0
        self.tokens = 0

    def add(self, gram: np.ndarray, total: np.ndarray, tokens: int) -> None:
        """x^T x (n_in, n_in) and the sums of |x| (n_in,) of so many tokens."""
        self.gram = self.gram + gram.astype(np.float64)
        self.total = self.total + total.astype(np.float64)
        self.tokens += tokens

    def inputs(self) -> Inputs:
        """What was added."""
        assert isinstance(self.gram, np.ndarray) and isinstance(self.total, np.ndarray)
        return Inputs(self.gram, self.total / self.tokens, self.tokens)


def batches(count: int, length: int, most: int = TOKENS) -> Iterator[slice]:
    """Slices of ``count`` rows of ``length`` tokens each, of at most ``most`` tokens or one row."""
    step = max(1, most // length)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def start_names(config: ModelConfig) -> list[str]:
    """The parameters that make what the first block is given."""
    return [name for name in params.table(config) if name.startswith(("wte.", "wpe.", "ln_e."))]


def block_names(config: ModelConfig, n: int) -> list[str]:
    """The parameters of block ``n``."""
    return [name for name in params.table(config) if name.startswith(f"h.{n}.")]


def head_names(config: ModelConfig) -> list[str]:
    """The parameters that make logits of what the last block gave."""
    first = ("ln_f.", "lm_head.", "score.") + (("wte.",) if config.tied else ())
    return [name for name in params.table(config) if name.startswith(first)]


def sites(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The matrices of a block by what they read, in the order in which they do: one of those with one input -> all."""
    qkv = ("attn.c_attn",) if config.fused_qkv else ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    mlp = ("mlp.c_gate_fc",) if config.fused_mlp else ("mlp.c_gate", "mlp.c_fc") if config.gated else ("mlp.c_fc",)
    return {group[0]: group for group in (qkv, ("attn.c_proj",), mlp, ("mlp.c_proj",))}


def held(weights: Weights, name: str) -> np.ndarray:
    """A parameter in float32."""
    each = weights[name]
    return each.dequantize() if isinstance(each, Quantized) else each.astype(np.float32, copy=False)
