"""Recipes: where the shipped ones lie, and how TOML and ``--set`` fill the dataclasses of config.py.

A recipe has the sections ``[model] [data] [optim] [train] [sample]``; one that fine-tunes has ``[tune]`` and
``[adapter]`` in place of ``[data]``. Their keys are the dataclasses' fields; ``--set section.key=value`` overrides one.
A key that no dataclass has is an error that offers the nearest name.
"""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from mlxgpt.common.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    SampleConfig,
    TrainConfig,
    TuneConfig,
)
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.model.family.table import FAMILIES

_PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """The folder of the shipped recipes."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


FINETUNE = "finetune"  # what mlxgpt finetune starts from: no RECIPE


def names() -> list[str]:
    """The shipped recipes, sorted: what `mlxgpt train` takes as RECIPE beside a path."""
    return sorted(path.stem for path in folder().glob("*.toml") if path.stem != FINETUNE)


def find(recipe: str) -> Path:
    """The file of a shipped recipe's name or of a path; a path has a slash or ends in .toml.

    Raises:
        UserError: there is no such recipe or file.
    """
    path = Path(recipe)
    if path.suffix == ".toml" or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"{recipe}: no such recipe file")
        return path
    if recipe not in names():
        raise UserError(f"recipe {recipe!r}{nearest(recipe, names())}: expected a path or one of {', '.join(names())}")
    return folder() / f"{recipe}.toml"


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "tune": TuneConfig,
    "adapter": AdapterConfig,
}


def _implied(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` of [model] and what the family implies, also where that follows from the sizes."""
    row = FAMILIES[values.get("family", "gpt2")]
    made = row.implied | values
    n_layer, n_head, n_embd, head_dim, window = (
        made.get(name, ModelConfig.__dict__[name]) for name in ("n_layer", "n_head", "n_embd", "head_dim", "window")
    )
    return row.implied_by(n_layer, n_head, head_dim or n_embd // max(n_head, 1), window) | made


def default_of(field: dataclasses.Field) -> Any:
    """The default of a setting."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def parse_table(text: str, where: str) -> dict[str, Any]:
    """The keys and values of a JSON object.

    Raises:
        UserError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} = {text}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f'{where} = {text}: expected a JSON object, such as {{"enable_thinking": false}}')
    return value


def _is_json(value: Any) -> bool:
    """Whether JSON and TOML both hold the value: no dates and no nulls."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(each) for key, each in value.items())
    return all(map(_is_json, value)) if isinstance(value, list) else isinstance(value, (str, int, float, bool))


def _convert(section: str, field: dataclasses.Field, value: Any) -> Any:
    """``value`` as the field's type; int passes for float, and nothing else is bent."""
    kind = type(default_of(field))
    if kind is dict:
        value = parse_table(value, f"{section}.{field.name}") if isinstance(value, str) else value
        if not _is_json(value):
            raise UserError(f"{section}.{field.name} = {value!r}: expected text, numbers, true, false, lists, tables")
    if kind is str and isinstance(value, bool) and field.default == "auto":
        value = str(value).lower()  # auto, true or false
    if field.type == int | str and isinstance(value, int) and not isinstance(value, bool):
        return value  # a number, or auto
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if type(value) is not kind:
        raise UserError(
            f"{section}.{field.name} = {value!r}: expected {'true or false' if kind is bool else kind.__name__}"
        )
    return value


def build(sections: dict[str, dict[str, Any]], where: str = "recipe") -> Recipe:
    """A Recipe from plain dicts; unknown sections and keys are errors that offer the nearest name.

    Raises:
        UserError: an unknown name, a value of the wrong type, or one outside its range.
    """
    made = {}
    for section, values in sections.items():
        if section not in SECTIONS:
            raise UserError(f"{where}: unknown section [{section}]{nearest(section, SECTIONS)}")
        if values is None and section in ("tune", "adapter"):
            continue  # of a recipe that pre-trains, as asdict gives it
        if not isinstance(values, dict):
            raise UserError(f"{where}: {section} = {values!r}: expected a section [{section}]")
        fields = {field.name: field for field in dataclasses.fields(SECTIONS[section])}
        for key in values:
            if key not in fields:
                raise UserError(f"{where}: unknown key {section}.{key}{nearest(key, fields)}")
        if section == "model":
            family = values.get("family", "gpt2")
            if family not in FAMILIES:
                known = ", ".join(FAMILIES)
                raise UserError(f"{where}: model.family = {family!r}: expected one of {known}")
        values = {key: _convert(section, fields[key], value) for key, value in values.items()}
        made[section] = SECTIONS[section](**(_implied(values) if section == "model" else values))
    return Recipe(**made)


def parse_value(text: str) -> Any:
    """The value of ``--set key=value``: TOML where it parses as one value, else a plain string."""
    try:
        parsed = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["v"] if len(parsed) == 1 else text


def apply_sets(sections: dict[str, dict[str, Any]], sets: list[str]) -> dict[str, dict[str, Any]]:
    """``sections`` with each ``section.key=value`` of ``sets`` applied; the input stays as it is."""
    result = {section: dict(values) for section, values in sections.items()}
    for item in sets:
        path, equals, text = item.partition("=")
        section, dot, key = path.strip().partition(".")
        if not equals or not dot:
            raise UserError(f"--set {item}: expected section.key=value, such as train.steps=200")
        if section not in SECTIONS:
            raise UserError(f"--set {item}: unknown section {section!r}{nearest(section, SECTIONS)}")
        fields = {field.name: field for field in dataclasses.fields(SECTIONS[section])}
        key, inside, entry = key.partition(".")
        if key not in fields or (inside and type(default_of(fields[key])) is not dict):
            key, names = key + inside + entry, list(fields)
            raise UserError(f"--set {item}: unknown key {section}.{key}{nearest(key, names)}")
        value = parse_value(text.strip())
        wants_text = isinstance(fields[key].default, str)
        if inside:
            value = _convert(section, fields[key], result.get(section, {}).get(key, {})) | {entry: value}
        result.setdefault(section, {})[key] = text.strip() if wants_text and not isinstance(value, str) else value
    return result


def read_toml(path: Path) -> dict[str, Any]:
    """The sections of a recipe file.

    Raises:
        UserError: the file is missing, not UTF-8 or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        pairs = [f"{_toml_value(str(key))} = {_toml_value(each)}" for key, each in value.items()]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def to_toml(recipe: Recipe) -> str:
    """The recipe with every field written out, each with its meaning as a comment; ``build`` reads it back equal."""
    lines = []
    unread = ("tune", "adapter") if recipe.tune is None else ("data",)
    for section, kind in SECTIONS.items():
        if section in unread:
            continue
        lines.append(f"[{section}]")
        for field in dataclasses.fields(kind):
            value = _toml_value(getattr(getattr(recipe, section), field.name))
            lines.append(f"{field.name} = {value}  # {field.metadata['help']}")
        lines.append("")
    return "\n".join(lines)
