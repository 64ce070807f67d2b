"""The keys of a task's YAML, as lm-evaluation-harness 0.4.13 reads them; what we do not have is refused by name."""

from pathlib import Path
from typing import Any

import yaml

from mlxgpt.common.errors import UserError, nearest

READ = (
    "task", "dataset_path", "dataset_kwargs", "training_split", "validation_split", "test_split", "fewshot_split",
    "output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "description", "target_delimiter",
    "fewshot_delimiter", "num_fewshot", "fewshot_config", "generation_kwargs", "metric_list", "filter_list",
)  # fmt: skip
_ABOUT = ("tag", "task_alias", "metadata", "should_decontaminate", "doc_to_decontamination_query")  # change no score
_ONLY = {"repeats": 1, "unsafe_code": False, "dataset_name": None}
_REFUSED = {
    **dict.fromkeys(("process_docs", "process_results", "custom_dataset"), "is code, which is never run"),
    **dict.fromkeys(("doc_to_image", "doc_to_audio"), "models here read text"),
    **dict.fromkeys(("group", "group_alias", "aggregate_metric_list", "task_list"), "expected a --task for each task"),
    **dict.fromkeys(("gen_prefix", "use_prompt"), "is not supported"),
}


class _Loader(yaml.SafeLoader):
    """YAML whose !function is kept as _Code, for a message that names its key."""


class _Code(str):
    """What !function names."""


_Loader.add_constructor("!function", lambda loader, node: _Code(node.value))


def read(path: Path) -> dict[str, Any]:
    """The keys of a file and of what it includes, its own before theirs; those that are null are left out.

    Raises:
        UserError: no YAML, a key that is unknown or not supported, code, or files that include each other.
    """
    values = {key: value for key, value in _read(path, ()).items() if value is not None}
    for key, value in values.items():
        if code := _code_in(value, set()):
            raise UserError(f"{path}: {key}: !function {code}: is code, which is never run")
        if key in _REFUSED:
            raise UserError(f"{path}: {key}: {_REFUSED[key]}")
        if key in _ONLY and value != _ONLY[key]:
            raise UserError(f"{path}: {key} = {value!r}: expected {_ONLY[key]}")
        if key not in (*READ, *_ABOUT, *_ONLY):
            raise UserError(f"{path}: unknown key {key}{nearest(str(key), READ)}")
    return values


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise UserError(f"{path}: includes itself")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {type(values).__name__}: expected the keys of a task, such as task: NAME")
    includes = values.pop("include", None) or []
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        if not isinstance(include, str) or not include.isprintable():
            raise UserError(f"{path}: include = {include!r}: expected a file")
        merged |= _read(path.parent / include, (*above, path.resolve()))
    return merged | values


def _code_in(value: Any, seen: set[int]) -> str:
    """The code that a value has at any depth, or ''; ``seen``: parts that were looked at: anchors repeat them."""
    if isinstance(value, _Code):
        return value
    if not isinstance(value, dict | list) or id(value) in seen:
        return ""
    seen.add(id(value))
    parts = value.values() if isinstance(value, dict) else value
    return next(filter(None, (_code_in(part, seen) for part in parts)), "")
