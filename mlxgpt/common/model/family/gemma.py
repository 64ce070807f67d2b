"""Gemma, Gemma 2 and the text model of Gemma 3: norms that scale by 1 + w, scaled embeddings, soft caps."""

from mlxgpt.common.model.family.llama import ABSENT, ATTENTION_BIAS, FIELDS, FIXED, MODULES, QK_NORMS
from mlxgpt.common.model.family.row import IDLE, NO_WINDOW, OLD_BUFFERS, Family, Gguf, MlxLm, Rope, Windows, without

_SANDWICH = {
    "h.{n}.ln_1_post": "model.layers.{n}.post_attention_layernorm",
    "h.{n}.ln_2": "model.layers.{n}.pre_feedforward_layernorm",
    "h.{n}.ln_2_post": "model.layers.{n}.post_feedforward_layernorm",
}
_FIXED = FIXED | {"norm": "rms1", "embed_scale": True}
_ABSENT = ABSENT | {"head_dim": 256, "activation": "gelu_pytorch_tanh", "tied": True}
_FIELDS_2 = FIELDS | {"activation": "hidden_activation", "final_softcap": "final_logit_softcapping"}
_DEFAULTS = {"norm_eps": 1e-6}

ROWS: dict[str, Family] = {
    "gemma": Family(
        architecture="GemmaForCausalLM",
        about="norms scale by 1 + w, embeddings times sqrt(width), tanh GELU gate (also where config.json says `gelu`)",
        modules=MODULES,
        fields=FIELDS,
        absent=_ABSENT | {"n_kv_head": 16},
        fixed=_FIXED | NO_WINDOW,
        defaults=_DEFAULTS,
        biases=ATTENTION_BIAS,
        rope=Rope(),
        must={"use_bidirectional_attention": False},
        writes=IDLE,
        ignored=OLD_BUFFERS,
        gelu_is_tanh=True,
        gguf=Gguf(arch="gemma", activation="gelu_tanh", head="tied"),
        mlx_lm=MlxLm(activation="gelu", scaling=False, head="tied", attention_bias="never"),
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        about="as gemma; four norms a layer, soft caps, every other layer has a window, `query_pre_attn_scalar`",
        modules=MODULES | _SANDWICH,
        fields=_FIELDS_2 | {"attn_softcap": "attn_logit_softcapping"},
        absent=_ABSENT | {"n_kv_head": 4, "attn_softcap": 50.0, "final_softcap": 30.0},
        fixed=without(_FIXED, "attn_scale", "attn_softcap", "final_softcap") | {"placement": "sandwich"},
        defaults=_DEFAULTS | {"window": 4096, "attn_softcap": 50.0, "final_softcap": 30.0},
        biases=ATTENTION_BIAS,
        rope=Rope(),
        windows=Windows(absent=4096, every=2),
        must={"use_bidirectional_attention": False},
        writes=IDLE,
        ignored=OLD_BUFFERS,
        whole_heads=True,
        scale_key="query_pre_attn_scalar",
        gguf=Gguf(
            arch="gemma2",
            activation="gelu_tanh",
            windows="keys",
            window=4096,
            largest=46,
            capped=True,
            head="tied",
        ),
        mlx_lm=MlxLm(
            activation="gelu_tanh", windows=False, scaling=False, head="tied", attention_bias="never", capped=True
        ),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        about="as gemma2; q and k normed, two rope bases, `linear` or `llama3` scaling for the layers without a window",
        modules=MODULES | QK_NORMS | _SANDWICH,
        fields=_FIELDS_2,
        absent=_ABSENT | {"n_kv_head": 4, "final_softcap": 0.0},
        fixed=without(_FIXED, "attn_scale", "final_softcap", "rope_local_theta")
        | {"placement": "sandwich", "qk_norm": "head"},
        defaults=_DEFAULTS | {"window": 512, "rope_theta": 1e6, "rope_local_theta": 1e4},
        biases=ATTENTION_BIAS,
        rope=Rope(theta=1e6, local=1e4, scalings=("linear", "llama3")),
        windows=Windows(absent=4096, every=6, every_key="sliding_window_pattern"),
        # transformers reads attn_logit_softcapping and then does without it
        must={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        writes=IDLE,
        ignored=OLD_BUFFERS,
        whole_heads=True,
        scale_key="query_pre_attn_scalar",
        gguf=Gguf(arch="gemma3", activation="gelu_tanh", windows="keys", largest=62),
        mlx_lm=MlxLm(
            activation="gelu_tanh", caps_logits=False, rounds_embed_scale=True, attention_bias="never", regular=True
        ),
    ),
}
