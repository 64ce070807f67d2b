"""config.json as others write it: THEIRS in both spellings, PUBLISHED as on the hub, REFUSED and why.

PUBLISHED has the keys and choices that the named repositories are known for, written down without a look at the hub;
only sizes are small, in the same proportions where a choice follows from them (heads, rotated share, windows).
"""

from typing import Any

# configs that others wrote: keys as on the hub, old and new; sizes stand below
SIZES = dict(vocab_size=80, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
             max_position_embeddings=72, pad_token_id=None, bos_token_id=None, eos_token_id=None)  # fmt: skip
GPT2 = dict(vocab_size=80, n_embd=48, n_layer=3, n_head=4, n_positions=72, pad_token_id=None, bos_token_id=None,
            eos_token_id=None)  # fmt: skip
LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
THEIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", dict(rope_theta=5e4, rope_scaling=dict(rope_type="llama3", **LLAMA3), num_key_value_heads=2),
              dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e4, **LLAMA3), num_key_value_heads=2)),
    "gpt2": ("gpt2", dict(n_ctx=72), dict(n_inner=None, activation_function="gelu_new")),
    "llama-linear": ("llama", dict(rope_scaling=dict(type="linear", factor=2.0)),
                     dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4))),
    "mistral": ("mistral", dict(sliding_window=9, num_key_value_heads=2, rope_theta=1e6),
                dict(sliding_window=9, num_key_value_heads=2,
                     rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2": ("qwen2", dict(num_key_value_heads=2, rope_theta=1e6, use_sliding_window=True, sliding_window=9,
                            max_window_layers=1),
              dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=1e6),
                   use_sliding_window=True, sliding_window=9,
                   layer_types=["full_attention", "sliding_attention", "sliding_attention"])),
    "qwen3": ("qwen3", dict(num_key_value_heads=2, head_dim=16, rope_theta=1e6, sliding_window=9, max_window_layers=1),
              dict(num_key_value_heads=2, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6),
                   layer_types=["full_attention"] * 3)),
    "gemma": ("gemma", dict(hidden_act="gelu", num_key_value_heads=1, head_dim=16),
              dict(hidden_act="gelu_pytorch_tanh", num_key_value_heads=1, head_dim=16,
                   rope_parameters=dict(rope_type="default", rope_theta=1e4))),
    "gemma2": ("gemma2", dict(num_key_value_heads=2, head_dim=16, sliding_window=9, query_pre_attn_scalar=12,
                              hidden_act="gelu_pytorch_tanh"),
               dict(num_key_value_heads=2, head_dim=16, sliding_window=9, query_pre_attn_scalar=12,
                    layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "gemma3": ("gemma3_text", dict(num_key_value_heads=2, head_dim=16, sliding_window=9, sliding_window_pattern=3,
                                   rope_theta=1e6, rope_local_base_freq=5e3, query_pre_attn_scalar=16,
                                   rope_scaling=dict(rope_type="linear", factor=8.0)),
               dict(num_key_value_heads=2, head_dim=16, sliding_window=9, query_pre_attn_scalar=16,
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                    rope_parameters=dict(
                        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                        sliding_attention=dict(rope_type="default", rope_theta=5e3)))),
    "gpt_neox": ("gpt_neox", dict(rotary_pct=0.5, rotary_emb_base=5000, use_parallel_residual=True),
                 dict(rope_parameters=dict(rope_type="default", rope_theta=5e3, partial_rotary_factor=0.5))),
    "gpt_neox-serial": ("gpt_neox", dict(rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu_new"),
                        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0),
                             use_parallel_residual=False, hidden_act="gelu_new")),
    "phi": ("phi", dict(partial_rotary_factor=0.34, rope_theta=5e3),
            dict(rope_parameters=dict(rope_type="default", rope_theta=5e3, partial_rotary_factor=0.34))),
    "phi3": ("phi3", dict(num_key_value_heads=2, sliding_window=9, partial_rotary_factor=0.5),
             dict(num_key_value_heads=2, sliding_window=9,
                  rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))),
    "olmo2": ("olmo2", dict(num_key_value_heads=2, rope_theta=5e5, rope_scaling=None),
              dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "smollm3": ("smollm3", dict(num_key_value_heads=2, no_rope_layer_interval=2, rope_theta=5e6),
                dict(num_key_value_heads=2, no_rope_layers=[1, 0, 1],
                     rope_parameters=dict(rope_type="default", rope_theta=5e6))),
}  # fmt: skip


def published(**keys: Any) -> dict[str, Any]:
    """With sizes, unless they are given; null and [] are kept as they are."""
    return {"vocab_size": 80, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "max_position_embeddings": 72, "use_cache": True} | keys  # fmt: skip


_LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", initializer_range=0.02,
              attention_bias=False, attention_dropout=0.0, rms_norm_eps=1e-5, pretraining_tp=1)  # fmt: skip
_QWEN = dict(hidden_act="silu", initializer_range=0.02, attention_dropout=0.0, rms_norm_eps=1e-6,
             use_sliding_window=False, tie_word_embeddings=True, torch_dtype="bfloat16")  # fmt: skip
_GPT2 = dict(
    activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=79,
    embd_pdrop=0.1, eos_token_id=79, initializer_range=0.02, layer_norm_epsilon=1e-5, model_type="gpt2", n_ctx=72,
    n_embd=48, n_head=4, n_layer=2, n_positions=72, resid_pdrop=0.1, summary_activation=None,
    summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, vocab_size=80,
)  # fmt: skip
_GEMMA = dict(attention_bias=False, attention_dropout=0.0, bos_token_id=2, eos_token_id=1, pad_token_id=0, head_dim=16,
              initializer_range=0.02, rms_norm_eps=1e-6, torch_dtype="bfloat16")  # fmt: skip
_GEMMA3 = dict(
    architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", attn_logit_softcapping=None,
    final_logit_softcapping=None, hidden_activation="gelu_pytorch_tanh", num_key_value_heads=1,
    query_pre_attn_scalar=16, rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0, sliding_window=9,
    num_hidden_layers=6, **_GEMMA,
)  # fmt: skip
_PHI = dict(architectures=["PhiForCausalLM"], attention_dropout=0.0, embd_pdrop=0.0, hidden_act="gelu_new",
            initializer_range=0.02, layer_norm_eps=1e-5, model_type="phi", qk_layernorm=False, resid_pdrop=0.0,
            rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="float16")  # fmt: skip
_PHI3 = dict(
    architectures=["Phi3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    bos_token_id=1, embd_pdrop=0.0, eos_token_id=3, hidden_act="silu", initializer_range=0.02, model_type="phi3",
    num_key_value_heads=4, original_max_position_embeddings=72, pad_token_id=3, resid_pdrop=0.0, rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.40.2",
)  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": _GPT2,
    "openai-community/gpt2-medium": _GPT2 | dict(n_special=0, predict_special_tokens=True),
    "distilbert/distilgpt2": _GPT2 | dict(_num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}),
    "HuggingFaceTB/SmolLM2-135M": published(
        **_LLAMA, bos_token_id=0, eos_token_id=0, hidden_size=72, num_attention_heads=9, num_key_value_heads=3,
        is_llama_config=True, rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        torch_dtype="bfloat16", transformers_version="4.40.1"),
    "HuggingFaceTB/SmolLM3-3B": published(
        architectures=["SmolLM3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=None,
        eos_token_id=12, hidden_act="silu", initializer_range=0.02, layer_types=["full_attention"] * 4,
        max_window_layers=28, mlp_bias=False, model_type="smollm3", no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0], num_hidden_layers=4, num_key_value_heads=1, pad_token_id=4, pretraining_tp=2,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5000000.0, sliding_window=None, torch_dtype="bfloat16",
        transformers_version="4.54.0.dev0", use_sliding_window=False),
    "meta-llama/Llama-3.2-1B-Instruct": published(
        **_LLAMA, bos_token_id=0, eos_token_id=[1, 8, 9], head_dim=12, mlp_bias=False, num_key_value_heads=1,
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=16,
                          rope_type="llama3"),
        rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.45.0.dev0"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": published(
        **_LLAMA, bos_token_id=1, eos_token_id=2, num_key_value_heads=1, rope_scaling=None, rope_theta=10000.0,
        tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.35.0"),
    "deepseek-ai/deepseek-coder-1.3b-base": published(
        **_LLAMA, bos_token_id=2, eos_token_id=4, num_key_value_heads=4, rope_scaling=dict(factor=4.0, type="linear"),
        rope_theta=100000, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.33.1"),
    "mistralai/Mistral-7B-v0.1": published(
        architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", model_type="mistral",
        initializer_range=0.02, num_key_value_heads=1, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=9,
        tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.34.0.dev0"),
    "mistralai/Mistral-7B-v0.3": published(
        architectures=["MistralForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2, hidden_act="silu",
        initializer_range=0.02, model_type="mistral", num_key_value_heads=1, rms_norm_eps=1e-5, rope_theta=1000000.0,
        sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.42.0.dev0"),
    "mistralai/Mistral-Nemo-Base-2407": published(
        architectures=["MistralForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2, hidden_act="silu",
        head_dim=8, initializer_range=0.02, model_type="mistral", num_key_value_heads=1, rms_norm_eps=1e-5,
        rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16"),
    "Qwen/Qwen1.5-0.5B": published(
        **_QWEN, architectures=["Qwen2ForCausalLM"], bos_token_id=3, eos_token_id=3, max_window_layers=21,
        model_type="qwen2", num_key_value_heads=4, rope_theta=1000000.0, sliding_window=9,
        transformers_version="4.37.0"),
    "Qwen/Qwen2.5-0.5B": published(
        **_QWEN, architectures=["Qwen2ForCausalLM"], bos_token_id=3, eos_token_id=3, max_window_layers=24,
        hidden_size=56, num_attention_heads=14, num_key_value_heads=2, model_type="qwen2", rope_theta=1000000.0,
        sliding_window=9, transformers_version="4.40.1", use_mrope=False),
    "Qwen/Qwen3-0.6B": published(
        **_QWEN, architectures=["Qwen3ForCausalLM"], attention_bias=False, bos_token_id=3, eos_token_id=5, head_dim=24,
        max_window_layers=28, model_type="qwen3", num_key_value_heads=2, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, transformers_version="4.51.0"),
    "google/gemma-2b": published(
        **_GEMMA, architectures=["GemmaForCausalLM"], hidden_act="gelu", model_type="gemma", num_key_value_heads=1,
        rope_scaling=None, rope_theta=10000.0, transformers_version="4.38.0.dev0"),
    "google/gemma-1.1-2b-it": published(
        **_GEMMA, architectures=["GemmaForCausalLM"], hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh", model_type="gemma", num_key_value_heads=1, rope_scaling=None,
        rope_theta=10000.0),
    "google/gemma-2-2b": published(
        **_GEMMA, architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=50.0, cache_implementation="hybrid",
        final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        model_type="gemma2", num_key_value_heads=2, query_pre_attn_scalar=16, rope_theta=10000.0, sliding_window=9,
        transformers_version="4.42.0.dev0"),
    "google/gemma-3-270m": published(
        **_GEMMA3, _sliding_window_pattern=6, layer_types=["sliding_attention"] * 5 + ["full_attention"],
        transformers_version="4.55.0.dev0", use_bidirectional_attention=False),
    "google/gemma-3-1b-it": published(
        **_GEMMA3 | dict(eos_token_id=[1, 6], rope_local_base_freq=10000, rope_theta=1000000),
        cache_implementation="hybrid", sliding_window_pattern=6, transformers_version="4.50.0.dev0"),
    "EleutherAI/pythia-70m": published(
        architectures=["GPTNeoXForCausalLM"], bos_token_id=0, eos_token_id=0, hidden_act="gelu", hidden_size=64,
        num_attention_heads=2, initializer_range=0.02, layer_norm_eps=1e-5, model_type="gpt_neox",
        rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False, torch_dtype="float16",
        transformers_version="4.24.0", use_parallel_residual=True),
    "roneneldan/TinyStories-33M": dict(
        activation_function="gelu_new", architectures=["GPTNeoForCausalLM"], attention_dropout=0,
        attention_layers=["global", "local", "global", "local"], attention_types=[[["global", "local"], 2]],
        bos_token_id=79, embed_dropout=0, eos_token_id=79, gradient_checkpointing=False, hidden_size=48,
        initializer_range=0.02, intermediate_size=None, layer_norm_epsilon=1e-5, max_position_embeddings=72,
        model_type="gpt_neo", num_heads=4, num_layers=4, resid_dropout=0, summary_activation=None,
        summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
        tokenizer_class="GPT2Tokenizer", torch_dtype="float32", use_cache=True, vocab_size=80, window_size=9),
    "microsoft/phi-1_5": published(
        **_PHI, _name_or_path="microsoft/phi-1_5", bos_token_id=None, eos_token_id=None, num_key_value_heads=None,
        partial_rotary_factor=0.5, hidden_size=64, transformers_version="4.37.0"),
    "microsoft/phi-2": published(
        **_PHI, _name_or_path="microsoft/phi-2", bos_token_id=5, eos_token_id=5, num_key_value_heads=4,
        partial_rotary_factor=0.4, hidden_size=80, transformers_version="4.37.0"),
    "microsoft/Phi-3-mini-4k-instruct": published(
        **_PHI3, _name_or_path="Phi-3-mini-4k-instruct", rope_scaling=None, sliding_window=9),
    "microsoft/Phi-3-mini-128k-instruct, first version": published(
        **_PHI3 | dict(original_max_position_embeddings=24), sliding_window=144,
        rope_scaling=dict(type="su", original_max_position_embeddings=24, long_factor=[1.1, 2.0, 3.5, 8.0, 20.0, 61.0],
                          short_factor=[1.0, 1.05, 1.1, 1.2, 1.4, 2.0])),
    "microsoft/Phi-3.5-mini-instruct": published(
        **_PHI3 | dict(original_max_position_embeddings=40), sliding_window=144,
        rope_scaling=dict(type="longrope", long_factor=[1.08, 1.1, 1.3, 5, 36.5, 64.0],
                          short_factor=[1.0, 1.02, 1.03, 1.5, 2.2, 2.9])),
    "microsoft/Phi-4-mini-instruct": published(
        **_PHI3 | dict(original_max_position_embeddings=40, tie_word_embeddings=True, num_key_value_heads=2),
        full_attn_mod=1, hidden_size=64, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
        partial_rotary_factor=0.75, sliding_window=144,
        rope_scaling=dict(type="longrope", long_factor=[1, 1.12, 2.6, 9.5, 31.9, 47.8], short_factor=[1.0] * 6)),
    "Qwen/Qwen2.5-7B-Instruct with yarn, as its page says": published(
        **_QWEN | dict(tie_word_embeddings=False), architectures=["Qwen2ForCausalLM"], model_type="qwen2",
        max_position_embeddings=32, max_window_layers=28, num_key_value_heads=2, rope_theta=1000000.0,
        sliding_window=144, rope_scaling=dict(factor=4.0, original_max_position_embeddings=32, type="yarn")),
    "Qwen/Qwen3-0.6B with yarn": published(
        **_QWEN, architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=24, max_window_layers=28,
        max_position_embeddings=40, model_type="qwen3", num_key_value_heads=2, rope_theta=1000000,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), sliding_window=None),
    "internlm and other Llamas with dynamic rope": published(
        **_LLAMA, num_key_value_heads=2, max_position_embeddings=32, rope_theta=1000000, tie_word_embeddings=False,
        rope_scaling=dict(factor=2.0, type="dynamic"), torch_dtype="bfloat16"),
    "allenai/OLMo-2-0425-1B": published(
        architectures=["Olmo2ForCausalLM"], attention_bias=False, attention_dropout=0.0, eos_token_id=5,
        hidden_act="silu", initializer_range=0.02, model_type="olmo2", num_key_value_heads=4, pad_token_id=7,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False, torch_dtype="float32",
        transformers_version="4.47.0"),
}  # fmt: skip

# refused by these words
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mistralai/Mixtral-8x7B-v0.1": (published(model_type="mixtral"), "model_type 'mixtral' is not supported"),
    "HuggingFaceTB/SmolLM2-135M, quantized with bitsandbytes": (
        published(**_LLAMA, quantization_config=dict(load_in_4bit=True, quant_method="bitsandbytes")),
        "quantization_config: weights quantized by bitsandbytes, 4 bits are not supported"),
}  # fmt: skip
