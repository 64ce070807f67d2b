"""Settings found beside the weights, under the names that home-made models give them."""

from collections.abc import Iterator, Mapping
from typing import Any

from mlxgpt.common.user_code.build import is_vocabulary

_NAMES = {
    "n_head": ("n_head", "n_heads", "num_heads", "nhead", "heads", "num_attention_heads", "num_head", "n_attn_heads",
               "nheads", "attention_heads", "head_count", "head_num", "heads_num", "number_of_heads"),
    "n_kv_head": ("n_kv_head", "n_kv_heads", "num_kv_heads", "num_key_value_heads", "kv_heads", "n_query_groups",
                  "num_kv_groups", "n_kv_groups", "num_query_groups"),
    "head_dim": ("head_dim", "head_size", "d_head", "dim_head", "d_k", "head_dimension"),
    "n_embd": ("n_embd", "d_model", "emb_dim", "embed_dim", "dim", "hidden_size", "embedding_dim", "n_embed",
               "embed_size", "model_dim", "embedding_size", "d_embed", "width"),
    "n_layer": ("n_layer", "n_layers", "num_layers", "num_hidden_layers", "nlayers", "num_blocks", "n_blocks"),
    "block_size": ("block_size", "context_length", "max_seq_len", "seq_len", "sequence_len",
                   "max_position_embeddings", "n_ctx",
                   "ctx_len", "max_len", "context_size", "max_seq_length", "n_positions", "sequence_length",
                   "seq_length",
                   "max_length", "context_window", "max_context", "ctx_size", "maxlen"),
    "vocab_size": ("vocab_size", "n_vocab", "vocabulary_size", "num_tokens", "ntoken", "ntokens", "d_vocab"),
    "norm_eps": ("norm_eps", "layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon", "eps", "layernorm_eps", "ln_eps",
                 "rms_eps", "norm_epsilon"),
    "rope_theta": ("rope_theta", "rope_base", "theta", "rotary_base", "theta_base"),
    "activation": ("activation", "hidden_act", "act", "activation_function", "act_fn", "hidden_activation",
                   "nonlinearity"),
    "tied": ("tie_weights", "tied", "tie_word_embeddings", "weight_tying", "tie_embeddings", "shared_embedding"),
    "pre": ("norm_first", "pre_norm", "prenorm"),
    "parallel": ("use_parallel_residual", "parallel_attn", "parallel_residual", "parallel"),
    "alibi": ("alibi", "use_alibi"),
    "position": ("position_embedding_type", "positional_encoding", "pos_encoding", "pos_emb_type", "position_encoding"),
    "norm": ("norm_type", "norm", "normalization", "norm_class"),
    "rotary_part": ("rotary_pct", "partial_rotary_factor", "rotary_percentage", "rope_percentage"),
}  # fmt: skip
_OURS = {name: ours for ours, names in _NAMES.items() for name in names}
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_erf": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "swiglu": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_approx": "gelu_tanh", "relu2": "relu2",
    "squared_relu": "relu2", "relu_squared": "relu2", "geglu": "gelu", "reglu": "relu", "newgelu": "gelu_tanh",
}  # fmt: skip


_POSITIONS = {"rope": "rope", "rotary": "rope", "alibi": "alibi", "sinusoidal": "sinusoidal", "none": "none"}
_NORMS = {
    "rmsnorm": "rms",
    "rms": "rms",
    "rms_norm": "rms",
    "layernorm": "layer",
    "layer": "layer",
    "layer_norm": "layer",
}
_WORDS = {"activation": _ACTIVATIONS, "position": _POSITIONS, "norm": _NORMS}


def _walk(value: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(name, plain value) of settings, however deep they lie."""
    for name, each in value.items():
        if isinstance(each, Mapping):
            is_settings = len(each) < 200 and all(isinstance(key, str) for key in each)
            if depth < 4 and is_settings and not is_vocabulary(each):
                yield from _walk(each, depth + 1)
        elif isinstance(name, str):
            yield name.rpartition(".")[2].lower(), each


def read(extras: Mapping[str, Any]) -> dict[str, Any]:
    """What settings say of the model, by our names; the first that says something counts."""
    known: dict[str, Any] = {}
    for name, value in _walk(extras):
        ours = _OURS.get(name)
        if ours is None or ours in known:
            continue
        if ours in _WORDS:
            said = value.lower().removeprefix("nn.").replace("()", "") if isinstance(value, str) else ""
            if said in _WORDS[ours]:
                known[ours] = _WORDS[ours][said]
        elif ours in ("tied", "pre", "parallel", "alibi"):
            if isinstance(value, bool):
                known[ours] = value
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            if ours in ("norm_eps", "rope_theta", "rotary_part"):
                known[ours] = float(value)
            elif float(value).is_integer():
                known[ours] = int(value)
    if known.pop("alibi", False):
        known["position"] = "alibi"
    return known
