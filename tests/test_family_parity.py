"""What families say besides, against the libraries themselves: configs others wrote, caches, rope, mlx-lm's gaps.

The parity ladder (test_model_parity.py) holds logits and gradients of every family against transformers.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import arriving
import ladder
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from arriving import TOKENS
from compare import agree, worst
from hub import GPT2, LLAMA3, PUBLISHED, REFUSED, SIZES, THEIRS
from mlx_lm.utils import load_model
from models import CASES, LINEAR, LONG, LONGROPE, VARIANTS, WINDOW, YARN, tiny, weights

import mlxgpt.load
import mlxgpt.model
import torch_ref.load
import torch_ref.model
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import families, rotary

ALL = CASES | VARIANTS


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_agree_with_transformers(case: str, tmp_path: Path) -> None:
    figures = ladder.compare(case, VARIANTS[case], 8.0, tmp_path / "m")
    print(*figures, sep="\n")
    for figure in figures:
        assert figure.agrees, figure


@pytest.mark.parametrize("case", THEIRS)
def test_a_folder_that_transformers_wrote_runs_here_and_goes_back(case: str, tmp_path: Path) -> None:
    """Old and new keys mean one model; its logits are transformers' own; our copy of it loads there bit-equal."""
    kind, old, new = THEIRS[case]
    sizes = {"model_type": kind} | (GPT2 if kind == "gpt2" else SIZES)
    theirs = arriving.saved(sizes | old, tmp_path / "theirs", own_config=False)
    config = model_folder.read_config(tmp_path / "theirs")
    for keys in (old, new):
        assert families.config_from_hf(sizes | keys) == config
    arrived = arriving.arrive(case, tmp_path / "theirs", theirs)
    assert arrived.agrees, arrived
    arriving.goes_back(tmp_path / "theirs", tmp_path / "ours", theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_as_it_is_on_the_hub(name: str, tmp_path: Path) -> None:
    """With all its keys; what it computes is what transformers makes of the same folder, which it does load."""
    arriving.saved(PUBLISHED[name], tmp_path / "theirs", own_config=True)
    theirs = arriving.loaded(tmp_path / "theirs")
    arrived = arriving.arrive(name, tmp_path / "theirs", theirs)
    assert arrived.agrees, arrived
    arriving.goes_back(tmp_path / "theirs", tmp_path / "ours", theirs)


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_on_the_hub_that_is_refused_by_name(name: str, tmp_path: Path) -> None:
    values, message = REFUSED[name]
    with pytest.raises(UserError) as raised:
        families.config_from_hf(values, where="config.json")
    assert message in str(raised.value)


# sizes that are a multiple of nothing; a head as wide as it likes where the family allows it
ODD = {
    family: tiny(family=family, n_layer=1, n_head=3, vocab_size=83, block_size=37, n_hidden=71, **more)
    for family, row in families.FAMILIES.items()
    if not row.own
    for more in [
        dict(n_embd=45)
        if row.one_head_size
        else dict(n_embd=42, n_kv_head=1)
        if row.derived_head
        else dict(n_embd=45, n_kv_head=1, head_dim=10)
    ]
}
ODD["gpt_neox"] = dataclasses.replace(ODD["gpt_neox"], rotary_dim=14)


@pytest.mark.parametrize("family", ODD)
def test_odd_sizes_agree_with_transformers(family: str, tmp_path: Path) -> None:
    for figure in ladder.compare(f"{family}, odd", ODD[family], 8.0, tmp_path / "m"):
        assert figure.agrees, figure


SPECIAL = [name for name, config in ALL.items() if config.window or config.attn_softcap or config.no_rope]
CACHED = [name for name in SPECIAL if not rotary.by_length(ALL[name])]  # those: tests/test_rope_scaling.py


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
    spread = {
        "none": {},
        "linear": {"factor": 4.0},
        "llama3": LLAMA3,
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 24},
        "dynamic": {"factor": 3.0},
        "longrope": {"short_factor": [1.0 + n / 9 for n in range(8)], "long_factor": [2.0 + n for n in range(8)]},
    }[kind]
    table = dict(rope_type="default" if kind == "none" else kind, rope_theta=3e4, **spread)
    keys: dict[str, Any] = SIZES | dict(hidden_size=64, num_key_value_heads=4, head_dim=16, num_hidden_layers=6)
    keys |= dict(original_max_position_embeddings=24) if kind == "longrope" else {}
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
    if not config.rope_local_theta:
        assert embedding.attention_scaling == rotary.attention(config)
    for length in (24, 25, 72, 73, 100, 216) if rotary.by_length(config) else ():
        embedding(torch.zeros(1), torch.arange(length)[None])
        found = rotary.frequencies(config, length=length)
        np.testing.assert_allclose(found, embedding.inv_freq.numpy(), rtol=1e-6, err_msg=f"{length}")


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
    "llama-yarn-factor": tiny(family="llama", rope_attention=1.4, **LONG, **YARN),
    "llama-yarn-truncate": tiny(family="llama", rope_truncate=False, rope_theta=100.0, **LONG, **YARN),
    "phi3-longrope-factor": tiny(
        family="phi3", rope_attention=1.4, **LONG, **LONGROPE | dict(rope_short=LONGROPE["rope_long"])
    ),
    "phi3-longrope-factors": tiny(family="phi3", **LONG, **LONGROPE),
    "stablelm-linear": tiny(family="stablelm", **LONG, **LINEAR),
    "starcoder2-linear": tiny(
        family="starcoder2", qkv_bias=True, out_bias=True, mlp_bias=True, window=0, **LONG, **LINEAR
    ),
    "mistral-wide": tiny(family="mistral", block_size=32, window=32),
}


def mlx_lm_logits(place: Path, tokens: np.ndarray) -> np.ndarray | BaseException:
    """mlx-lm's logits, or what it fails with."""
    try:
        return np.array(load_model(place)[0](mx.array(tokens)))
    except (Exception, SystemExit) as error:  # its olmo leaves where a package of AI2's is missing
        return error


@pytest.mark.parametrize("case", ALL | GAPS)
def test_mlx_lm_computes_the_same_or_we_say_what_it_does_otherwise(case: str, tmp_path: Path) -> None:
    config = (ALL | GAPS)[case]
    assert len(families.mlx_lm_deviations(config)) < 2 or case not in GAPS or config.family == "gemma"
    made, tokens = weights(config, scale=8.0), TOKENS[:, : config.block_size]
    if config.rope_scaling == "longrope":  # beyond it mlx-lm is right
        tokens = tokens[:, : config.rope_original]
    model_folder.write_model(tmp_path, config, made)
    with torch.no_grad():
        expected = ladder.torch_model(config, made, torch.float32)(torch.from_numpy(tokens)).numpy()
    found, said = mlx_lm_logits(tmp_path, tokens), families.mlx_lm_deviations(config)
    gap = np.inf if isinstance(found, BaseException) else worst(case, found, expected)
    print(said, repr(found)[:200] if isinstance(found, BaseException) else "")
    assert gap > 1e-4 if said else gap <= 1e-5
    assert isinstance(found, BaseException) == any("cannot" in line for line in said)


def test_where_mlx_lm_differs_is_named() -> None:
    said = {case: families.mlx_lm_deviations(config) for case, config in ALL.items()}
    assert said["llama"] == said["llama-llama3"] == said["gpt2"] == said["qwen3"] == said["smollm3"] == []
    assert said["gpt2-nobias-erf"] == ["mlx-lm computes gelu_tanh in gpt2, this model has gelu"]
    assert said["gemma"] == ["mlx-lm computes gelu in gemma, this model has gelu_tanh"]
    assert said["mistral"] == ["mlx-lm sees everything in mistral, this model has a window of 12 tokens"]
    assert all("\n" not in line for lines in said.values() for line in lines)


def test_layer_types_would_not_bring_mistrals_window_to_mlx_lm(tmp_path: Path) -> None:
    """Why they are not written: mlx-lm wants a layer that sees everything, transformers has none and warns."""
    model_folder.write_model(tmp_path, CASES["mistral"], weights(CASES["mistral"]))
    values = json.loads((tmp_path / "config.json").read_text())
    assert "layer_types" not in values
    (tmp_path / "config.json").write_text(json.dumps(values | {"layer_types": ["sliding_attention"] * 2}))
    assert model_folder.read_config(tmp_path) == CASES["mistral"], "others may have written them"
    assert isinstance(mlx_lm_logits(tmp_path, TOKENS), ValueError)
