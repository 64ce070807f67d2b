"""families.py against transformers: names, shapes, config fields, what is absent means, and what is refused."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, VARIANTS, tiny
from transformers.activations import ACT2FN

import torch_ref.model
from mlxgpt.common import config as configs
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import families, params

PAIRS = [pytest.param(config, id=name) for name, config in (CASES | VARIANTS).items()]


def hf_config(config: configs.ModelConfig, *without: str) -> Any:
    """transformers' reading of our config.json, without some of its keys."""
    values = families.config_to_hf(config) | {"pad_token_id": None}
    return transformers.AutoConfig.for_model(
        str(values["model_type"]),
        **{key: values[key] for key in values if key not in ("architectures", "model_type", *without)},
    )


@pytest.mark.parametrize("config", PAIRS)
def test_names_and_shapes_are_transformers_own(config: configs.ModelConfig) -> None:
    model = transformers.AutoModelForCausalLM.from_config(hf_config(config))
    theirs = {families.strip(config, name): tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tied:
        del theirs[families.to_foreign(config, "lm_head.weight")[0]]
    table = params.table(families.on_disk(config))
    ours = {
        foreign: table[name].shape[::-1] if transposed else table[name].shape
        for foreign, (name, transposed) in families.from_foreign(config).items()
    }
    assert ours == theirs
    assert type(model).__name__ == families.config_to_hf(config)["architectures"][0]


@pytest.mark.parametrize("config", PAIRS)
def test_config_survives_the_way_there_and_back(config: configs.ModelConfig) -> None:
    values = families.config_to_hf(config)
    assert families.config_from_hf(values) == config
    rewritten = hf_config(config).to_dict() | {"architectures": values["architectures"]}
    assert "rope_theta" not in rewritten or config.position == "learned"
    assert families.config_from_hf(rewritten) == config
    new = ("rope_parameters", "layer_types")
    older = {key: value for key, value in values.items() if key not in new}
    assert families.config_from_hf(older) == config, "the spelling of older readers"
    rewritten = hf_config(config, *new).to_dict() | {"architectures": values["architectures"]}
    assert families.config_from_hf(rewritten) == config, "the same, read by transformers"


@pytest.mark.parametrize("config", PAIRS)
def test_the_reverse_undoes_every_name(config: configs.ModelConfig) -> None:
    reverse = families.from_foreign(config)
    names = [name for name, _ in reverse.values()]
    assert len(set(names)) == len(names) and set(names) >= set(params.table(config))
    for foreign, (name, transposed) in reverse.items():
        assert families.to_foreign(config, name) == (foreign, transposed)


def test_only_the_spelling_of_rope_differs_between_versions() -> None:
    config = CASES["llama-untied"]
    both = families.config_to_hf(config)
    assert both["rope_parameters"] == {"rope_type": "default", "rope_theta": both["rope_theta"]}
    for key in ("rope_theta", "rope_parameters"):
        assert families.config_from_hf({name: both[name] for name in both if name != key}) == config
    scaling = both | {"rope_scaling": {"type": "default"}}
    assert families.config_from_hf(scaling) == config
    both["rope_theta"] = 1.0
    assert families.config_from_hf(both).rope_theta == 5e5, "rope_parameters wins, as in transformers"


@pytest.mark.parametrize("family", [name for name, row in families.FAMILIES.items() if not row.own])
def test_an_absent_key_means_what_transformers_takes_it_to_mean(family: str) -> None:
    row = families.FAMILIES[family]
    theirs = transformers.AutoConfig.for_model(family)
    sizes = {
        key: value for ours, key in row.fields.items() if ours not in row.absent for value in [getattr(theirs, key)]
    }
    ours = families.config_from_hf({"model_type": family} | sizes)
    full = theirs.to_dict() | {"architectures": [row.architecture]}
    assert ours == families.config_from_hf(full)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_of_the_recipes_can_be_saved(family: str) -> None:
    families.check(tiny(family=family))


def test_the_pages_list_every_family() -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs/formats.md").read_text(encoding="utf-8")
    rows = "\n".join(f"| {name} | {row.about} |" for name, row in families.FAMILIES.items())
    assert f"|---|---|\n{rows}\n<!-- end of families -->" in page, "python -m benchmarks.families --write"
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert [name for name in families.FAMILIES if name.removesuffix("_text") not in readme] == []


KNOWN = ", ".join(families.FAMILIES)
ROPE = ", ".join(name for name, row in families.FAMILIES.items() if row.rope or row.own)
OTHER = {
    "norm": ("layer", "rms"),
    "position": ("rope", "learned"),
    "placement": ("pre", "post"),
    "qk_norm": ("none", "head"),
    "rope_scaling": ("none", "linear"),
    "no_rope": ((), (0,)),
}
FIXED = [(family, name) for family, row in families.FAMILIES.items() for name in row.fixed]


@pytest.mark.parametrize(("family", "name"), FIXED)
def test_a_choice_that_the_family_lacks_is_refused_by_name(family: str, name: str) -> None:
    wrong = copy.copy(tiny(family=family))
    value = getattr(wrong, name)
    default = (True, False) if isinstance(value, bool) else (4.0, 5.0) if isinstance(value, float) else (4, 6)
    other = next(choice for choice in OTHER.get(name, default) if choice != value)
    object.__setattr__(wrong, name, other)
    with pytest.raises(UserError, match=rf"^model\.{name} = .*family {family} can only be saved with") as caught:
        families.check(wrong)
    with pytest.raises(UserError):
        families.config_to_hf(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            dict(family="gpt2", position="rope"),
            f"model.position = 'rope': family gpt2 can only be saved with 'learned' ({ROPE} can)",
        ),
        (dict(family="gpt2", n_kv_head=2), "model.n_kv_head = 2: family gpt2 has only 4 with these sizes"),
        (dict(family="gpt2", head_dim=16), "model.head_dim = 16: family gpt2 has only 12 with these sizes"),
        (dict(family="gpt2", n_embd=50, head_dim=12), "model.n_embd = 50: expected a multiple of model.n_head = 4"),
        (
            dict(family="llama", norm_bias=True),
            "model.norm_bias = True: family llama has no such biases; expected false",
        ),
        (
            dict(family="gemma", activation="gelu"),
            "model.activation = 'gelu': family gemma can only be saved with 'gelu_tanh' or 'silu'",
        ),
        (
            dict(family="gpt_neox", placement="post"),
            "model.placement = 'post': family gpt_neox can only be saved with 'parallel2' or 'pre'",
        ),
        (
            dict(family="llama", rotary_dim=6),
            "model.rotary_dim = 6: family llama turns whole heads; expected model.head_dim = 12",
        ),
        (
            dict(family="gemma3_text", rope_scaling="yarn", rope_factor=2.0, rope_original=16),
            "model.rope_scaling = 'yarn': family gemma3_text can only be saved with none, linear, llama3",
        ),
        (
            dict(family="llama", rope_scaling="yarn", rope_factor=4.0, rope_original=16),
            "model.block_size = 32: family llama needs rope_factor * rope_original = 64 or more with yarn",
        ),
        (
            dict(family="llama", rope_scaling="dynamic", rope_factor=1.5, rope_original=16),
            "model.block_size = 32: family llama needs rope_factor * rope_original = 24 with dynamic",
        ),
        (
            dict(family="phi3", head_dim=8, rope_scaling="longrope", rope_short=[1.0] * 4, rope_long=[1.0] * 4),
            "model.head_dim = 8: family phi3 has only n_embd / n_head with longrope",
        ),
        (
            dict(family="gemma3_text", rope_local_theta=0.0),
            "model.rope_local_theta = 0.0: family gemma3_text needs a positive number",
        ),
        (
            dict(family="mistral", window=8, window_layers=[1]),
            "model.window_layers = (1,): family mistral has one window for all blocks",
        ),
        (
            dict(family="gemma2", attn_scale=0.3),
            "model.attn_scale = 0.3: family gemma2 needs the root of 1 / a whole number",
        ),
        (
            dict(family="llama", n_embd=50, head_dim=12),
            "model.n_embd = 50: expected a multiple of model.n_head = 4",
        ),
        (dict(family="qwen3", mlp_bias=True), "model.mlp_bias = True: family qwen3 has no such biases; expected false"),
    ],
)
def test_sizes_and_biases_that_the_family_lacks_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        families.check(tiny(**model))
    assert str(caught.value) == message


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match=rf"^model.family = 'gpt3': expected one of {KNOWN}$"):
        families.check(configs.ModelConfig(family="gpt3"))


REFUSED = [
    ("gpt2", {"model_type": "opt"}, f"c.json: model_type 'opt' is not supported: expected one of {KNOWN}"),
    (
        "llama",
        {"model_type": "mixtral"},
        "c.json: model_type 'mixtral' is not supported: mixtral is a mixture of experts, and experts are not read: "
        f"expected one of {KNOWN}",
    ),
    ("gpt2", {"model_type": ["gpt2"]}, f"c.json: model_type ['gpt2'] is not supported: expected one of {KNOWN}"),
    (
        "llama",
        {"architectures": ["LlamaForTokenClassification"]},
        "c.json: architectures ['LlamaForTokenClassification'] is not supported: expected ['LlamaForCausalLM']",
    ),
    (
        "llama",
        {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
        "c.json: quantization_config: weights quantized by GPTQ, 4 bits are not supported: expected float32, "
        "float16 or bfloat16, fp8 with scales, or mlx-lm's own quantization",
    ),
    (
        "gpt2",
        {"quantization": {"bits": 4}},
        "c.json: quantization: weights quantized by a method that is not named are not supported: expected float32, "
        "float16 or bfloat16, fp8 with scales, or mlx-lm's own quantization",
    ),
    ("gpt2", {"scale_attn_weights": False}, "c.json: scale_attn_weights = False is not supported: expected True"),
    (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "c.json: scale_attn_by_inverse_layer_idx = True is not supported: expected False",
    ),
    (
        "gpt2",
        {"activation_function": "tanh"},
        "c.json: activation_function = 'tanh' is not supported: "
        "expected one of gelu_new, gelu_pytorch_tanh, gelu_fast, gelu, gelu_python, silu, swish, relu, relu2",
    ),
    ("llama", {"hidden_act": None}, "c.json: hidden_act is missing"),
    ("llama", {"hidden_size": "48"}, "c.json: hidden_size = '48': expected int"),
    ("llama", {"num_hidden_layers": True}, "c.json: num_hidden_layers = True: expected int"),
    ("llama", {"num_hidden_layers": -1}, "c.json: model.n_layer = -1: expected a positive number"),
    ("llama", {"attention_bias": "no"}, "c.json: attention_bias = 'no': expected bool"),
    ("llama", {"pretraining_tp": 2}, "c.json: pretraining_tp = 2 is not supported: expected 1"),
    ("gpt2", {"n_embd": 50}, "c.json: model.n_embd = 50: expected a multiple of model.n_head = 4"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
        "c.json: rope_parameters.low_freq_factor = None: expected float",
    ),
    (
        "gemma3_text",
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        "c.json: rope_scaling: rope type 'yarn' is not supported: expected 'default' or 'linear' or 'llama3'",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "c.json: rope_parameters.partial_rotary_factor = 0.5 is not supported: expected 1.0",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "c.json: partial_rotary_factor = 0.5 is not supported: expected 1.0"),
    ("llama", {"rope_parameters": {"rope_theta": "x"}}, "c.json: rope_theta = 'x': expected float"),
    ("llama", {"rope_parameters": {"rope_theta": -1}}, "c.json: rope_theta = -1.0: expected a positive number"),
    ("llama", {"rms_norm_eps": float("nan")}, "c.json: rms_norm_eps = nan: expected a positive number"),
    (
        "llama",
        {"rope_parameters": {"full_attention": {}}},
        "c.json: rope_parameters = {'full_attention': {}} is not supported: expected one table for all layers",
    ),
    (
        "llama",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "c.json: layer_types: 'sliding_attention' is not supported: expected 'full_attention' in every layer",
    ),
    (
        "llama",
        {"use_sliding_window": True},
        "c.json: use_sliding_window = true is not supported without layer_types: expected false",
    ),
    (
        "gpt2",
        {"mlxgpt": {"format_version": 2}},
        "c.json: mlxgpt = {'format_version': 2}: expected a table with format_version 1",
    ),
    (
        "gpt2",
        {"mlxgpt": {"format_version": 1, "rope": True}},
        "c.json: mlxgpt.rope = True is not understood: expected false for a bias that the file holds",
    ),
    (
        "llama",
        {"mlxgpt": {"format_version": 1, "qkv_bias": False}},
        "c.json: mlxgpt.qkv_bias = False is not understood: expected false for a bias that the file holds",
    ),
]
REFUSED += [
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}},
     "c.json: rope_scaling: rope type 'longrope' is not supported: "
     "expected 'default' or 'linear' or 'llama3' or 'yarn' or 'dynamic'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}},
     "c.json: rope_scaling.original_max_position_embeddings = 16: expected max_position_embeddings = 32, "
     "which transformers takes"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}},
     "c.json: rope_scaling.alpha = 1000.0 is not supported with rope type 'dynamic'"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": -1.0}},
     "c.json: rope_scaling.attention_factor = -1.0: expected a positive number"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": "2"}}, "c.json: rope_scaling.factor = '2': expected float"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "c.json: rope_parameters.factor = None: expected float"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}},
     "c.json: rope_parameters.factor = 0.0: expected a positive number"),
    ("llama", {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
     "c.json: rope_parameters.factor = 2.0 is not supported with rope type 'default'"),
    ("qwen2", {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}},
     "c.json: rope_scaling.mrope_section = [1, 2] is not supported with rope type 'default'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 16}, "original_max_position_embeddings": 8},
     "c.json: original_max_position_embeddings = 8, but 16 in rope_scaling: expected one value"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
     "c.json: model.rope_short = (1.0,): expected 6 positive numbers, one a pair of rotary_dim"),
    ("phi3", {"rope_scaling": {"type": "su"}}, "c.json: rope_scaling.short_factor = None: expected a list of numbers"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}},
     "c.json: rope_scaling: rope type 'linear' is not supported: expected 'default' or 'longrope'"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
                               "original_max_position_embeddings": 16}},
     "c.json: original_max_position_embeddings = 4096, as it is where nothing says it, but 16 in rope_scaling: "
     "expected one value"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
                               "long_mscale": 1.2}},
     "c.json: rope_scaling.long_mscale = 1.2 is not supported: transformers does not read it and takes 1.0"),
    ("gpt_neo", {"attention_types": [[["global"], 3]]}, "c.json: attention_types has 3 blocks: expected 2"),
    ("gpt_neo", {"attention_types": None},
     "c.json: attention_types, as they are where nothing says it, has 24 blocks: expected 2"),
    ("gpt_neo", {"attention_types": [["local", 2]]},
     "c.json: attention_types = [['local', 2]]: expected lists of kinds, global or local, "
     "and how many times they come"),
    ("gpt_neo", {"window_size": 0}, "c.json: window_size = 0: expected a positive number"),
    ("phi", {"qk_layernorm": True}, "c.json: qk_layernorm = True is not supported: expected False"),
    ("phi", {"tie_word_embeddings": True},
     "c.json: a tied head is not supported with model_type 'phi'"),
    ("phi", {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 2}},
     "c.json: partial_rotary_factor = 2: expected a share of a head, above 0 and at most 1"),
    ("gpt_neox", {"rotary_pct": 0.01, "rope_parameters": None},
     "c.json: rotary_pct = 0.01: expected a share of a head, above 0 and at most 1"),
    ("gpt_neox", {"rotary_pct": 0.25, "rope_parameters": None},
     "c.json: model.rotary_dim = 3: expected an even number up to model.head_dim = 12"),
    ("gpt_neox", {"use_parallel_residual": "no"}, "c.json: use_parallel_residual = 'no': expected bool"),
    ("gemma", {"use_bidirectional_attention": True},
     "c.json: use_bidirectional_attention = True is not supported: expected False"),
    ("gemma2", {"query_pre_attn_scalar": 0.5},
     "c.json: query_pre_attn_scalar = 0.5: expected a positive whole number"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "c.json: attn_logit_softcapping = 0.0: expected a positive number"),
    ("gemma2", {"sliding_window": None}, "c.json: layer_types has 'sliding_attention', but sliding_window is null"),
    ("gemma2", {"sliding_window": 0}, "c.json: sliding_window = 0: expected a positive number or null"),
    ("gemma2", {"layer_types": ["full_attention"]},
     "c.json: layer_types = ['full_attention']: expected a list of 2, one a layer"),
    ("gemma2", {"layer_types": ["full_attention", "chunked_attention"]},
     "c.json: layer_types: 'chunked_attention' is not supported: "
     "expected 'full_attention' or 'sliding_attention' in every layer"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0},
     "c.json: attn_logit_softcapping = 50.0 is not supported: expected None"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
     "c.json: rope_parameters = {'rope_type': 'default', 'rope_theta': 1000000.0} is not supported: "
     "expected tables full_attention and sliding_attention"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "c.json: rope_parameters.sliding_attention: rope type 'linear' is not supported: expected 'default'"),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0},
     "c.json: sliding_window_pattern = 0: expected a positive number"),
    ("mistral", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
     "c.json: layer_types does not go with sliding_window = 8, which is for all layers"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
     "c.json: layer_types has 'sliding_attention', but use_sliding_window is not true"),
    ("smollm3", {"no_rope_layers": [1]}, "c.json: no_rope_layers = [1]: expected 2 values, 1 where a layer has rope"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0},
     "c.json: no_rope_layer_interval = 0: expected a positive number"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "message"), REFUSED)
def test_what_this_decoder_does_not_do_is_refused_by_name(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        families.config_from_hf(families.config_to_hf(tiny(family=family)) | change, where="c.json")
    assert str(caught.value) == message


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 99), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
) | st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "type", "format_version"]), st.integers(), max_size=2)
KEYS = sorted(
    {key for config in CASES.values() for key in families.config_to_hf(config)}
    | {"rope_scaling", "layer_types", "mlxgpt"}
)


@given(st.sampled_from(sorted(CASES)), st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=3))
@settings(max_examples=300, deadline=None, database=None)
def test_junk_in_a_config_is_refused_or_read_but_breaks_nothing(case: str, change: dict[str, Any]) -> None:
    try:
        config = families.config_from_hf(families.config_to_hf(CASES[case]) | change)
    except UserError as error:
        assert str(error).startswith("config.json: ")
    else:
        families.check(config)


@pytest.mark.parametrize("key", ["vocab_size", "n_embd", "n_positions"])
def test_a_size_that_is_missing_is_named(key: str) -> None:
    values = families.config_to_hf(tiny(family="gpt2"))
    del values[key]
    with pytest.raises(UserError, match=f"^config.json: {key} is missing$"):
        families.config_from_hf(values)


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("gpt_neo", "transformer.h.0.attn.attention.bias", None),
        ("gpt_neo", "transformer.h.1.attn.attention.masked_bias", None),
        ("gpt_neo", "h.1.attn.attention.out_proj.bias", "transformer.h.1.attn.attention.out_proj.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", None),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", None),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", None),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.bias", "gpt_neox.layers.0.attention.dense.bias"),
        ("gpt_neox", "lm_head.weight", "embed_out.weight"),
        ("gpt_neox", "embed_out.weight", "embed_out.weight"),
        ("phi", "model.layers.1.self_attn.rotary_emb.inv_freq", None),
        ("phi", "lm_head.bias", "lm_head.bias"),
    ],
)
def test_buffers_and_other_names_of_old_files(family: str, name: str, expected: str | None) -> None:
    assert families.strip(tiny(family=family), name) == expected


@pytest.mark.parametrize("name", families.ACTIVATIONS)
def test_an_activation_is_the_function_that_transformers_calls_so(name: str) -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    ours = torch_ref.model.activate(x, families.ACTIVATIONS[name])
    torch.testing.assert_close(ACT2FN[name](x), ours, rtol=0, atol=1e-9)


def test_gemmas_first_config_said_gelu_and_meant_tanh() -> None:
    values = families.config_to_hf(CASES["gemma"]) | {"hidden_act": "gelu"}
    assert families.config_from_hf(values) == CASES["gemma"]


def test_a_share_of_a_head_that_rounds_down_is_written_so_that_it_comes_back() -> None:
    """49 * (2 / 98) and its like: the share must give the same whole number of dimensions, here and in transformers."""
    for head_dim in range(4, 200, 2):
        for rotary_dim in range(2, head_dim + 1, 2):
            config = dataclasses.replace(CASES["phi"], head_dim=head_dim, rotary_dim=rotary_dim)
            part = families.config_to_hf(config)["partial_rotary_factor"]
            assert int(head_dim * part) == rotary_dim and part <= 1


def test_a_window_that_is_switched_off_says_nothing() -> None:
    config = CASES["qwen3"]
    values = families.config_to_hf(config)
    off = {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 1}
    assert families.config_from_hf(values | off) == config
    assert families.config_from_hf(values | off | {"layer_types": ["full_attention"] * 2}) == config


def test_biases_that_only_the_format_asks_for_stand_under_our_own_key() -> None:
    values = families.config_to_hf(CASES["gpt2-nobias-erf"])
    zeros = {"qkv_bias": False, "out_bias": False, "mlp_bias": False, "norm_bias": False}
    assert values["mlxgpt"] == {"format_version": 1} | zeros
    assert values["activation_function"] == "gelu"
    assert "mlxgpt" not in families.config_to_hf(CASES["gpt2"]) and "mlxgpt" not in families.config_to_hf(
        CASES["llama"]
    )
    llama = families.config_to_hf(CASES["llama-bias"])
    assert llama["attention_bias"] and llama["mlxgpt"] == {"format_version": 1, "out_bias": False}
