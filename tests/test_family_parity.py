"""What families say besides, against the libraries themselves: configs others wrote, caches, rope, mlx-lm's gaps.

The parity ladder (test_model_parity.py) holds logits and gradients of every family against transformers.
"""

import json
from pathlib import Path
from typing import Any

import ladder
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from compare import agree, worst
from mlx_lm.utils import load_model
from models import CASES, LINEAR, LONG, VARIANTS, WINDOW, tiny, weights

import mlxgpt.load
import mlxgpt.model
import torch_ref.load
import torch_ref.model
from mlxgpt.common import families, folder, rng, rotary
from mlxgpt.common.config import ModelConfig

ALL = CASES | VARIANTS
TOKENS = rng.integers(5, "tokens", 0, count=2 * 64, high=80).astype(np.int32).reshape(2, 64)


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_agree_with_transformers(case: str, tmp_path: Path) -> None:
    figures = ladder.compare(case, VARIANTS[case], 8.0, tmp_path / "m")
    print(*figures, sep="\n")
    for figure in figures:
        assert figure.agrees, figure


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


@pytest.mark.parametrize("case", THEIRS)
def test_a_folder_that_transformers_wrote_runs_here_and_goes_back(case: str, tmp_path: Path) -> None:
    """Old and new keys mean one model; its logits are transformers' own; our copy of it loads there bit-equal."""
    kind, old, new = THEIRS[case]
    sizes = GPT2 if kind == "gpt2" else SIZES
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes, **old))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    expected = theirs(torch.from_numpy(TOKENS)).logits.detach().numpy()

    config = folder.read_config(tmp_path / "theirs")
    for keys in (old, new):
        assert families.config_from_hf({"model_type": kind} | sizes | keys) == config
    model, _ = torch_ref.load.load(tmp_path / "theirs", device="cpu")
    exact = torch_ref.model.Model(config, torch.float64).double()
    exact.load_state_dict(model.state_dict())
    found, floor = (ladder.host(m(torch.from_numpy(TOKENS))) for m in (model, exact))
    gate = max(1e-5, 4 * worst("floor", found, floor))
    agree(f"{case}: torch", found, expected, gate)
    agree(
        f"{case}: MLX",
        np.array(mlxgpt.load.load(tmp_path / "theirs", device="cpu")[0](mx.array(TOKENS))),
        expected,
        gate,
    )

    folder.write_model(tmp_path / "ours", config, folder.read_params(tmp_path / "theirs", config))
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    back, info = load(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    state = back.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(back.eval()(torch.from_numpy(TOKENS)).logits, theirs(torch.from_numpy(TOKENS)).logits)


CACHED = [name for name, config in ALL.items() if config.window or config.attn_softcap or config.no_rope]


@pytest.mark.parametrize("case", CACHED)
def test_rung_6_cached_decoding_is_the_full_forward(case: str) -> None:
    """Prefill in chunks, then token by token, past the window; and the same rows behind padding."""
    config = ALL[case]
    made = weights(config, scale=4.0)
    model = mlxgpt.model.Model(config)
    model.update(ladder.tree_unflatten([(name, mx.array(value)) for name, value in made.items()]))
    other = ladder.torch_model(config, made, torch.float32)
    tokens, pad = TOKENS[:, :32], 5
    padded = np.concatenate([np.zeros((2, pad), np.int32), tokens], axis=1)
    spots = np.maximum(np.arange(32 + pad) - pad, 0)
    whole, other_whole = model(mx.array(tokens)), other(torch.from_numpy(tokens))
    cache, other_cache = mlxgpt.model.make_cache(model, 2, 64), torch_ref.model.make_cache(other, 2, 64)
    parts, other_parts, start = [], [], 0
    for size in (5, 14, *[1] * 13):
        chunk = tokens[:, start : start + size]
        parts.append(np.array(model(mx.array(chunk), cache=cache)))
        with torch.no_grad():
            other_parts.append(other(torch.from_numpy(chunk), cache=other_cache).numpy())
        start += size
    agree("MLX", np.concatenate(parts, axis=1), np.array(whole), 1e-5)
    agree("torch", np.concatenate(other_parts, axis=1), ladder.host(other_whole), 1e-5)
    room = [mx.array(padded), mx.array(spots)], [torch.from_numpy(padded), torch.from_numpy(spots)]
    shifted = np.array(model(*room[0], pad=mx.array([pad, pad])))[:, pad:]
    agree("MLX, padded", shifted, np.array(whole), 1e-5)
    shifted = ladder.host(other(*room[1], pad=torch.tensor([pad, pad])))[:, pad:]
    agree("torch, padded", shifted, ladder.host(other_whole), 1e-5)


SCALED = [(name, kind) for name, row in families.FAMILIES.items() if row.rope for kind in ("none", *row.rope.scalings)]


@pytest.mark.parametrize(("family", "kind"), SCALED)
def test_rotary_frequencies_are_transformers_own(family: str, kind: str) -> None:
    spread = {"none": {}, "linear": {"factor": 4.0}, "llama3": LLAMA3}[kind]
    table = dict(rope_type="default" if kind == "none" else kind, rope_theta=3e4, **spread)
    keys: dict[str, Any] = SIZES | dict(hidden_size=64, num_key_value_heads=4, head_dim=16, num_hidden_layers=6)
    keys["rope_parameters"] = (
        dict(full_attention=table, sliding_attention=dict(rope_type="default", rope_theta=1e3))
        if families.FAMILIES[family].rope.local  # type: ignore[union-attr]
        else table
    )
    config = families.config_from_hf({"model_type": family} | keys)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **keys))
    embedding = getattr(model, model.base_model_prefix).rotary_emb
    for local, name in ((False, "full_attention_inv_freq"), (True, "sliding_attention_inv_freq")):
        expected = getattr(embedding, name if config.rope_local_theta else "inv_freq").numpy()
        found = rotary.frequencies(config, local)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# models that differ from what mlx-lm does in one point each
GAPS: dict[str, ModelConfig] = {
    "gemma-untied": tiny(family="gemma", tied=False),
    "gemma-bias": tiny(family="gemma", qkv_bias=True, out_bias=True),
    "gemma3_text-bias": tiny(
        family="gemma3_text", n_embd=64, window_layers=[0], qkv_bias=True, out_bias=True, **WINDOW
    ),
    "phi-erf": tiny(family="phi", activation="gelu"),
    "gemma2-linear": tiny(family="gemma2", window=0, **LONG, **LINEAR),
    "gemma2-untied": tiny(family="gemma2", window=0, tied=False),
    "gemma2-bias": tiny(family="gemma2", window=0, qkv_bias=True, out_bias=True),
    "gemma2-full": tiny(family="gemma2", window=0),
    "gemma3_text-exact": tiny(family="gemma3_text", n_embd=64, window_layers=[0], **WINDOW),
    "gemma3_text-odd": tiny(family="gemma3_text", n_embd=64, n_layer=3, window_layers=[1, 2], **WINDOW),
    "gemma3_text-all": tiny(family="gemma3_text", n_embd=64, **WINDOW),
    "gemma3_text-softcap": tiny(family="gemma3_text", n_embd=64, window=0, final_softcap=2.0),
    "gpt_neox-tanh": tiny(family="gpt_neox", activation="gelu_tanh", **LONG),
    "gpt_neox-linear": tiny(family="gpt_neox", activation="gelu_tanh", **LONG, **LINEAR),
    "gpt_neox-tied": tiny(family="gpt_neox", activation="gelu_tanh", tied=True),
    "gpt_neox-wide": tiny(family="gpt_neox", activation="gelu_tanh", n_hidden=80),
    "phi-linear": tiny(family="phi", **LONG, **LINEAR),
    "phi-heads": tiny(family="phi", head_dim=16),
    "qwen2-heads": tiny(family="qwen2", head_dim=16),
    "qwen3-bias": tiny(family="qwen3", qkv_bias=True, out_bias=True),
    "smollm3-all": tiny(family="smollm3", **WINDOW),
    "mistral-wide": tiny(family="mistral", block_size=32, window=32),
}


def mlx_lm_logits(place: Path, tokens: np.ndarray) -> np.ndarray | Exception:
    """mlx-lm's logits, or what it fails with."""
    try:
        return np.array(load_model(place)[0](mx.array(tokens)))
    except Exception as error:
        return error


@pytest.mark.parametrize("case", ALL | GAPS)
def test_mlx_lm_computes_the_same_or_we_say_what_it_does_otherwise(case: str, tmp_path: Path) -> None:
    config = (ALL | GAPS)[case]
    assert len(families.mlx_lm_deviations(config)) < 2 or case not in GAPS or config.family == "gemma"
    made, tokens = weights(config, scale=8.0), TOKENS[:, : config.block_size]
    folder.write_model(tmp_path, config, made)
    with torch.no_grad():
        expected = ladder.torch_model(config, made, torch.float32)(torch.from_numpy(tokens)).numpy()
    found, said = mlx_lm_logits(tmp_path, tokens), families.mlx_lm_deviations(config)
    gap = np.inf if isinstance(found, Exception) else worst(case, found, expected)
    print(said, repr(found)[:200] if isinstance(found, Exception) else "")
    assert gap > 1e-4 if said else gap <= 1e-5
    assert isinstance(found, Exception) == any("cannot" in line for line in said)


def test_where_mlx_lm_differs_is_named() -> None:
    said = {case: families.mlx_lm_deviations(config) for case, config in ALL.items()}
    assert said["llama"] == said["llama-llama3"] == said["gpt2"] == said["qwen3"] == said["smollm3"] == []
    assert said["gpt2-nobias-erf"] == ["mlx-lm computes gelu_tanh in gpt2, this model has gelu"]
    assert said["gemma"] == ["mlx-lm computes gelu in gemma, this model has gelu_tanh"]
    assert said["mistral"] == ["mlx-lm sees everything in mistral, this model has a window of 12 tokens"]
    assert all("\n" not in line for lines in said.values() for line in lines)


def test_layer_types_would_not_bring_mistrals_window_to_mlx_lm(tmp_path: Path) -> None:
    """Why they are not written: mlx-lm wants a layer that sees everything, transformers has none and warns."""
    folder.write_model(tmp_path, CASES["mistral"], weights(CASES["mistral"]))
    values = json.loads((tmp_path / "config.json").read_text())
    assert "layer_types" not in values
    (tmp_path / "config.json").write_text(json.dumps(values | {"layer_types": ["sliding_attention"] * 2}))
    assert folder.read_config(tmp_path) == CASES["mistral"], "others may have written them"
    assert isinstance(mlx_lm_logits(tmp_path, TOKENS), ValueError)
