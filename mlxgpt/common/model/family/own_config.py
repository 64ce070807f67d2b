"""config.json of family mlxgpt: our fields by our names, any mix of them, read as strictly as they are written."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.model.family.row import Family

FAMILY = "mlxgpt"
NOTE = (
    "family mlxgpt is this project's own: mlxgpt loads it, in MLX and in PyTorch; transformers, mlx-lm and llama.cpp "
    "do not know it"
)
_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig) if field.name != "family"}
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# what stands in config.json besides, and is no choice of the model
_BESIDE = {
    *("architectures", "model_type", "mlxgpt", "dtype", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "quantization", "quantization_config"),
}


def write(config: ModelConfig, family: Family, version: int) -> dict[str, Any]:
    """config.json of the model, every field of it."""
    made: dict[str, Any] = {
        "architectures": [family.classifier if config.labels else family.architecture],
        "model_type": FAMILY,
    }
    for name in _FIELDS:
        value = getattr(config, name)
        made[name] = list(value) if isinstance(value, tuple) else value
    return made | {"mlxgpt": {"format_version": version, "note": NOTE}}


def read(values: Mapping[str, Any], version: int, where: str) -> ModelConfig:
    """The model of a config.json; a field that is absent has its default, but for the sizes.

    Raises:
        UserError: a key is unknown, a size is missing, or a value is of another type or out of its range.
    """
    own = values.get("mlxgpt", {"format_version": version})
    if not isinstance(own, dict) or own.get("format_version") != version:
        raise UserError(f"{where}: mlxgpt = {own!r}: expected a table with format_version {version}")
    for key in values:
        if key not in _FIELDS and key not in _BESIDE:
            raise UserError(f"{where}: unknown key {key}{nearest(key, _FIELDS)}: model_type {FAMILY} has no such field")
    for name in _SIZES:
        if name not in values:
            raise UserError(f"{where}: {name} is missing")
    made = {name: _typed(where, name, values[name]) for name in _FIELDS if name in values}
    if made["vocab_size"] < 1:
        raise UserError(f"{where}: vocab_size = {made['vocab_size']}: expected a positive number")
    return ModelConfig(family=FAMILY, **made)


def _typed(where: str, name: str, value: Any) -> Any:
    """``value`` as the field's type; int passes for float, and nothing else is bent."""
    kind = type(_FIELDS[name].default)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and type(value) is list:
        each: tuple[type, ...] = (int,) if name in ("no_rope", "window_layers") else (str,)
        each = (int, float) if name in ("rope_short", "rope_long") else each
        if all(type(one) in each for one in value):
            return tuple(value)
        raise UserError(f"{where}: {name} = {value!r}: expected a list of {'numbers' if int in each else 'names'}")
    if type(value) is not kind:
        said = {tuple: "a list", bool: "true or false", float: "a number", int: "a whole number", str: "a word"}[kind]
        raise UserError(f"{where}: {name} = {value!r}: expected {said}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where}: {name} = {value!r}: expected a finite number")
    return value
