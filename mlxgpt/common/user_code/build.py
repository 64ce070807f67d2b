"""A user's model, built: from keyword arguments, or from a config as its constructor takes one.

What --kwargs says goes first; what it leaves out comes from the settings that lie beside the weights in the checkpoint.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.user_code.imports import TheirError, source_of, told

CONFIGS = (
    "config",
    "cfg",
    "args",
    "conf",
    "params",
    "hparams",
    "hp",
    "model_args",
    "model_config",
    "configs",
    "settings",
)
_CONFIG_CLASS = re.compile(r".*(config|cfg|args|params|settings|hparams|hyperparameters)$", re.IGNORECASE)
_FIRST = ("model_args", "model_config", "gpt_config", "cfg", "config", "args", "hparams", "hyper_parameters", "params")
_NEVER = ("dtype", "compile")  # of another machine, or of training
_PLAIN = (int, float, str, bool, type(None), list, tuple, dict)
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Settings(dict[str, Any]):
    """A config that is read as ``cfg["n_embd"]`` or as ``cfg.n_embd``."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class Source:
    """The settings beside the weights, inner dicts with telling names first; notes which were used."""

    def __init__(self, extras: Mapping[str, Any]):
        self.used: dict[str, Any] = {}
        self._places = sorted(_dicts(extras, ()), key=lambda each: (_rank(each[0]), len(each[0])))

    def get(self, name: str) -> tuple[bool, Any]:
        """Whether there is such a setting, and its value; the device is this one."""
        if name == "device":
            return True, "cpu"
        for _, values in self._places:
            if name not in _NEVER and name in values and isinstance(values[name], _PLAIN):
                self.used[name] = values[name]
                return True, values[name]
        return False, None

    def whole(self) -> dict[str, Any]:
        """The first dict that looks like a config."""
        for path, values in self._places:
            plain = {name: value for name, value in values.items() if isinstance(value, _PLAIN)}
            plain = {name: value for name, value in plain.items() if name not in (*_NEVER, "device")}
            if path and plain:
                self.used |= plain
                return plain
        return {}


def is_vocabulary(values: Mapping[Any, Any]) -> bool:
    """Whether a dict numbers its keys one after the other, as stoi does: its "d" or "heads" is a token, no setting."""
    ids = list(values.values())
    if len(ids) < 2 or any(type(each) is not int for each in ids):
        return False
    return sorted(ids) == list(range(min(ids), min(ids) + len(ids))) and min(ids) in (0, 1)


def _dicts(values: Mapping[str, Any], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    named = [(name, value) for name, value in values.items() if isinstance(value, Mapping) and not is_vocabulary(value)]
    inner = [_dicts(value, (*path, str(name))) for name, value in named]
    return [(path, values), *(each for several in inner for each in several)]


def _rank(path: tuple[str, ...]) -> int:
    return _FIRST.index(path[-1]) if path and path[-1] in _FIRST else len(_FIRST) + (not path)


def build(
    found: Any, name: str, module: types.ModuleType, path: Path, kwargs: Mapping[str, Any], extras: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """The model that a class or function makes, and what is to be said of where its arguments came from.

    Raises:
        UserError: an argument that it does not take, or that is missing; with the cure.
        TheirError: what its constructor raised.
    """
    parameters = _parameters(found)
    named = {key: each for key, each in parameters.items() if each.kind in _NAMED}
    any_name = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    source = Source(extras)
    config = next((each for key, each in named.items() if _is_config(each, found, module)), None)
    plainly = config is not None and config.default is not config.empty and set(kwargs) & (set(named) - {config.name})
    names: set[str] = set()  # that are read of a config
    if config is not None and not plainly:
        arguments = {key: value for key, value in kwargs.items() if key in named}
        inner = arguments.pop(config.name, {key: value for key, value in kwargs.items() if key not in named})
        if not isinstance(inner, dict):
            raise UserError(f"--kwargs: {config.name} = {inner!r}: expected a JSON object")
        names, by_key = names_used(path, config.name)
        arguments[config.name] = _config(config, found, name, module, path, inner, source, names, by_key)
        names -= inner.keys()
    else:
        arguments = dict(kwargs)
        for key in arguments:
            if key not in named and not any_name:
                raise UserError(f"--kwargs: {name} takes no {key!r}{nearest(key, named)}: it has {_listed(named)}")
    for key in named:
        if key not in arguments and (there := source.get(key))[0]:
            arguments[key] = there[1]
    missing = [key for key, each in named.items() if each.default is each.empty and key not in arguments]
    if missing:
        raise UserError(f"{path}: {name} needs {', '.join(missing)}: give {_example(missing)}")
    positional = [arguments.pop(key) for key, each in named.items() if each.kind is each.POSITIONAL_ONLY]
    try:
        model = found(*positional, **arguments)
    except (Exception, SystemExit) as error:
        raise TheirError(f"{told(error, path)}; {_cure(error, sorted(names))}") from None
    said = ", ".join(f"{key}={_short(value)}" for key, value in source.used.items())
    return model, [f"from the checkpoint's own settings: {said}"] if said else []


def _parameters(found: Any) -> dict[str, inspect.Parameter]:
    """What a class or function takes, as far as it says."""
    try:
        return dict(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return {}


def _cure(error: BaseException, names: list[str]) -> str:
    """What to do about a constructor that failed; ``names`` are read of its config and not given."""
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name} for this Python"
    lacking = isinstance(error, KeyError | AttributeError | TypeError | AssertionError) and names
    return f"give {_example(names)}" if lacking else "give its arguments by --kwargs"


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "no arguments"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _example(names: list[str]) -> str:
    return "--kwargs '{" + ", ".join(f'"{name}": ...' for name in names) + "}'"


def _is_config(parameter: inspect.Parameter, found: Any, module: types.ModuleType) -> bool:
    """Whether a constructor's parameter is a config: by its name, or by its class."""
    if parameter.name in ("self", "args") and parameter.kind is parameter.VAR_POSITIONAL:
        return False
    kind = _class_of(parameter, found, module)
    return parameter.name in CONFIGS or (isinstance(kind, type) and _is_config_class(kind))


def _is_config_class(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or bool(_CONFIG_CLASS.fullmatch(kind.__name__))


def _class_of(parameter: inspect.Parameter, found: Any, module: types.ModuleType) -> Any:
    """The class that a parameter is annotated with, or a model's ``config_class``; None where there is none."""
    kind = parameter.annotation
    if isinstance(kind, str):
        kind = vars(module).get(kind.strip("'\""))
    for each in typing.get_args(kind):  # GPTConfig | None
        if isinstance(each, type) and each is not type(None):
            return each
    if isinstance(kind, type) and kind is not inspect.Parameter.empty:
        return None if kind in _PLAIN or kind.__module__ == "builtins" else kind
    given = getattr(found, "config_class", None)
    return given if isinstance(given, type) and parameter.name in CONFIGS else None


def names_used(path: Path, parameter: str) -> tuple[set[str], bool]:
    """The names that the file reads of its config, cfg["n_embd"] or cfg.n_embd; and whether it is a dict."""
    text, word = source_of(path), re.escape(parameter)
    items = re.findall(rf"\b{word}\[\s*[\"'](\w+)[\"']\s*\]", text)
    fields = re.findall(rf"\b{word}\.(\w+)\b(?!\s*\()", text)
    return {*items, *(name for name in fields if not name.startswith("_"))}, bool(items)


def _config(
    parameter: inspect.Parameter,
    found: Any,
    name: str,
    module: types.ModuleType,
    path: Path,
    values: dict[str, Any],
    source: Source,
    names: set[str],
    by_key: bool,
) -> Any:
    """The config that a constructor takes, with these values and, for the rest, those of the checkpoint.

    Raises:
        UserError: its class has no such field, or needs more.
    """
    default = getattr(found, "get_default_config", None)
    if callable(default):  # minGPT
        made: Any = default()
        values = _filled(values, [key for key in vars(made)], source)
        sized = {"n_layer", "n_head", "n_embd"} <= values.keys()
        values = ({"model_type": None} if sized and hasattr(made, "model_type") else {}) | values
        for key, value in values.items():
            setattr(made, key, value)
        return made
    kind = _class_of(parameter, found, module) or (None if by_key else _likely_class(module, names, values))
    if kind is not None and not issubclass(kind, dict):
        return _instance(kind, name, path, values, source)
    constant = _constant(module, names)
    whole = constant | source.whole() | values
    for key in names - whole.keys():
        if (there := source.get(key))[0]:
            whole[key] = there[1]
    return _settings(whole)


def _settings(values: Mapping[str, Any]) -> Settings:
    return Settings({key: _settings(value) if isinstance(value, Mapping) else value for key, value in values.items()})


def _filled(values: dict[str, Any], names: typing.Iterable[str], source: Source) -> dict[str, Any]:
    """``values`` and, of those names that it lacks, the checkpoint's."""
    more = {key: there[1] for key in names if key not in values and (there := source.get(key))[0]}
    return values | more


def _likely_class(module: types.ModuleType, names: set[str], values: Mapping[str, Any]) -> type | None:
    """The config class of a file whose constructor does not say it: the one that has most of what is read of it."""
    best: tuple[int, type] | None = None
    for kind in vars(module).values():
        if not isinstance(kind, type) or not _is_config_class(kind) or kind.__module__.startswith(("torch", "mlx")):
            continue
        fields = set(getattr(kind, "__dataclass_fields__", {})) | set(getattr(kind, "__annotations__", {}))
        fields |= {key for key in vars(kind) if not key.startswith("_")} | set(_parameters(kind))
        score = len(fields & (names | set(values)))
        if score and (best is None or score > best[0]):
            best = score, kind
    return best[1] if best else None


def _constant(module: types.ModuleType, names: set[str]) -> dict[str, Any]:
    """A dict of the file that has every name that is read of the config: GPT_CONFIG_124M = {...}."""
    found = [each for each in vars(module).values() if isinstance(each, dict) and names and names <= each.keys()]
    return dict(found[0]) if found else {}


def _instance(kind: type, name: str, path: Path, values: dict[str, Any], source: Source) -> Any:
    """An instance of a config class: by its constructor, or by setting what a plain class has."""
    parameters = _parameters(kind)
    named = {key: each for key, each in parameters.items() if each.kind in _NAMED}
    any_name = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    plain = not named and not any_name  # class Config: n_layer = 4
    known = [key for key in dir(kind) if not key.startswith("_")] if plain else list(named)
    for key in values:
        if key not in known and not any_name and not plain:
            raise UserError(f"--kwargs: {kind.__name__} of {name} has no {key!r}{nearest(key, known)}")
    values = _filled(values, known, source)
    missing = [key for key, each in named.items() if each.default is each.empty and key not in values]
    if missing:
        raise UserError(f"{path}: {kind.__name__} needs {', '.join(missing)}: give {_example(missing)}")
    try:
        if not plain:
            return kind(**values)
        made = kind()
        for key, value in values.items():
            setattr(made, key, value)
        return made
    except Exception as error:
        raise TheirError(f"{told(error, path)}; give what {kind.__name__} needs by --kwargs") from None
