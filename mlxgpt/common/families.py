"""One table: our names and choices <-> each architecture's names in a Hugging Face folder. The reverse is derived.

A family says which class transformers reads it with, how modules and config fields are called there, which of our
choices it fixes, and what a config.json must not ask for. ``params.py`` says which tensors a model has; this file
only renames them. What is not in the table is refused by name, never approximated.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxgpt.common import params
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError

FORMAT_VERSION = 1
BIASES = ("qkv_bias", "out_bias", "mlp_bias", "norm_bias")

# config.json's names of the activations -> ours; two of theirs may be one function
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one architecture calls things. Absent keys of config.json mean what transformers takes them to mean."""

    architecture: str
    modules: Mapping[str, str]  # our module -> theirs; {n} is the block
    fields: Mapping[str, str]  # our field -> key of config.json
    absent: Mapping[str, Any]  # our field -> its value where the key is absent; a field not here must be there
    fixed: Mapping[str, Any]  # our field -> the one value the architecture has
    biases: Mapping[str, str | bool]  # our bias field -> the key that says so, or what the architecture always does
    must: Mapping[str, Any] = field(default_factory=dict)  # key -> the one value that this decoder can follow
    writes: Mapping[str, Any] = field(default_factory=dict)  # further keys that a folder of ours says
    repeats: Mapping[str, str] = field(default_factory=dict)  # second key that other readers want -> our field
    transposed: tuple[str, ...] = ()  # our modules whose matrix is stored [in, out]
    prefixes: tuple[str, ...] = ()  # what names in a file may start with besides
    ignored: str = r"(?!)"  # buffers that old files carry
    tanh: str = "gelu_pytorch_tanh"  # what config.json calls gelu_tanh
    one_head_size: bool = False  # head_dim = n_embd / n_head and n_kv_head = n_head, with no key to say otherwise


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
_LLAMA_FIXED = {
    "norm": "rms",
    "gated": True,
    "position": "rope",
    "qk_norm": False,
    "fused_qkv": False,
}
_ROTARY = r"(.*\.)?rotary_emb\.inv_freq"

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
        fixed={
            "norm": "layer",
            "gated": False,
            "position": "learned",
            "rope_theta": 10000.0,
            "qk_norm": False,
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
        fixed=_LLAMA_FIXED,
        biases={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias", "norm_bias": False},
        must={"pretraining_tp": 1},
        writes={"attention_dropout": 0.0},
        ignored=_ROTARY,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        modules=_LLAMA_MODULES
        | {
            "h.{n}.attn.q_norm": "model.layers.{n}.self_attn.q_norm",
            "h.{n}.attn.k_norm": "model.layers.{n}.self_attn.k_norm",
        },
        fields=_LLAMA_FIELDS,
        absent=_LLAMA_ABSENT | {"n_kv_head": 32, "head_dim": 128},
        fixed=_LLAMA_FIXED | {"qk_norm": True},
        biases={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": False, "norm_bias": False},
        writes={"attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None},
        ignored=_ROTARY,
    ),
}


def family_of(config: ModelConfig) -> Family:
    """The family that ``config.family`` names.

    Raises:
        UserError: there is none of that name.
    """
    if config.family not in FAMILIES:
        raise UserError(f"model.family = {config.family!r}: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def check(config: ModelConfig) -> None:
    """Refuses a model that its family cannot say on disk; call it before training.

    Raises:
        UserError: names the field, its value, and what the family has.
    """
    family = family_of(config)
    for name, value in family.fixed.items():
        found = getattr(config, name)
        if found != value:
            able = [other for other, row in FAMILIES.items() if row.fixed.get(name, found) == found]
            hint = f" ({', '.join(able)} can)" if able else ""
            raise UserError(f"model.{name} = {found!r}: family {config.family} can only be saved with {value!r}{hint}")
    for name, always in family.biases.items():
        if always is False and getattr(config, name):
            raise UserError(f"model.{name} = True: family {config.family} has no such biases; expected false")
    if family.one_head_size:
        for name, value in (("n_kv_head", config.n_head), ("head_dim", config.n_embd // config.n_head)):
            if getattr(config, name) != value:
                raise UserError(
                    f"model.{name} = {getattr(config, name)}: family {config.family} has only {value} with these sizes"
                )
        if config.head_dim * config.n_head != config.n_embd:
            raise UserError(f"model.n_embd = {config.n_embd}: expected a multiple of model.n_head = {config.n_head}")


def on_disk(config: ModelConfig) -> ModelConfig:
    """``config`` with every bias that its family's files hold once one of them is there; those not ours are zeros."""
    biases = family_of(config).biases
    present = {key: any(getattr(config, name) for name in BIASES if biases[name] == key) for key in biases.values()}
    return dataclasses.replace(
        config, **{name: key if isinstance(key, bool) else present[key] for name, key in biases.items()}
    )


def to_foreign(config: ModelConfig, name: str) -> tuple[str, bool]:
    """The name in the family's files of our parameter ``name``, and whether a matrix is stored transposed there."""
    family = family_of(config)
    module, _, leaf = name.rpartition(".")
    block = re.match(r"h\.(\d+)\.", module)
    pattern = module.replace(block[0], "h.{n}.", 1) if block else module
    foreign = family.modules[pattern].replace("{n}", block[1] if block else "")
    return f"{foreign}.{leaf}", leaf == "weight" and pattern in family.transposed


def from_foreign(config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """Their name -> (ours, transposed) for every tensor that a file of this model holds, zero biases included."""
    ours = {name: to_foreign(config, name) for name in params.table(on_disk(config))}
    return {foreign: (name, transposed) for name, (foreign, transposed) in ours.items()}


def strip(config: ModelConfig, foreign: str) -> str | None:
    """A file's name for a tensor without the family's optional prefix; None for a buffer that is no parameter."""
    family = family_of(config)
    for prefix in family.prefixes:
        foreign = foreign.removeprefix(prefix)
    return None if re.fullmatch(family.ignored, foreign) else foreign


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json for this model, without dtype and token ids.

    Both spellings of rope are there: ``rope_parameters`` for transformers 5, ``rope_theta`` for older readers and
    mlx-lm. What the architecture cannot say stands under ``"mlxgpt"``.

    Raises:
        UserError: see ``check``.
    """
    check(config)
    family, disk = family_of(config), on_disk(config)
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": config.family}
    for name, key in family.fields.items():
        values[key] = getattr(config, name)
    activation = family.fields["activation"]
    values[activation] = family.tanh if config.activation == "gelu_tanh" else config.activation
    for name, key in family.biases.items():
        if isinstance(key, str):
            values[key] = getattr(disk, name)
    for key, name in family.repeats.items():
        values[key] = getattr(config, name)
    if config.position == "rope":
        values["rope_theta"] = config.rope_theta
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    values |= {**family.must, **family.writes}
    ours = {name: False for name in BIASES if getattr(disk, name) and not getattr(config, name)}
    if ours:
        values["mlxgpt"] = {"format_version": FORMAT_VERSION} | ours
    return values


def config_from_hf(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig that a config.json describes.

    Raises:
        UserError: a key is missing, of the wrong type, or asks for something this decoder does not do.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported: expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    architectures = values.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(
            f"{where}: architectures {architectures!r} is not supported: expected [{family.architecture!r}]"
        )
    for key in ("quantization", "quantization_config"):
        if values.get(key) is not None:
            raise UserError(
                f"{where}: {key}: quantised weights are not supported: expected float32, float16 or bfloat16"
            )
    for key, value in family.must.items():
        if values.get(key, value) != value:
            raise UserError(f"{where}: {key} = {values[key]!r} is not supported: expected {value!r}")
    made: dict[str, Any] = {"family": name, **family.fixed}
    for ours, key in family.fields.items():
        value = values.get(key, family.absent.get(ours))
        if value is None and ours in ("n_kv_head", "head_dim", "n_hidden"):
            value = 0  # null: follows from the other sizes, there as here
        if value is None:
            raise UserError(f"{where}: {key} is missing")
        made[ours] = _typed(where, key, ours, value)
    made["activation"] = _activation(where, family.fields["activation"], made["activation"])
    for ours, key in family.biases.items():
        made[ours] = _typed(where, key, ours, values.get(key, False)) if isinstance(key, str) else key
    if made["position"] == "rope":
        made["rope_theta"] = _rope_theta(where, values)
        _refuse_windows(where, values)
    made |= _own(where, values.get("mlxgpt"), made)
    try:
        config = ModelConfig(**made)
        check(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def _typed(where: str, key: str, ours: str, value: Any) -> Any:
    """``value`` as our field's type; a whole number passes for a float, and floats are finite and positive."""
    kind = type(next(f.default for f in dataclasses.fields(ModelConfig) if f.name == ours))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {key} = {value!r}: expected {kind.__name__}")
    if kind is float and not 0 < value < math.inf:
        raise UserError(f"{where}: {key} = {value!r}: expected a positive number")
    return value


def _activation(where: str, key: str, name: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: {key} = {name!r} is not supported: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope_theta(where: str, values: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies; ``rope_parameters`` wins, and where nothing is said it is 10000."""
    theta = values.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"{where}: {key} = {rope!r} is not supported: expected one table for all layers")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: {key}: rope type {kind!r} is not supported: expected 'default'")
        part = rope.get("partial_rotary_factor", 1.0)
        if part != 1.0:
            raise UserError(f"{where}: {key}.partial_rotary_factor = {part!r} is not supported: expected 1.0")
        theta = rope.get("rope_theta", theta)
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor = {values['partial_rotary_factor']!r} is not supported: expected 1.0"
        )
    return _typed(where, "rope_theta", "rope_theta", theta)


def _refuse_windows(where: str, values: Mapping[str, Any]) -> None:
    """A sliding window is refused where a layer has one; the fields alone, switched off, say nothing."""
    types = values.get("layer_types") or []
    for kind in types if isinstance(types, list) else [types]:
        if kind != "full_attention":
            raise UserError(
                f"{where}: layer_types: {kind!r} is not supported: expected 'full_attention' in every layer"
            )
    if not types and values.get("use_sliding_window"):
        raise UserError(f"{where}: use_sliding_window = true is not supported without layer_types: expected false")


def _own(where: str, own: Any, made: Mapping[str, Any]) -> dict[str, bool]:
    """Our own part of config.json: which biases are zeros that only the format asks for."""
    if own is None:
        return {}
    if not isinstance(own, dict) or own.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{where}: mlxgpt = {own!r}: expected a table with format_version {FORMAT_VERSION}")
    biases = {name: value for name, value in own.items() if name != "format_version"}
    for name, value in biases.items():
        if name not in BIASES or value is not False or not made[name]:
            raise UserError(
                f"{where}: mlxgpt.{name} = {value!r} is not understood: expected false for a bias that the file holds"
            )
    return biases
