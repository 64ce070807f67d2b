"""Where mlx-lm computes something else than transformers does with the same folder, or does not load it.

Each row of the table of families says what mlx-lm 0.32.2 does (``MlxLm``); tests run mlx-lm and compare. transformers
is what a folder means.
"""

import ml_dtypes

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model.family import own_config
from mlxgpt.common.model.family.config_json import full_every
from mlxgpt.common.model.family.table import FAMILIES


def mlx_lm_deviations(config: ModelConfig) -> list[str]:
    """What mlx-lm does otherwise with the folder of this model, a line each to print; empty where it does the same."""
    family, does = config.family, FAMILIES[config.family].mlx_lm
    found = []
    if FAMILIES[family].own:
        return [own_config.NOTE]
    if not does.knows:
        return [f"mlx-lm cannot load {family}: it has no such model"]
    if not does.loads:
        return [f"mlx-lm cannot load {family} from a folder of transformers: it reads another layout under this name"]
    if config.activation != does.activation:
        found.append(f"mlx-lm computes {does.activation} in {family}, this model has {config.activation}")
    if config.window and config.window < config.block_size and not does.windows:
        found.append(f"mlx-lm sees everything in {family}, this model has a window of {config.window} tokens")
    if config.rope_scaling != "none" and not does.scaling:
        found.append(f"mlx-lm ignores rope scaling in {family}, this model has {config.rope_scaling}")
    elif config.rope_attention or not config.rope_truncate:
        what = "attention_factor" if config.rope_attention else "truncate"
        found.append(f"mlx-lm ignores {what} of {config.rope_scaling}, this model has one")
    if config.rope_short != config.rope_long:
        border = config.rope_original
        found.append(f"mlx-lm takes the long factors of longrope at every length, this model beyond {border} tokens")
    if config.embed_scale and does.rounds_embed_scale:
        scale = config.n_embd**0.5
        rounded = float(ml_dtypes.bfloat16(scale))
        if rounded != scale:
            found.append(f"mlx-lm multiplies {family}'s embeddings by {rounded:g}, this model by {scale:.6g}")
    if does.regular and not 0 < full_every(config) <= config.n_layer:
        found.append(f"mlx-lm cannot run {family} unless every n-th layer, and no other, is without a window")
    if config.final_softcap and not does.caps_logits:
        found.append(f"mlx-lm ignores the soft cap of logits in {family}, this model has {config.final_softcap:g}")
    return found + [f"mlx-lm cannot load {family} with {what}" for what in _refused(config)]


def _refused(config: ModelConfig) -> list[str]:
    """What this model has and mlx-lm does not load."""
    does = FAMILIES[config.family].mlx_lm
    bias = config.qkv_bias or config.out_bias
    refused = {
        "an untied head": does.head == "tied" and not config.tied,
        "a tied head": does.head == "untied" and config.tied,
        "biases in attention": does.attention_bias == "never" and bias,
        "no biases in attention": does.attention_bias == "always" and not bias,
        f"n_hidden = {config.n_hidden}, only 4 n_embd = {4 * config.n_embd}": does.hidden_is_4
        and config.n_hidden != 4 * config.n_embd,
        f"head_dim = {config.head_dim}, only n_embd / n_head": does.whole_heads
        and config.head_dim * config.n_head != config.n_embd,
        "a soft cap switched off": does.capped and not (config.attn_softcap and config.final_softcap),
        "a window in every layer": does.full_block and len(config.window_layers) == config.n_layer,
    }
    return [what for what, true in refused.items() if true]
