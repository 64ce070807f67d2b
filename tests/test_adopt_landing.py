"""What an adopted model is written as: the published architecture that says it exactly, or our own with the reason."""

from typing import Any

import numpy as np
import pytest

from convert.adopt import apply
from convert.adopt.landing import land
from convert.formats.opened import Tensor
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import families, params
from torch_ref.trial import Trials

BASE: dict[str, Any] = {"family": "mlxgpt", "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 61, "block_size": 32,
                        "fused_qkv": False}  # fmt: skip
BARE: dict[str, Any] = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "norm_bias"), False)
LLAMA: dict[str, Any] = {"norm": "rms", "position": "rope", "gated": True, "activation": "silu", **BARE}

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "gpt2": ({"activation": "relu"}, "gpt2", "GPT2LMHeadModel"),
    "no biases": (BARE, "gpt2", "GPT2LMHeadModel"),
    "llama": ({**LLAMA, "n_kv_head": 2}, "llama", "LlamaForCausalLM"),
    "window": ({**LLAMA, "window": 8}, "mistral", "MistralForCausalLM"),
    "q, k, v biases": ({**LLAMA, "qkv_bias": True}, "qwen2", "Qwen2ForCausalLM"),
    "q and k normed": ({**LLAMA, "qk_norm": "head"}, "qwen3", "Qwen3ForCausalLM"),
    "by head": ({"position": "rope", "placement": "parallel2", "tied": False}, "gpt_neox", "GPTNeoXForCausalLM"),
    "LayerNorm, grouped": ({"position": "rope", "n_kv_head": 2}, "starcoder2", "Starcoder2ForCausalLM"),
    "TinyStories": (
        {
            **BARE,
            "out_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "attn_scale": 1.0,
            "window": 8,
            "window_layers": (1,),
        },
        "gpt_neo",
        "GPTNeoForCausalLM",
    ),
    "2017": ({"placement": "post_add"}, "mlxgpt", "placement is 'pre' there and 'post_add' here"),
    "sinusoids": ({"position": "sinusoidal"}, "mlxgpt", "position is 'learned' there and 'sinusoidal' here"),
    "no last norm": ({"final_norm": False}, "mlxgpt", "final_norm is True there and False here"),
    "a gate in gpt2": ({"gated": True, "activation": "silu"}, "mlxgpt", "gated is False there and True here"),
}


@pytest.mark.parametrize(("fields", "family", "why"), CASES.values(), ids=CASES)
def test_a_model_lands_where_it_is_said_exactly(fields: dict[str, Any], family: str, why: str) -> None:
    config = ModelConfig(**{**BASE, **fields})
    landing = land(config)
    assert landing.config.family == family and why in landing.why
    assert landing.published == (family != "mlxgpt")
    families.check(landing.config)
    weights = {name: array * 5 for name, array in params.init_params(config, 0).items()}
    given = {name: Tensor(array.shape, array.dtype, lambda array=array: array) for name, array in weights.items()}
    made = {name: tensor.read() for name, tensor in apply.fused(landing.config, given).items()}
    assert {name: array.shape for name, array in made.items()} == {
        name: param.shape for name, param in params.table(landing.config).items()
    }
    ids = np.arange(16, dtype=np.int32)[None] % 61
    wanted, found = (Trials().run(*each, ids)[0] for each in ((config, weights), (landing.config, made)))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
