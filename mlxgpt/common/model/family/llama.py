"""Llama and the families that changed little in it: RMSNorm, rotary positions, a gated MLP."""

from typing import Any

from mlxgpt.common.model.family.row import (
    BIASES,
    IDLE,
    NO_WINDOW,
    OLD_BUFFERS,
    PLAIN,
    Family,
    Gguf,
    MlxLm,
    Rope,
    Windows,
    without,
)

MODULES = {
    "wte": "model.embed_tokens",
    "h.{n}.ln_1": "model.layers.{n}.input_layernorm",
    "h.{n}.attn.q_proj": "model.layers.{n}.self_attn.q_proj",
    "h.{n}.attn.k_proj": "model.layers.{n}.self_attn.k_proj",
    "h.{n}.attn.v_proj": "model.layers.{n}.self_attn.v_proj",
    "h.{n}.attn.c_proj": "model.layers.{n}.self_attn.o_proj",
    "h.{n}.ln_2": "model.layers.{n}.post_attention_layernorm",
    "h.{n}.mlp.c_gate": "model.layers.{n}.mlp.gate_proj",
    "h.{n}.mlp.c_fc": "model.layers.{n}.mlp.up_proj",
    "h.{n}.mlp.c_proj": "model.layers.{n}.mlp.down_proj",
    "ln_f": "model.norm",
    "lm_head": "lm_head",
}
QK_NORMS = {
    "h.{n}.attn.q_norm": "model.layers.{n}.self_attn.q_norm",
    "h.{n}.attn.k_norm": "model.layers.{n}.self_attn.k_norm",
}
FIELDS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "n_hidden": "intermediate_size",
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tied": "tie_word_embeddings",
}
ABSENT = {"n_kv_head": 0, "head_dim": 0, "norm_eps": 1e-6, "activation": "silu", "tied": False}
FIXED = PLAIN | {"norm": "rms", "gated": True, "position": "rope"}
NO_BIAS: dict[str, str | bool] = dict.fromkeys(BIASES, False)
ATTENTION_BIAS: dict[str, str | bool] = NO_BIAS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
DEFAULTS: dict[str, Any] = {"activation": "silu"}
ALL_BUT_NORM = ("qkv_bias", "out_bias", "mlp_bias")
IDLE_PHI = IDLE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}

ROWS: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        about="rope (default, `linear`, `llama3`), grouped heads, optional biases; tied or not",
        modules=MODULES,
        fields=FIELDS,
        absent=ABSENT,
        fixed=FIXED | NO_WINDOW,
        defaults=DEFAULTS,
        biases=ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        rope=Rope(),
        must={"pretraining_tp": 1},
        writes=IDLE,
        ignored=OLD_BUFFERS,
        whole_heads=True,
        gguf=Gguf(arch="llama", permuted=True, windows="all", factors=True, biases=ALL_BUT_NORM),
        mlx_lm=MlxLm(),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        about="as llama; one window for all layers, or none",
        modules=MODULES,
        fields=FIELDS,
        absent=ABSENT | {"n_kv_head": 8},
        fixed=FIXED,
        defaults=DEFAULTS,
        biases=NO_BIAS,
        rope=Rope(),
        # no layer_types: transformers warns of it, and mlx-lm fails where no block sees everything
        windows=Windows(absent=4096, types=False),
        writes=IDLE,
        ignored=OLD_BUFFERS,
        gguf=Gguf(arch="llama", permuted=True, windows="all", factors=True, biases=ALL_BUT_NORM),
        mlx_lm=MlxLm(windows=False),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        about="as llama; biases on q, k, v; windows by layer",
        modules=MODULES,
        fields=FIELDS,
        absent=ABSENT | {"n_kv_head": 32},
        fixed=FIXED,
        defaults=DEFAULTS | {"norm_eps": 1e-6, "rope_theta": 1e6},
        biases=NO_BIAS | {"qkv_bias": True},
        rope=Rope(),
        windows=Windows(absent=4096, switch=True),
        writes=IDLE,
        ignored=OLD_BUFFERS,
        gguf=Gguf(arch="qwen2", biases=("qkv_bias",)),
        mlx_lm=MlxLm(windows=False, whole_heads=True),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        about="as llama; q and k normed per head; windows by layer",
        modules=MODULES | QK_NORMS,
        fields=FIELDS,
        absent=ABSENT | {"n_kv_head": 32, "head_dim": 128},
        fixed=FIXED | {"qk_norm": "head"},
        defaults=DEFAULTS | {"norm_eps": 1e-6, "rope_theta": 1e6},
        biases=ATTENTION_BIAS,
        rope=Rope(),
        windows=Windows(absent=4096, switch=True),
        writes=IDLE,
        ignored=OLD_BUFFERS,
        gguf=Gguf(arch="qwen3"),
        mlx_lm=MlxLm(windows=False, attention_bias="never"),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        about="fused q, k, v and fused gate and up; partial rope; one window for all layers, or none",
        modules=without(
            MODULES,
            *("h.{n}.attn.q_proj", "h.{n}.attn.k_proj", "h.{n}.attn.v_proj", "h.{n}.mlp.c_gate", "h.{n}.mlp.c_fc"),
        )
        | {
            "h.{n}.attn.c_attn": "model.layers.{n}.self_attn.qkv_proj",
            "h.{n}.mlp.c_gate_fc": "model.layers.{n}.mlp.gate_up_proj",
        },
        fields=FIELDS,
        absent=ABSENT | {"norm_eps": 1e-5},
        fixed=FIXED | {"fused_qkv": True, "fused_mlp": True, "rope_scaling": "none"},
        defaults=DEFAULTS,
        biases=NO_BIAS,
        rope=Rope(part=1.0, scalings=()),
        windows=Windows(absent=None, types=False),
        writes=IDLE_PHI,
        ignored=OLD_BUFFERS,
        gguf=Gguf(arch="phi3", windows="all", needs_window=True, whole_heads=True),
        mlx_lm=MlxLm(windows=False, whole_heads=True),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        about="norms after the branches, q and k normed over all heads at once",
        modules=MODULES
        | QK_NORMS
        | {
            "h.{n}.ln_1": "model.layers.{n}.post_attention_layernorm",
            "h.{n}.ln_2": "model.layers.{n}.post_feedforward_layernorm",
        },
        fields=FIELDS,
        absent=ABSENT | {"norm_eps": 1e-5},
        fixed=FIXED | NO_WINDOW | {"placement": "post", "qk_norm": "full"},
        defaults=DEFAULTS | {"norm_eps": 1e-6, "rope_theta": 5e5},
        biases=ATTENTION_BIAS,
        rope=Rope(),
        writes=IDLE,
        ignored=OLD_BUFFERS,
        gguf=Gguf(
            arch="olmo2",
            modules={"h.{n}.ln_1": "blk.{n}.post_attention_norm", "h.{n}.ln_2": "blk.{n}.post_ffw_norm"},
            head="untied",
            whole_heads=True,
        ),
        mlx_lm=MlxLm(),
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        about="as llama; layers without rope (`no_rope_layers`), windows by layer",
        modules=MODULES,
        fields=FIELDS,
        absent=ABSENT | {"n_kv_head": 4, "tied": True},
        fixed=without(FIXED, "no_rope"),
        defaults=DEFAULTS | {"norm_eps": 1e-6, "rope_theta": 5e6},
        biases=ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        rope=Rope(theta=2e6),
        windows=Windows(absent=None, switch=True),
        no_rope_every=4,
        writes=IDLE,
        ignored=OLD_BUFFERS,
        gguf=Gguf(arch="smollm3", permuted=True),
        mlx_lm=MlxLm(full_block=True),
    ),
}
