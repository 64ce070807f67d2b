"""Tiny models of every family: what folder, family and parity tests run on."""

from typing import Any

import numpy as np

from mlxgpt.common import params, rng
from mlxgpt.common.config import ModelConfig, build

SIZES: dict[str, Any] = dict(n_layer=2, n_head=4, n_embd=48, block_size=32, vocab_size=80)
NO_BIAS: dict[str, Any] = dict(qkv_bias=False, out_bias=False, mlp_bias=False, norm_bias=False)


def tiny(**model: Any) -> ModelConfig:
    """A model of 2 layers and width 48, with the family's choices and these."""
    return build({"model": SIZES | model}).model


CASES: dict[str, ModelConfig] = {
    "gpt2": tiny(family="gpt2"),
    "gpt2-untied": tiny(family="gpt2", tied=False, n_hidden=80),
    "gpt2-nobias-erf": tiny(family="gpt2", activation="gelu", **NO_BIAS),
    "llama": tiny(family="llama"),
    "llama-untied": tiny(family="llama", tied=False, rope_theta=5e5, norm_eps=1e-6),
    "llama-gqa": tiny(family="llama", n_kv_head=2, head_dim=16, n_hidden=72),
    "llama-bias": tiny(family="llama", qkv_bias=True, mlp_bias=True, activation="gelu_tanh"),
    "qwen3": tiny(family="qwen3", n_kv_head=2, head_dim=16),
    "qwen3-untied": tiny(family="qwen3", tied=False),
}


def weights(config: ModelConfig, seed: int = 1, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Weights in which no tensor is constant, so that none can be lost unseen; ``scale`` multiplies the matrices."""
    made = params.init_params(config, seed)
    for name, param in params.table(config).items():
        noise = rng.normal(seed, "noise", name, shape=param.shape, std=0.1)
        made[name] = made[name] * np.float32(scale) if param.std else made[name] + noise
    return made
