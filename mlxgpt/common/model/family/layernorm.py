"""The families with LayerNorm."""

from mlxgpt.common.model.family.llama import ABSENT, FIELDS, MODULES
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

_MLP = {"norm": "layer", "gated": False}

ROWS: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        about="learned positions, LayerNorm, one fused matrix for q, k, v; read with and without `transformer.`, old "
        "buffers ignored",
        modules={
            "wte": "wte",
            "wpe": "wpe",
            "h.{n}.ln_1": "h.{n}.ln_1",
            "h.{n}.attn.c_attn": "h.{n}.attn.c_attn",
            "h.{n}.attn.c_proj": "h.{n}.attn.c_proj",
            "h.{n}.ln_2": "h.{n}.ln_2",
            "h.{n}.mlp.c_fc": "h.{n}.mlp.c_fc",
            "h.{n}.mlp.c_proj": "h.{n}.mlp.c_proj",
            "ln_f": "ln_f",
            "lm_head": "lm_head",
        },
        fields={
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "n_embd",
            "n_hidden": "n_inner",
            "block_size": "n_positions",
            "vocab_size": "vocab_size",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
            "tied": "tie_word_embeddings",
        },
        absent={"n_hidden": 0, "norm_eps": 1e-5, "activation": "gelu_new", "tied": True},
        fixed=PLAIN
        | NO_WINDOW
        | _MLP
        | {
            "position": "learned",
            "rope_theta": 10000.0,
            "rope_scaling": "none",
            "rotary_dim": 0,
            "fused_qkv": True,
        },
        biases=dict.fromkeys(BIASES, True),
        must={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
        writes={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        repeats={"n_ctx": "block_size"},
        transposed=("h.{n}.attn.c_attn", "h.{n}.attn.c_proj", "h.{n}.mlp.c_fc", "h.{n}.mlp.c_proj"),
        prefixes=("transformer.",),
        ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
        tanh="gelu_new",
        one_head_size=True,
        gguf=Gguf(arch="gpt2", activation="gelu_tanh", biases=BIASES, whole_heads=True),
        mlx_lm=MlxLm(activation="gelu_tanh", head="tied", hidden_is_4=True, names=(("", "model."),)),
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        about="two norms for parallel branches, or serial (`use_parallel_residual: false`), partial rope, biases "
        "optional",
        modules={
            "wte": "gpt_neox.embed_in",
            "h.{n}.ln_1": "gpt_neox.layers.{n}.input_layernorm",
            "h.{n}.attn.c_attn": "gpt_neox.layers.{n}.attention.query_key_value",
            "h.{n}.attn.c_proj": "gpt_neox.layers.{n}.attention.dense",
            "h.{n}.ln_2": "gpt_neox.layers.{n}.post_attention_layernorm",
            "h.{n}.mlp.c_fc": "gpt_neox.layers.{n}.mlp.dense_h_to_4h",
            "h.{n}.mlp.c_proj": "gpt_neox.layers.{n}.mlp.dense_4h_to_h",
            "ln_f": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
        },
        fields=without(FIELDS, "n_kv_head", "head_dim") | {"norm_eps": "layer_norm_eps"},
        absent={"norm_eps": 1e-5, "activation": "gelu", "tied": False, "qkv_bias": True, "out_bias": True},
        fixed=without(PLAIN, "placement")
        | NO_WINDOW
        | _MLP
        | {"position": "rope", "fused_qkv": True, "qkv_by_head": True},
        defaults={"placement": "parallel2", "activation": "gelu", "tied": False},
        biases={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": True, "norm_bias": True},
        rope=Rope(theta_key="rotary_emb_base", part=0.25, part_key="rotary_pct"),
        writes=IDLE | {"hidden_dropout": 0.0},
        aliases={"lm_head": "embed_out"},
        ignored=OLD_BUFFERS,
        tanh="gelu_new",
        one_head_size=True,
        parallel_key="use_parallel_residual",
        gguf=Gguf(
            arch="gptneox", activation="gelu_tanh", assumed="gelu", biases=BIASES, head="untied", whole_heads=True
        ),
        mlx_lm=MlxLm(
            activation="gelu_tanh",
            scaling=False,
            head="untied",
            attention_bias="always",
            hidden_is_4=True,
            names=(("gpt_neox.layers.", "model.h."), ("gpt_neox.", "model."), ("", "model.")),
        ),
    ),
    "phi": Family(
        architecture="PhiForCausalLM",
        about="one norm for parallel branches, partial rope, a head with bias",
        modules=without(MODULES, "h.{n}.ln_2", "h.{n}.mlp.c_gate")
        | {
            "h.{n}.attn.c_proj": "model.layers.{n}.self_attn.dense",
            "h.{n}.mlp.c_fc": "model.layers.{n}.mlp.fc1",
            "h.{n}.mlp.c_proj": "model.layers.{n}.mlp.fc2",
            "ln_f": "model.final_layernorm",
        },
        fields=FIELDS | {"norm_eps": "layer_norm_eps"},
        absent=ABSENT | {"norm_eps": 1e-5, "activation": "gelu_new"},
        fixed=PLAIN
        | NO_WINDOW
        | _MLP
        | {"position": "rope", "placement": "parallel", "tied": False, "head_bias": True},
        biases=dict.fromkeys(BIASES, True),
        rope=Rope(part=0.5),
        must={"qk_layernorm": False},
        writes=IDLE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
        ignored=OLD_BUFFERS,
        tanh="gelu_new",
        gguf=Gguf(arch="phi2", activation="gelu_tanh", biases=BIASES, whole_heads=True),
        mlx_lm=MlxLm(activation="gelu_tanh", scaling=False, head="untied", whole_heads=True),
    ),
    "stablelm": Family(
        architecture="StableLmForCausalLM",
        about="LayerNorm around llama's blocks, partial rope, biases on q, k, v optional",
        modules=MODULES,
        fields=without(FIELDS, "head_dim") | {"norm_eps": "layer_norm_eps"},
        absent={"n_kv_head": 32, "norm_eps": 1e-5, "activation": "silu", "tied": False},
        fixed=PLAIN | NO_WINDOW | {"norm": "layer", "gated": True, "position": "rope"},
        defaults={"activation": "silu", "tied": False},
        biases=dict.fromkeys(BIASES, False) | {"qkv_bias": "use_qkv_bias", "norm_bias": True},
        rope=Rope(part=0.25),
        must={"qk_layernorm": False, "use_parallel_residual": False},
        writes=IDLE | {"hidden_dropout": 0.0},
        ignored=OLD_BUFFERS,
        derived_head=True,
        gguf=Gguf(arch="stablelm", biases=("qkv_bias",), head="untied", whole_heads=True),
        mlx_lm=MlxLm(scaling=False, head="untied", whole_heads=True),
    ),
    "olmo": Family(
        architecture="OlmoForCausalLM",
        about="LayerNorm without weights and biases around llama's blocks",
        modules=without(MODULES, "h.{n}.ln_1", "h.{n}.ln_2", "ln_f"),
        fields=without(FIELDS, "head_dim", "norm_eps"),
        absent={"n_kv_head": 0, "activation": "silu", "tied": False},
        fixed=PLAIN
        | NO_WINDOW
        | {"norm": "layer", "norm_eps": 1e-5, "norm_weight": False, "gated": True, "position": "rope"},
        defaults={"activation": "silu"},
        biases=dict.fromkeys(BIASES, False) | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
        rope=Rope(),
        must={"clip_qkv": None},
        writes=IDLE,
        ignored=OLD_BUFFERS,
        derived_head=True,
        gguf=Gguf(arch="olmo", permuted=True, whole_heads=True),
        mlx_lm=MlxLm(loads=False),
    ),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        about="LayerNorm, biases, grouped heads, an MLP without gate; one window for all layers, or none",
        modules=without(MODULES, "h.{n}.mlp.c_gate")
        | {"h.{n}.mlp.c_fc": "model.layers.{n}.mlp.c_fc", "h.{n}.mlp.c_proj": "model.layers.{n}.mlp.c_proj"},
        fields=without(FIELDS, "head_dim") | {"norm_eps": "norm_epsilon"},
        absent={"n_kv_head": 2, "norm_eps": 1e-5, "activation": "gelu_pytorch_tanh", "tied": True}
        | dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
        fixed=PLAIN | _MLP | {"position": "rope"},
        biases=dict.fromkeys(BIASES, "use_bias") | {"norm_bias": True},
        rope=Rope(),
        windows=Windows(absent=None, types=False),
        writes=IDLE | {"residual_dropout": 0.0, "embedding_dropout": 0.0},
        ignored=OLD_BUFFERS,
        derived_head=True,
        gguf=Gguf(
            arch="starcoder2",
            activation="gelu_tanh",
            biases=BIASES,
            needs=("out_bias", "mlp_bias"),
            whole_heads=True,
        ),
        mlx_lm=MlxLm(activation="gelu_tanh", windows=False, scaling=False, attention_bias="always", whole_heads=True),
    ),
}
