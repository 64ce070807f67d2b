"""Recipes: where the shipped ones lie, and how TOML and ``--set`` fill the dataclasses of config.py.

A recipe has the sections ``[model] [data] [optim] [train] [sample]``; one that fine-tunes has ``[tune]`` and
``[adapter]`` in place of ``[data]``. Their keys are the dataclasses' fields; ``--set section.key=value`` overrides one.
A key that no dataclass has is an error that offers the key that was meant.
"""

import dataclasses
import json
import shlex
import tomllib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.keys import SECTIONS, default_of, meant, or_list
from mlxgpt.common.model.family.table import FAMILIES

_PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """The folder of the shipped recipes."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


OPTIONAL = ("tune", "adapter", "prefer", "rl")  # sections that only some recipes have
FINETUNE = "finetune"  # what mlxgpt finetune starts from: no RECIPE


def names() -> list[str]:
    """The shipped recipes, sorted: what `mlxgpt train` takes as RECIPE beside a path."""
    return sorted(path.stem for path in folder().glob("*.toml") if path.stem != FINETUNE)


def find(recipe: str) -> Path:
    """The file of a shipped recipe's name or of a path; a path has a slash or ends in .toml.

    Raises:
        UserError: there is no such recipe or file.
    """
    path = Path(recipe).expanduser()
    if path.suffix == ".toml" and path.is_file():
        return path
    if recipe in names():
        return folder() / f"{recipe}.toml"
    if cure := _instead(recipe, path):
        raise UserError(f"{recipe}: {cure}")
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise UserError(f"{recipe}: no such recipe file")
    expected = f"a path or one of {', '.join(names())}; your own texts: mlxgpt train --data PATH"
    raise UserError(f"recipe {recipe!r}{nearest(recipe, names())}: expected {expected}")


def _instead(recipe: str, path: Path) -> str:
    """What to type for something that is there and is no recipe; '' where nothing is known."""
    if path.suffix == ".py":
        stem, near = path.stem.removeprefix("train_").replace("_", "-"), ""
        if stem in names():
            near = f": mlxgpt train {stem} has the same setting"
        return f"Python, as nanoGPT's configs are: expected a recipe in TOML{near}"
    if not path.exists():
        return ""
    recipe = shlex.quote(recipe)
    if path.is_dir() and (path / "recipe.toml").is_file():
        return f"a run: mlxgpt train --resume {recipe} continues it, --init-from {recipe} starts from its weights"
    if path.is_dir() and (path / "config.json").is_file():
        return f"a model: mlxgpt train --data PATH --init-from {recipe} starts from its weights"
    if path.suffix in (".yaml", ".yml"):
        return f"YAML: mlxgpt finetune --config {recipe} reads mlx-lm's; a recipe is TOML"
    return f"{'a folder' if path.is_dir() else 'a file'}, not a recipe: mlxgpt train --data {recipe}"


def _implied(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` of [model] and what the family implies, also where that follows from the sizes."""
    row = FAMILIES[values.get("family", "gpt2")]
    made = row.implied | values
    n_layer, n_head, n_embd, head_dim, window = (
        made.get(name, ModelConfig.__dict__[name]) for name in ("n_layer", "n_head", "n_embd", "head_dim", "window")
    )
    return row.implied_by(n_layer, n_head, head_dim or n_embd // max(n_head, 1), window) | made


def parse_table(text: str, where: str, example: str = '{"enable_thinking": false}') -> dict[str, Any]:
    """The keys and values of a JSON object; ``example`` is one.

    Raises:
        UserError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} = {text}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} = {text}: expected a JSON object, such as {example}")
    return value


def _is_json(value: Any) -> bool:
    """Whether JSON and TOML both hold the value: no dates and no nulls."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(each) for key, each in value.items())
    return all(map(_is_json, value)) if isinstance(value, list) else isinstance(value, (str, int, float, bool))


def typed(section: str, field: dataclasses.Field, value: Any) -> Any:
    """``value`` as the field's type; int passes for float, and nothing else is bent.

    Raises:
        UserError: it is of another type.
    """
    kind = type(default_of(field))
    if kind is dict:
        value = parse_table(value, f"{section}.{field.name}") if isinstance(value, str) else value
        if not _is_json(value):
            raise UserError(f"{section}.{field.name} = {value!r}: expected text, numbers, true, false, lists, tables")
    if kind is str and isinstance(value, bool) and field.default == "auto":
        value = str(value).lower()  # auto, true or false
    if field.type == int | str and isinstance(value, int) and not isinstance(value, bool):
        return value  # a number, or auto
    if field.type == str | tuple and isinstance(value, (list, tuple)):
        if not (value or kind is tuple) or not all(isinstance(each, str) for each in value):
            raise UserError(f"{section}.{field.name} = {value!r}: expected a path, or a list of paths")
        return tuple(value)
    if field.type == str | tuple and isinstance(value, str):
        return value
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
    """A Recipe from plain dicts; unknown sections and keys are errors that offer the one that was meant.

    Raises:
        UserError: an unknown name, a value of the wrong type, or one outside its range.
    """
    made = {}
    for section, values in sections.items():
        if section not in SECTIONS:
            if not isinstance(values, dict):
                raise UserError(f"{where}: {section} = {values!r}: expected it in a section{or_list(meant(section))}")
            raise UserError(f"{where}: unknown section [{section}]{nearest(section, SECTIONS)}")
        if values is None and section in OPTIONAL:
            continue  # of a recipe that pre-trains, as asdict gives it
        if not isinstance(values, dict):
            raise UserError(f"{where}: {section} = {values!r}: expected a section [{section}]")
        fields = {field.name: field for field in dataclasses.fields(SECTIONS[section])}
        for key in values:
            if key not in fields:
                raise UserError(f"{where}: unknown key {section}.{key}{_meant(section, key)}")
        if section == "model":
            family = values.get("family", "gpt2")
            if family not in FAMILIES:
                known = ", ".join(FAMILIES)
                raise UserError(f"{where}: model.family = {family!r}: expected one of {known}")
        values = {key: typed(section, fields[key], value) for key, value in values.items()}
        made[section] = SECTIONS[section](**(_implied(values) if section == "model" else values))
    tune, judged = made.get("tune"), ("prefer", "reward")
    if tune and tune.task in judged:
        made.setdefault("prefer", SECTIONS["prefer"]())
    elif "prefer" in made:
        raise UserError(
            f"{where}: [prefer]: of mlxgpt finetune --task prefer or reward: expected tune.task = one of them"
        )
    return Recipe(**made)


def _meant(section: str, key: str) -> str:
    """The key that was meant: its whole name, but in the same section."""
    return or_list(name.removeprefix(f"{section}.") for name in meant(f"{section}.{key}"))


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
            near = or_list(f"{name}={text}" if equals else name for name in meant(path.strip()))
            raise UserError(f"--set {item}{near}: expected section.key=value, such as train.steps=200")
        if section not in SECTIONS:
            near = or_list(meant(path.strip())) or nearest(section, SECTIONS)
            raise UserError(f"--set {item}: unknown section {section!r}{near}")
        fields = {field.name: field for field in dataclasses.fields(SECTIONS[section])}
        key, inside, entry = key.partition(".")
        if key not in fields or (inside and type(default_of(fields[key])) is not dict):
            near = _meant(section, key)
            raise UserError(f"--set {item}: unknown key {section}.{key + inside + entry}{near}")
        value = parse_value(text.strip())
        listed = isinstance(value, list) and fields[key].type == str | tuple
        wants_text = isinstance(fields[key].default, str) and not listed
        if inside:
            value = typed(section, fields[key], result.get(section, {}).get(key, {})) | {entry: value}
        result.setdefault(section, {})[key] = text.strip() if wants_text and not isinstance(value, str) else value
    return result


def flag_sets(args: Namespace, flags: dict[str, str]) -> list[str]:
    """The ``section.key=value`` of those ``flags`` (argument -> key) that were given.

    Raises:
        UserError: --set sets the same key.
    """
    found = []
    for name, key in flags.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        if key in keys_of(args.set):
            raise UserError(f"--{name.replace('_', '-')} and --set {key}: expected one of them")
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        found.append(f"{key}={json.dumps(value)}")
    return found


def keys_of(sets: list[str]) -> frozenset[str]:
    """The keys that ``section.key=value`` strings set."""
    return frozenset(item.partition("=")[0].strip() for item in sets)


# Keys that may name a file or folder.
_PATHS = {
    "data": ("source", "tokenizer"),
    "train": ("tasks",),
    "tune": ("model", "adapter", "source", "template"),
}


def read(path: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The sections of a recipe file; relative paths in it are relative to it, as far as something is there.

    What is not there stays as it is: a name such as pydocs or a hub id, or a path from the working directory, which is
    said where that exists. A shipped recipe has no folder of the user's: its paths are from the working directory.

    Raises:
        UserError: as read_toml.
    """
    sections = read_toml(path)
    if path.resolve().parent == folder().resolve():
        return sections
    for section, names in _PATHS.items():
        values = sections.get(section)
        if not isinstance(values, dict):
            continue
        for key in names:
            if isinstance(value := values.get(key), str):
                values[key] = _beside(path, f"{section}.{key}", value, say)
            elif isinstance(value, list):
                values[key] = [_beside(path, f"{section}.{key}", str(each), say) for each in value]
    return sections


_WORDS = ("", "pydocs", "pydocs-qa", "auto", "chatml", "char", "bpe", "sp-bpe", "sp-unigram")


def _beside(path: Path, key: str, value: str, say: Callable[[str], None]) -> str:
    """``value`` of a recipe at ``path`` as an absolute path where it is one from there."""
    name, equals, place = value.rpartition("=")
    if key == "train.tasks" and equals and name.isidentifier():  # a published task and its files
        return f"{name}={_beside(path, key, place, say)}"
    if value in _WORDS or Path(value).expanduser().is_absolute():
        return value
    if (path.parent / value).exists():
        return str((path.parent / value).resolve())
    if Path(value).exists():
        say(f"{path}: {key} = {value!r}: not beside the recipe: taken from the working directory")
    return value


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


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        pairs = [f"{toml_value(str(key))} = {toml_value(each)}" for key, each in value.items()]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def to_toml(recipe: Recipe) -> str:
    """The recipe with every field written out, each with its meaning as a comment; ``build`` reads it back equal."""
    lines = []
    for section, kind in SECTIONS.items():
        if getattr(recipe, section) is None or (section == "data" and recipe.tune):
            continue
        lines.append(f"[{section}]")
        for field in dataclasses.fields(kind):
            value = toml_value(getattr(getattr(recipe, section), field.name))
            lines.append(f"{field.name} = {value}  # {field.metadata['help']}")
        lines.append("")
    return "\n".join(lines)
