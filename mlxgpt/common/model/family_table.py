"""THE table of architectures: what each calls our modules and fields, which choices it fixes, what it cannot say.

Read from transformers' configuration_*.py and modeling_*.py. families.py works with it; what is not here is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How a family spells rotary positions in config.json."""

    theta: float = 10000.0  # the base where nothing says it
    theta_key: str = "rope_theta"
    part: float | None = None  # share of a head that turns where nothing says it; None: always all of it
    part_key: str = "partial_rotary_factor"
    scalings: tuple[str, ...] = ("linear", "llama3")
    local: float = 0.0  # > 0: blocks with a window have a base of their own; this where nothing says it


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a family spells sliding windows in config.json."""

    absent: int | None  # sliding_window where nothing says it
    types: bool = True  # layer_types says which blocks have it; else all have
    switch: bool = False  # nothing counts unless use_sliding_window is true
    every: int = 0  # without layer_types every n-th block sees everything
    every_key: str = ""  # older key for that n


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one architecture calls things. Absent keys of config.json mean what transformers takes them to mean."""

    architecture: str
    modules: Mapping[str, str]  # our module -> theirs; {n} is the block
    fields: Mapping[str, str]  # our field -> key of config.json
    absent: Mapping[str, Any]  # our field -> its value where the key is absent; a field not here must be there
    fixed: Mapping[str, Any]  # our field -> the one value the architecture has
    biases: Mapping[str, str | bool]  # our bias field -> the key that says so, or what the architecture always does
    rope: Rope | None = None
    windows: Windows | None = None
    must: Mapping[str, Any] = field(default_factory=dict)  # key -> the one value that this decoder can follow
    writes: Mapping[str, Any] = field(default_factory=dict)  # further keys that a folder of ours says
    repeats: Mapping[str, str] = field(default_factory=dict)  # second key that other readers want -> our field
    transposed: tuple[str, ...] = ()  # our modules whose matrix is stored [in, out]
    prefixes: tuple[str, ...] = ()  # what names in a file may start with besides
    aliases: Mapping[str, str] = field(default_factory=dict)  # their other name of a module -> the one in their files
    ignored: str = r"(?!)"  # buffers that old files carry
    tanh: str = "gelu_pytorch_tanh"  # what config.json calls gelu_tanh
    gelu_is_tanh: bool = False  # "gelu" in config.json means gelu_tanh
    one_head_size: bool = False  # head_dim = n_embd / n_head and n_kv_head = n_head, with no key to say otherwise
    whole_heads: bool = False  # transformers refuses an n_embd that n_head does not divide
    scale_key: str = ""  # attention scores are divided by the root of this whole number
    parallel_key: str = ""  # true: placement parallel2; false: pre

    @property
    def classifier(self) -> str:
        """The same architecture with a head of labels."""
        name = re.sub("(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", self.architecture)
        return name.replace("Gemma3For", "Gemma3TextFor")


BIASES = ("qkv_bias", "out_bias", "mlp_bias", "norm_bias")

# What most architectures do not have; a family takes out what it has.
_PLAIN: dict[str, Any] = {
    "placement": "pre",
    "qk_norm": "none",
    "fused_qkv": False,
    "qkv_by_head": False,
    "fused_mlp": False,
    "head_bias": False,
    "embed_scale": False,
    "attn_scale": 0.0,
    "attn_softcap": 0.0,
    "final_softcap": 0.0,
    "rope_local_theta": 0.0,
    "no_rope": (),
}


def _except(fixed: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fixed.items() if name not in names}


_LLAMA_MODULES = {
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
_QK_NORMS = {
    "h.{n}.attn.q_norm": "model.layers.{n}.self_attn.q_norm",
    "h.{n}.attn.k_norm": "model.layers.{n}.self_attn.k_norm",
}
_SANDWICH = {
    "h.{n}.ln_1_post": "model.layers.{n}.post_attention_layernorm",
    "h.{n}.ln_2": "model.layers.{n}.pre_feedforward_layernorm",
    "h.{n}.ln_2_post": "model.layers.{n}.post_feedforward_layernorm",
}
_LLAMA_FIELDS = {
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
_LLAMA_ABSENT = {"n_kv_head": 0, "head_dim": 0, "norm_eps": 1e-6, "activation": "silu", "tied": False}
_LLAMA_FIXED = _PLAIN | {"norm": "rms", "gated": True, "position": "rope"}
_NO_WINDOW = {"window": 0}
_NO_BIAS: dict[str, str | bool] = dict.fromkeys(BIASES, False)
_ATTENTION_BIAS: dict[str, str | bool] = _NO_BIAS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_GEMMA_FIXED = _LLAMA_FIXED | {"norm": "rms1", "embed_scale": True}
_GEMMA_ABSENT = _LLAMA_ABSENT | {"head_dim": 256, "activation": "gelu_pytorch_tanh", "tied": True}
_GEMMA2_FIELDS = _LLAMA_FIELDS | {"activation": "hidden_activation", "final_softcap": "final_logit_softcapping"}
_IDLE = {"attention_dropout": 0.0}
_IDLE_PHI = _IDLE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
_OLD_BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|attention\.(bias|masked_bias))"

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
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
        fixed=_PLAIN
        | _NO_WINDOW
        | {
            "norm": "layer",
            "gated": False,
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
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        modules=_LLAMA_MODULES,
        fields=_LLAMA_FIELDS,
        absent=_LLAMA_ABSENT,
        fixed=_LLAMA_FIXED | _NO_WINDOW,
        biases=_ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        rope=Rope(),
        must={"pretraining_tp": 1},
        writes=_IDLE,
        ignored=_OLD_BUFFERS,
        whole_heads=True,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        modules=_LLAMA_MODULES,
        fields=_LLAMA_FIELDS,
        absent=_LLAMA_ABSENT | {"n_kv_head": 8},
        fixed=_LLAMA_FIXED,
        biases=_NO_BIAS,
        rope=Rope(),
        # no layer_types: transformers warns of it, and mlx-lm fails where no block sees everything
        windows=Windows(absent=4096, types=False),
        writes=_IDLE,
        ignored=_OLD_BUFFERS,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        modules=_LLAMA_MODULES,
        fields=_LLAMA_FIELDS,
        absent=_LLAMA_ABSENT | {"n_kv_head": 32},
        fixed=_LLAMA_FIXED,
        biases=_NO_BIAS | {"qkv_bias": True},
        rope=Rope(),
        windows=Windows(absent=4096, switch=True),
        writes=_IDLE,
        ignored=_OLD_BUFFERS,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        modules=_LLAMA_MODULES | _QK_NORMS,
        fields=_LLAMA_FIELDS,
        absent=_LLAMA_ABSENT | {"n_kv_head": 32, "head_dim": 128},
        fixed=_LLAMA_FIXED | {"qk_norm": "head"},
        biases=_ATTENTION_BIAS,
        rope=Rope(),
        windows=Windows(absent=4096, switch=True),
        writes=_IDLE,
        ignored=_OLD_BUFFERS,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        modules=_LLAMA_MODULES,
        fields=_LLAMA_FIELDS,
        absent=_GEMMA_ABSENT | {"n_kv_head": 16},
        fixed=_GEMMA_FIXED | _NO_WINDOW,
        biases=_ATTENTION_BIAS,
        rope=Rope(),
        must={"use_bidirectional_attention": False},
        writes=_IDLE,
        ignored=_OLD_BUFFERS,
        gelu_is_tanh=True,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        modules=_LLAMA_MODULES | _SANDWICH,
        fields=_GEMMA2_FIELDS | {"attn_softcap": "attn_logit_softcapping"},
        absent=_GEMMA_ABSENT | {"n_kv_head": 4, "attn_softcap": 50.0, "final_softcap": 30.0},
        fixed=_except(_GEMMA_FIXED, "attn_scale", "attn_softcap", "final_softcap") | {"placement": "sandwich"},
        biases=_ATTENTION_BIAS,
        rope=Rope(),
        windows=Windows(absent=4096, every=2),
        must={"use_bidirectional_attention": False},
        writes=_IDLE,
        ignored=_OLD_BUFFERS,
        whole_heads=True,
        scale_key="query_pre_attn_scalar",
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        modules=_LLAMA_MODULES | _QK_NORMS | _SANDWICH,
        fields=_GEMMA2_FIELDS,
        absent=_GEMMA_ABSENT | {"n_kv_head": 4, "final_softcap": 0.0},
        fixed=_except(_GEMMA_FIXED, "attn_scale", "final_softcap", "rope_local_theta")
        | {"placement": "sandwich", "qk_norm": "head"},
        biases=_ATTENTION_BIAS,
        rope=Rope(theta=1e6, local=1e4),
        windows=Windows(absent=4096, every=6, every_key="sliding_window_pattern"),
        # transformers reads attn_logit_softcapping and then does without it
        must={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        writes=_IDLE,
        ignored=_OLD_BUFFERS,
        whole_heads=True,
        scale_key="query_pre_attn_scalar",
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
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
        fields=_except(_LLAMA_FIELDS, "n_kv_head", "head_dim") | {"norm_eps": "layer_norm_eps"},
        absent={"norm_eps": 1e-5, "activation": "gelu", "tied": False, "qkv_bias": True, "out_bias": True},
        fixed=_except(_PLAIN, "placement")
        | _NO_WINDOW
        | {"norm": "layer", "gated": False, "position": "rope", "fused_qkv": True, "qkv_by_head": True},
        biases={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": True, "norm_bias": True},
        rope=Rope(theta_key="rotary_emb_base", part=0.25, part_key="rotary_pct"),
        writes=_IDLE | {"hidden_dropout": 0.0},
        aliases={"lm_head": "embed_out"},
        ignored=_OLD_BUFFERS,
        tanh="gelu_new",
        one_head_size=True,
        parallel_key="use_parallel_residual",
    ),
    "phi": Family(
        architecture="PhiForCausalLM",
        modules=_except(_LLAMA_MODULES, "h.{n}.ln_2", "h.{n}.mlp.c_gate")
        | {
            "h.{n}.attn.c_proj": "model.layers.{n}.self_attn.dense",
            "h.{n}.mlp.c_fc": "model.layers.{n}.mlp.fc1",
            "h.{n}.mlp.c_proj": "model.layers.{n}.mlp.fc2",
            "ln_f": "model.final_layernorm",
        },
        fields=_LLAMA_FIELDS | {"norm_eps": "layer_norm_eps"},
        absent=_LLAMA_ABSENT | {"norm_eps": 1e-5, "activation": "gelu_new"},
        fixed=_PLAIN
        | _NO_WINDOW
        | {
            "norm": "layer",
            "gated": False,
            "position": "rope",
            "placement": "parallel",
            "tied": False,
            "head_bias": True,
        },
        biases=dict.fromkeys(BIASES, True),
        rope=Rope(part=0.5),
        must={"qk_layernorm": False},
        writes=_IDLE_PHI,
        ignored=_OLD_BUFFERS,
        tanh="gelu_new",
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        modules=_except(
            _LLAMA_MODULES,
            *("h.{n}.attn.q_proj", "h.{n}.attn.k_proj", "h.{n}.attn.v_proj", "h.{n}.mlp.c_gate", "h.{n}.mlp.c_fc"),
        )
        | {
            "h.{n}.attn.c_attn": "model.layers.{n}.self_attn.qkv_proj",
            "h.{n}.mlp.c_gate_fc": "model.layers.{n}.mlp.gate_up_proj",
        },
        fields=_LLAMA_FIELDS,
        absent=_LLAMA_ABSENT | {"norm_eps": 1e-5},
        fixed=_LLAMA_FIXED | {"fused_qkv": True, "fused_mlp": True, "rope_scaling": "none"},
        biases=_NO_BIAS,
        rope=Rope(part=1.0, scalings=()),
        windows=Windows(absent=None, types=False),
        writes=_IDLE_PHI,
        ignored=_OLD_BUFFERS,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        modules=_LLAMA_MODULES
        | _QK_NORMS
        | {
            "h.{n}.ln_1": "model.layers.{n}.post_attention_layernorm",
            "h.{n}.ln_2": "model.layers.{n}.post_feedforward_layernorm",
        },
        fields=_LLAMA_FIELDS,
        absent=_LLAMA_ABSENT | {"norm_eps": 1e-5},
        fixed=_LLAMA_FIXED | _NO_WINDOW | {"placement": "post", "qk_norm": "full"},
        biases=_ATTENTION_BIAS,
        rope=Rope(),
        writes=_IDLE,
        ignored=_OLD_BUFFERS,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        modules=_LLAMA_MODULES,
        fields=_LLAMA_FIELDS,
        absent=_LLAMA_ABSENT | {"n_kv_head": 4, "tied": True},
        fixed=_except(_LLAMA_FIXED, "no_rope"),
        biases=_ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        rope=Rope(theta=2e6),
        windows=Windows(absent=None, switch=True),
        writes=_IDLE,
        ignored=_OLD_BUFFERS,
    ),
}
