"""Tiny models of every family: what folder, family and parity tests run on."""

from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build

SIZES: dict[str, Any] = dict(n_layer=2, n_head=4, n_embd=48, block_size=32, vocab_size=80)
NO_BIAS: dict[str, Any] = dict(qkv_bias=False, out_bias=False, mlp_bias=False, norm_bias=False)
LLAMA3: dict[str, Any] = dict(rope_scaling="llama3", rope_factor=8.0, rope_low=1.0, rope_high=4.0, rope_original=16)
LINEAR: dict[str, Any] = dict(rope_scaling="linear", rope_factor=4.0)
YARN: dict[str, Any] = dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16)
DYNAMIC: dict[str, Any] = dict(rope_scaling="dynamic", rope_factor=4.0, rope_original=16)
LONGROPE: dict[str, Any] = dict(rope_scaling="longrope", rope_original=24, rope_short=[1.0, 1.1, 1.3],
                                rope_long=[1.2, 3.0, 9.0], rotary_dim=6)  # fmt: skip
LONG: dict[str, Any] = dict(block_size=64)
WINDOW: dict[str, Any] = LONG | dict(window=12)


def tiny(**model: Any) -> ModelConfig:
    """A model of 2 layers and width 48, with the family's choices and these."""
    return build({"model": SIZES | model}).model


CASES: dict[str, ModelConfig] = {
    "gpt2": tiny(family="gpt2"),
    "gpt2-untied": tiny(family="gpt2", tied=False, n_hidden=80),
    "gpt2-nobias-erf": tiny(family="gpt2", activation="gelu", **NO_BIAS),
    "llama": tiny(family="llama"),
    "llama-untied": tiny(family="llama", tied=False, rope_theta=5e5, norm_eps=1e-6),
    "llama-llama3": tiny(family="llama", rope_theta=5e5, **LONG, **LLAMA3),
    "llama-gqa": tiny(family="llama", n_kv_head=2, head_dim=16, n_hidden=72),
    "llama-bias": tiny(family="llama", qkv_bias=True, mlp_bias=True, activation="gelu_tanh"),
    "qwen3": tiny(family="qwen3", n_kv_head=2, head_dim=16),
    "qwen3-untied": tiny(family="qwen3", tied=False),
    "mistral": tiny(family="mistral", n_kv_head=2, head_dim=16, tied=False, **WINDOW),
    "qwen2": tiny(family="qwen2", n_kv_head=2, **LONG),
    "gemma": tiny(family="gemma", n_kv_head=1, head_dim=16, **LONG),
    "gemma2": tiny(family="gemma2", n_kv_head=2, head_dim=16, attn_scale=12**-0.5, **WINDOW),
    "gemma3_text": tiny(family="gemma3_text", n_kv_head=2, head_dim=16, window_layers=[0], **WINDOW),
    "gpt_neox": tiny(family="gpt_neox", **LONG),
    "phi": tiny(family="phi", n_embd=128, n_kv_head=2, **LONG),
    "phi3": tiny(family="phi3", n_kv_head=2, tied=False, **LONG),
    "olmo2": tiny(family="olmo2", n_kv_head=2, tied=False, **LONG),
    "smollm3": tiny(family="smollm3", n_kv_head=2, no_rope=[1], **LONG),
    "granite": tiny(
        family="granite",
        n_kv_head=2,
        embed_multiplier=6.0,
        residual_multiplier=0.22,
        logit_scale=1 / 3,
        attn_scale=0.0625,
        tied=True,
        **LONG,
    ),
    "stablelm": tiny(family="stablelm", n_kv_head=2, qkv_bias=True, **LONG),
    "olmo": tiny(family="olmo", n_kv_head=2, tied=False, **LONG),
    "starcoder2": tiny(family="starcoder2", n_kv_head=2, qkv_bias=False, out_bias=False, mlp_bias=False, **WINDOW),
}

# what the families can say besides; at normal weights the attention of some is so flat that its gradients are rounding
VARIANTS: dict[str, ModelConfig] = {
    "llama-linear": tiny(family="llama", **LONG, **LINEAR),
    "mistral-full": tiny(family="mistral", **LONG),
    "qwen2-window": tiny(family="qwen2", n_kv_head=2, tied=False, window_layers=[1], **WINDOW),
    "qwen3-window": tiny(family="qwen3", n_kv_head=1, head_dim=16, window_layers=[1], **WINDOW),
    "gemma2-uncapped": tiny(family="gemma2", attn_softcap=0.0, final_softcap=0.0, **WINDOW),
    "gemma3_text-linear": tiny(
        family="gemma3_text", n_embd=64, n_layer=3, window_layers=[0, 1], attn_scale=20**-0.5, **WINDOW, **LINEAR
    ),
    "gemma3_text-softcap": tiny(family="gemma3_text", final_softcap=2.0, window=0),
    "gpt_neo": tiny(family="gpt_neo", **WINDOW),
    "gpt_neo-untied": tiny(
        family="gpt_neo", tied=False, n_hidden=80, activation="gelu", n_layer=3, window_layers=[0, 1], **WINDOW
    ),
    "gpt_neo-global": tiny(family="gpt_neo", window=0, **LONG),
    "gpt_neox-serial": tiny(family="gpt_neox", placement="pre", rotary_dim=12, activation="gelu_tanh", **LONG),
    "gpt_neox-nobias": tiny(family="gpt_neox", qkv_bias=False, out_bias=False, tied=True, n_hidden=80, **LONG),
    "phi-linear": tiny(family="phi", n_kv_head=2, head_dim=16, rotary_dim=10, **LONG, **LINEAR),
    "phi3-window": tiny(family="phi3", rotary_dim=6, **WINDOW),
    "llama-yarn": tiny(family="llama", rope_theta=100.0, **LONG, **YARN),
    "llama-dynamic": tiny(family="llama", n_kv_head=2, **LONG, **DYNAMIC),
    "qwen2-yarn-window": tiny(
        family="qwen2",
        n_kv_head=2,
        window_layers=[1],
        rope_attention=1.3,
        rope_truncate=False,
        rope_theta=100.0,
        **WINDOW,
        **YARN,
    ),
    "mistral-dynamic-window": tiny(family="mistral", n_kv_head=2, **WINDOW, **DYNAMIC),
    "gpt_neox-yarn": tiny(family="gpt_neox", rotary_dim=8, rope_beta_fast=8.0, rope_beta_slow=2.0, **LONG, **YARN),
    "phi3-longrope": tiny(family="phi3", n_kv_head=2, **LONG, **LONGROPE),
    "phi3-longrope-window": tiny(family="phi3", tied=False, rope_attention=1.5, **WINDOW, **LONGROPE),
    "olmo2-bias": tiny(family="olmo2", qkv_bias=True, out_bias=True, head_dim=16, **LONG),
    "smollm3-window": tiny(family="smollm3", no_rope=[0], window_layers=[0], mlp_bias=True, **WINDOW),
    "granite-plain": tiny(family="granite", tied=False, mlp_bias=True, **LONG),
    "stablelm-nobias": tiny(family="stablelm", **LONG),
    "olmo-tied": tiny(family="olmo", tied=True, qkv_bias=True, out_bias=True, **LONG),
    "starcoder2-bias": tiny(family="starcoder2", n_kv_head=2, tied=False, **WINDOW),
    "gpt2-relu": tiny(family="gpt2", activation="relu"),
    "gpt2-relu2": tiny(family="gpt2", activation="relu2"),
    "llama-relu2": tiny(family="llama", activation="relu2", mlp_bias=True),
}


def weights(config: ModelConfig, seed: int = 1, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Weights in which no tensor is constant, so that none can be lost unseen; ``scale`` multiplies the matrices."""
    made = params.init_params(config, seed)
    for name, param in params.table(config).items():
        noise = rng.normal(seed, "noise", name, shape=param.shape, std=0.1)
        made[name] = made[name] * np.float32(scale) if param.std else made[name] + noise
    return made
