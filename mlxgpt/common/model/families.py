"""Our names and choices <-> each architecture's names in a Hugging Face folder, from one table; the reverse is derived.

The rows of ``family/`` say which class transformers reads a family with, what it calls modules and config fields,
which of our choices it fixes, and what a config.json must not ask for. ``params.py`` says which tensors a model has;
this file only renames them. What is not in the table is refused by name, never approximated.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import module_names, params, quantization_methods, text_part
from mlxgpt.common.model.family import own_config
from mlxgpt.common.model.family.config_json import read_layers, read_rope, typed, write_layers, write_rope
from mlxgpt.common.model.family.mlx_lm_differences import mlx_lm_deviations
from mlxgpt.common.model.family.row import BIASES, Family
from mlxgpt.common.model.family.table import FAMILIES

__all__ = [
    "ACTIVATIONS",
    "BIASES",
    "FAMILIES",
    "FORMAT_VERSION",
    "Family",
    "check",
    "config_from_hf",
    "config_to_hf",
    "family_of",
    "from_foreign",
    "mlx_lm_deviations",
    "on_disk",
    "strip",
    "to_foreign",
]

FORMAT_VERSION = 1
MAX_LAYERS = 10_000  # what is listed a layer is never longer, whatever a file says

# config.json's names of the activations -> ours; several of theirs may be one function
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}
# null in config.json is our 0: it follows from other sizes, or is switched off
_NULLABLE = ("n_kv_head", "head_dim", "n_hidden", "attn_softcap", "final_softcap")


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
    if config.labels and not family.classifies:
        raise UserError(f"model.labels = {config.labels!r}: transformers has no classifier of family {config.family}")
    if family.one_head_size or family.derived_head:
        sizes = {"head_dim": config.n_embd // config.n_head}
        if family.one_head_size:
            sizes["n_kv_head"] = config.n_head
        for name, value in sizes.items():
            if getattr(config, name) != value:
                raise UserError(
                    f"model.{name} = {getattr(config, name)}: family {config.family} has only {value} with these sizes"
                )
    _check_sizes(config, family)


def _check_sizes(config: ModelConfig, family: Family) -> None:
    """Refuses numbers that the family's keys cannot say."""

    def refuse(name: str, expected: str) -> None:
        raise UserError(f"model.{name} = {getattr(config, name)!r}: family {config.family} {expected}")

    if (family.one_head_size or family.derived_head or family.whole_heads) and config.n_embd % config.n_head:
        raise UserError(f"model.n_embd = {config.n_embd}: expected a multiple of model.n_head = {config.n_head}")
    if family.gelu_is_tanh and config.activation == "gelu":
        refuse("activation", "can only be saved with 'gelu_tanh' or 'silu'")
    if family.parallel_key and config.placement not in ("parallel2", "pre"):
        refuse("placement", "can only be saved with 'parallel2' or 'pre'")
    if family.rope and family.rope.part is None and config.rotary_dim != config.head_dim:
        refuse("rotary_dim", f"turns whole heads; expected model.head_dim = {config.head_dim}")
    if family.rope and config.rope_scaling not in ("none", *family.rope.scalings):
        refuse("rope_scaling", f"can only be saved with none, {', '.join(family.rope.scalings)}")
    if family.rope and config.rope_scaling in ("yarn", "dynamic"):
        least, exact = int(config.rope_factor * config.rope_original), config.rope_scaling == "dynamic"
        least = max(least, config.rope_original) if exact else least
        if config.block_size < least or (exact and config.block_size != least):
            more = "" if exact else " or more"
            refuse("block_size", f"needs rope_factor * rope_original = {least}{more} with {config.rope_scaling}")
    if family.rope and config.rope_scaling == "longrope" and config.head_dim * config.n_head != config.n_embd:
        refuse("head_dim", "has only n_embd / n_head with longrope")
    if family.rope and family.rope.local and not config.rope_local_theta:
        refuse("rope_local_theta", "needs a positive number")
    if family.windows and not family.windows.types and config.window and len(config.window_layers) != config.n_layer:
        refuse("window_layers", "has one window for all blocks")
    if family.divisor_key and not divisor_of(config.logit_scale):
        refuse("logit_scale", "needs the reciprocal of a number")
    if family.scale_key and config.attn_scale and round(config.attn_scale**-2) ** -0.5 != config.attn_scale:
        refuse("attn_scale", "needs the root of 1 / a whole number")


def divisor_of(scale: float) -> float:
    """The number whose reciprocal is ``scale``, the shortest that is one; 1 for 0, which is off. 0 if there is none."""
    divisor = 1 / scale if scale else 1.0
    near = (float(f"{divisor:.12g}"), divisor, math.nextafter(divisor, 0), math.nextafter(divisor, math.inf))
    return next((one for one in near if not scale or 1 / one == scale), 0.0)


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
    if module == "score":
        return name, False
    block = re.match(r"h\.(\d+)\.", module)
    pattern = module.replace(block[0], "h.{n}.", 1) if block else module
    foreign = family.modules[pattern].replace("{n}", block[1] if block else "")
    return f"{foreign}.{leaf}", leaf == "weight" and pattern in family.transposed


def from_foreign(config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """Their name -> (ours, transposed) for every tensor that a file of this model holds, zero biases included."""
    ours = {name: to_foreign(config, name) for name in params.table(on_disk(config))}
    return {foreign: (name, transposed) for name, (foreign, transposed) in ours.items()}


def strip(config: ModelConfig, foreign: str) -> str | None:
    """A file's name for a tensor as the family's files have it, see ``module_names``; None for a buffer."""
    family = family_of(config)
    foreign = module_names.full_name(foreign, _trunks(config.family))
    for other, module in family.aliases.items():
        if foreign.startswith(f"{other}."):
            foreign = module + foreign.removeprefix(other)
    return None if re.fullmatch(family.ignored, foreign) else foreign


@functools.cache
def _trunks(family: str) -> dict[str, str]:
    row = FAMILIES[family]
    return module_names.trunks([*row.modules.values(), *row.aliases, "score"])


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json for this model, without dtype and token ids.

    Both spellings of rope are there, of transformers 5 and of older readers and mlx-lm. What the architecture cannot
    say stands under ``"mlxgpt"``; what mlx-lm does otherwise, ``mlx_lm_deviations`` says.

    Raises:
        UserError: see ``check``.
    """
    check(config)
    family, disk = family_of(config), on_disk(config)
    if family.own:
        return own_config.write(config, family, FORMAT_VERSION)
    values: dict[str, Any] = {
        "architectures": [family.classifier if config.labels else family.architecture],
        "model_type": config.family,
    }
    if config.labels:
        names = dict(enumerate(config.labels))
        values |= {"num_labels": len(names), "id2label": {str(n): name for n, name in names.items()}}
        values |= {"label2id": {name: n for n, name in names.items()}}
        values |= {} if config.scores else {"problem_type": "single_label_classification"}
    for name, key in family.fields.items():
        value = getattr(config, name)
        values[key] = None if name in _NULLABLE and not value else value
    activation = family.fields["activation"]
    values[activation] = family.tanh if config.activation == "gelu_tanh" else config.activation
    for name, key in family.biases.items():
        if isinstance(key, str):
            values[key] = getattr(disk, name)
    for key, name in family.repeats.items():
        values[key] = getattr(config, name)
    if family.scale_key:
        values[family.scale_key] = round(config.attn_scale**-2) if config.attn_scale else config.head_dim
    if family.score_key:
        values[family.score_key] = config.attn_scale or config.head_dim**-0.5
    if family.divisor_key:
        values[family.divisor_key] = divisor_of(config.logit_scale)
    if family.parallel_key:
        values[family.parallel_key] = config.placement == "parallel2"
    if family.rope:
        values |= write_rope(config, family)
    values |= write_layers(config, family)
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
        found = text_part.unread(values)
        part = values.get("text_config")
        text = part.get("model_type") if isinstance(part, dict) else None
        alone = f"; its text_config is a {text}, which is read as a model of its own" * (text in FAMILIES)
        expected = f"{found}: " * bool(found) + f"expected one of {', '.join(FAMILIES)}{alone}"
        raise UserError(f"{where}: model_type {name!r} is not supported: {expected}")
    family = FAMILIES[name]
    architectures = values.get("architectures") or [family.architecture]
    if architectures not in ([family.architecture], [family.classifier]):
        raise UserError(
            f"{where}: architectures {architectures!r} is not supported: expected [{family.architecture!r}]"
        )
    labels = _labels(where, values) if architectures == [family.classifier] and not family.own else ()
    if found := quantization_methods.said(values):
        key, scheme = found
        raise UserError(
            f"{where}: {key}: weights quantized by {quantization_methods.describe(scheme)} are not supported: "
            f"{quantization_methods.EXPECTED}"
        )
    if family.own:
        return _read_own(values, family, architectures, where)
    if found := text_part.experts_of(values):
        raise UserError(f"{where}: {found}: expected a {name} without them")
    for key, value in family.must.items():
        found = values.get(key, value)
        if found != value and not (found is None and value is False):
            raise UserError(f"{where}: {key} = {found!r} is not supported: expected {value!r}")
    made: dict[str, Any] = {"family": name, **family.fixed}
    for ours, key in family.fields.items():
        value = values.get(key, family.absent.get(ours))
        if ours in _NULLABLE and (value is None or (key not in values and not value)):
            made[ours] = type(getattr(ModelConfig, ours))(0)
            continue
        if value is None:
            raise UserError(f"{where}: {key} is missing")
        made[ours] = typed(where, key, ours, value)
    if made["n_layer"] > MAX_LAYERS:
        key = family.fields["n_layer"]
        raise UserError(f"{where}: {key} = {made['n_layer']}: expected at most {MAX_LAYERS}")
    made["activation"] = _activation(where, family, made["activation"])
    for ours, key in family.biases.items():
        value = values.get(key, family.absent.get(ours, False)) if isinstance(key, str) else key
        made[ours] = typed(where, str(key), ours, value)
    made |= _choices(where, family, values, made) | {"labels": labels}
    if made["tied"] != family.fixed.get("tied", made["tied"]):
        raise UserError(f"{where}: a tied head is not supported with model_type {name!r}")
    made |= _own(where, values.get("mlxgpt"), made)
    try:
        config = ModelConfig(**made)
        check(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def _read_own(values: Mapping[str, Any], family: Family, architectures: Any, where: str) -> ModelConfig:
    """The model of a folder of this project's family."""
    n_layer = values.get("n_layer")
    if isinstance(n_layer, int) and n_layer > MAX_LAYERS:
        raise UserError(f"{where}: n_layer = {n_layer}: expected at most {MAX_LAYERS}")
    try:
        config = own_config.read(values, FORMAT_VERSION, where)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    expected = [family.classifier if config.labels else family.architecture]
    if architectures != expected:
        raise UserError(f"{where}: architectures {architectures!r}: expected {expected!r}, by its labels")
    return config


def _labels(where: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """A classifier's labels by their numbers; without names transformers calls them LABEL_0 and so on."""
    found = values.get("id2label") or {str(n): f"LABEL_{n}" for n in range(values.get("num_labels", 2))}
    if not isinstance(found, dict) or set(found) != {str(n) for n in range(len(found))}:
        raise UserError(f"{where}: id2label = {found!r}: expected a name by each number from 0")
    kind = values.get("problem_type")
    if kind not in (None, "single_label_classification") and not (kind == "regression" and len(found) == 1):
        raise UserError(f"{where}: problem_type = {kind!r} is not supported: expected single_label_classification")
    return tuple(found[str(n)] for n in range(len(found)))


def _activation(where: str, family: Family, name: str) -> str:
    if name not in ACTIVATIONS:
        key = family.fields["activation"]
        raise UserError(f"{where}: {key} = {name!r} is not supported: expected one of {', '.join(ACTIVATIONS)}")
    return "gelu_tanh" if family.gelu_is_tanh and name == "gelu" else ACTIVATIONS[name]


def _choices(where: str, family: Family, values: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """What takes more than one key, or another word than ours."""
    if min(made["n_layer"], made["n_head"], made["n_embd"]) < 1:
        return {}  # ModelConfig names the size
    found = read_layers(where, family, values, made["n_layer"])
    head_dim = made.get("head_dim") or made["n_embd"] // made["n_head"]
    if family.rope:
        found |= read_rope(where, family.rope, values, {"head_dim": head_dim, "block_size": made["block_size"]})
    if family.scale_key:
        scalar = values.get(family.scale_key, 256)
        if type(scalar) not in (int, float) or scalar < 1 or scalar % 1:
            raise UserError(f"{where}: {family.scale_key} = {scalar!r}: expected a positive whole number")
        found["attn_scale"] = 0.0 if scalar == head_dim else int(scalar) ** -0.5
    if family.score_key:
        scale = typed(where, family.score_key, "attn_scale", values.get(family.score_key, 1.0))
        found["attn_scale"] = 0.0 if scale == head_dim**-0.5 else scale
    if family.divisor_key:
        divisor = typed(where, family.divisor_key, "logit_scale", values.get(family.divisor_key, 1.0))
        found["logit_scale"] = 0.0 if divisor == 1 else 1 / divisor
    if family.parallel_key:
        parallel = typed(where, family.parallel_key, "gated", values.get(family.parallel_key, True))
        found["placement"] = "parallel2" if parallel else "pre"
    return found


def _own(where: str, own: Any, made: Mapping[str, Any]) -> dict[str, bool]:
    """Our own part of config.json: biases that are zeros because the format asks for them. Provenance is no choice."""
    if own is None:
        return {}
    if not isinstance(own, dict) or own.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{where}: mlxgpt = {own!r}: expected a table with format_version {FORMAT_VERSION}")
    biases = {name: value for name, value in own.items() if name not in ("format_version", "provenance")}
    for name, value in biases.items():
        if name not in BIASES or value is not False or not made[name]:
            raise UserError(
                f"{where}: mlxgpt.{name} = {value!r} is not understood: expected false for a bias that the file holds"
            )
    return biases
