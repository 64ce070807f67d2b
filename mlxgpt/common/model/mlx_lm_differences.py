"""Where mlx-lm computes something else than transformers does with the same folder, or does not load it.

Read in mlx-lm 0.32.2, and held against it by tests. transformers is what a folder means.
"""

import ml_dtypes

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model.family_config import full_every

# what mlx-lm computes whatever config.json says; silu where not here
_ACTIVATION = {
    "gpt2": "gelu_tanh",
    "gemma": "gelu",
    "gemma2": "gelu_tanh",
    "gemma3_text": "gelu_tanh",
    "gpt_neox": "gelu_tanh",
    "phi": "gelu_tanh",
}
_NO_WINDOW = ("mistral", "qwen2", "qwen3", "gemma2", "phi3")
_NO_SCALING = ("gemma", "gemma2", "gpt_neox", "phi")
_TIED = ("gpt2", "gemma", "gemma2")
_UNTIED = ("gpt_neox", "phi")
_NO_ATTENTION_BIAS = ("qwen3", "gemma", "gemma2", "gemma3_text")
_WHOLE_HEAD = ("qwen2", "phi", "phi3")


def mlx_lm_deviations(config: ModelConfig) -> list[str]:
    """What mlx-lm does otherwise with the folder of this model, a line each to print; empty where it does the same."""
    family, found = config.family, []

    def refuses(what: str) -> None:
        found.append(f"mlx-lm cannot load {family} with {what}")

    does = _ACTIVATION.get(family, "silu")
    if config.activation != does:
        found.append(f"mlx-lm computes {does} in {family}, this model has {config.activation}")
    if config.window and config.window < config.block_size and family in _NO_WINDOW:
        found.append(f"mlx-lm sees everything in {family}, this model has a window of {config.window} tokens")
    if config.rope_scaling != "none" and family in _NO_SCALING:
        found.append(f"mlx-lm ignores rope scaling in {family}, this model has {config.rope_scaling}")
    if family in _TIED and not config.tied:
        refuses("an untied head")
    if family in _UNTIED and config.tied:
        refuses("a tied head")
    if family in _NO_ATTENTION_BIAS and (config.qkv_bias or config.out_bias):
        refuses("biases in attention")
    if family == "gpt_neox" and not (config.qkv_bias or config.out_bias):
        refuses("no biases in attention")
    if family in ("gpt2", "gpt_neox") and config.n_hidden != 4 * config.n_embd:
        refuses(f"n_hidden = {config.n_hidden}, only 4 n_embd = {4 * config.n_embd}")
    if family in _WHOLE_HEAD and config.head_dim * config.n_head != config.n_embd:
        refuses(f"head_dim = {config.head_dim}, only n_embd / n_head")
    if family == "gemma2" and not (config.attn_softcap and config.final_softcap):
        refuses("a soft cap switched off")
    if family == "gemma3_text":
        found += _gemma3(config)
    if family == "smollm3" and len(config.window_layers) == config.n_layer:
        refuses("a window in every layer")
    return found


def _gemma3(config: ModelConfig) -> list[str]:
    found = []
    scale = config.n_embd**0.5
    rounded = float(ml_dtypes.bfloat16(scale))
    if rounded != scale:
        found.append(f"mlx-lm multiplies gemma3_text's embeddings by {rounded:g}, this model by {scale:.6g}")
    if not 0 < full_every(config) <= config.n_layer:
        found.append("mlx-lm cannot run gemma3_text unless every n-th layer, and no other, is without a window")
    if config.final_softcap:
        found.append(f"mlx-lm ignores the soft cap of logits in gemma3_text, this model has {config.final_softcap:g}")
    return found
