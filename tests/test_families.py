"""families.py against transformers: names, shapes, config fields, what is absent means, and what is refused."""

import copy
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, tiny

from mlxgpt.common import config as configs
from mlxgpt.common import families, params
from mlxgpt.common.errors import UserError

PAIRS = [pytest.param(config, id=name) for name, config in CASES.items()]


def hf_config(config: configs.ModelConfig) -> Any:
    values = families.config_to_hf(config) | {"pad_token_id": None}
    return transformers.AutoConfig.for_model(**{key: values[key] for key in values if key != "architectures"})


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
    older = {key: value for key, value in values.items() if key not in ("rope_parameters", "layer_types")}
    assert families.config_from_hf(older) == config, "the spelling of older readers"


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


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_absent_key_means_what_transformers_takes_it_to_mean(family: str) -> None:
    row = families.FAMILIES[family]
    theirs = transformers.AutoConfig.for_model(family)
    sizes = {
        key: value for ours, key in row.fields.items() if ours not in row.absent for value in [getattr(theirs, key)]
    }
    ours = families.config_from_hf({"model_type": family} | sizes)
    full = theirs.to_dict() | {"architectures": [row.architecture]}
    assert ours == families.config_from_hf(full)


@pytest.mark.parametrize("family", configs.FAMILY_DEFAULTS)
def test_every_family_of_the_recipes_can_be_saved(family: str) -> None:
    families.check(tiny(family=family))
    assert set(configs.FAMILY_DEFAULTS) == set(families.FAMILIES)


KNOWN = ", ".join(families.FAMILIES)
ROPE = ", ".join(name for name, row in families.FAMILIES.items() if row.rope)
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
    ("llama", {"model_type": "mixtral"}, f"c.json: model_type 'mixtral' is not supported: expected one of {KNOWN}"),
    ("gpt2", {"model_type": ["gpt2"]}, f"c.json: model_type ['gpt2'] is not supported: expected one of {KNOWN}"),
    (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        "c.json: architectures ['LlamaForSequenceClassification'] is not supported: expected ['LlamaForCausalLM']",
    ),
    (
        "llama",
        {"quantization_config": {"bits": 4}},
        "c.json: quantization_config: quantised weights are not supported: expected float32, float16 or bfloat16",
    ),
    (
        "gpt2",
        {"quantization": {"bits": 4}},
        "c.json: quantization: quantised weights are not supported: expected float32, float16 or bfloat16",
    ),
    ("gpt2", {"scale_attn_weights": False}, "c.json: scale_attn_weights = False is not supported: expected True"),
    (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "c.json: scale_attn_by_inverse_layer_idx = True is not supported: expected False",
    ),
    (
        "gpt2",
        {"activation_function": "relu"},
        "c.json: activation_function = 'relu' is not supported: "
        "expected one of gelu_new, gelu_pytorch_tanh, gelu_fast, gelu, gelu_python, silu, swish",
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
        "qwen3",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
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
