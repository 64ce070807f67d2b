"""What a task's YAML says about metrics, filters and generation."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.tasks import answers

# lm-evaluation-harness's metric -> ours, and how it is summed up there; the kinds are ours
_METRICS = {
    "choice": {"acc": ("acc", "mean"), "acc_norm": ("acc_norm", "mean"), "acc_bytes": ("acc_per_byte", "mean")},
    "cloze": {"acc": ("acc", "mean"), "perplexity": ("perplexity", "perplexity")},
    "text": {
        "word_perplexity": ("word_perplexity", "weighted_perplexity"),
        "byte_perplexity": ("byte_perplexity", "weighted_perplexity"),
        "bits_per_byte": ("bits_per_byte", "bits_per_byte"),
    },
    "answer": {"exact_match": ("exact_match", "mean")},
}
_ALIKE = {"regexes_to_ignore": list, "ignore_case": bool, "ignore_punctuation": bool, "ignore_numbers": bool}
_PLAIN: dict[str, Callable[[str], str]] = {
    "take_first": str, "remove_whitespace": str.strip, "lowercase": str.lower, "uppercase": str.upper,
}  # fmt: skip
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def metrics(path: Path, kind: str, given: Any) -> tuple[tuple[str, ...], Callable[[str], str]]:
    """Our names of the metrics in metric_list, () for all; and what exact_match does to both sides.

    Raises:
        UserError: a metric, or a setting of one, that we do not have.
    """
    names, alike = [], answers.making_alike()
    for each in _objects(path, "metric_list", given or []):
        name, known = each.get("metric"), _METRICS[kind]
        if name not in known:
            raise UserError(
                f"{path}: metric {name!r}: not supported{nearest(str(name), known)}: expected {', '.join(known)}"
            )
        ours, summed = known[name]
        if each.get("aggregation", summed) != summed:
            raise UserError(f"{path}: {name}: aggregation = {each['aggregation']!r}: expected {summed}")
        names.append(ours)
        more = {key: value for key, value in each.items() if key not in ("metric", "aggregation", "higher_is_better")}
        for key, value in more.items():
            if key not in (_ALIKE if kind == "answer" else ()):
                raise UserError(f"{path}: {name}: {key}: not supported")
            if value is not None and not isinstance(value, _ALIKE[key]):
                raise UserError(f"{path}: {name}: {key} = {value!r}: expected a {_ALIKE[key].__name__}")
        if kind == "answer":
            made = {"regexes": more.pop("regexes_to_ignore", None) or [], **more}
            alike = _compiling(path, name, answers.making_alike, made)
    return tuple(names) if kind != "answer" else (), alike


def filters(path: Path, given: Any) -> Mapping[str, Callable[[str], str]]:
    """What of an answer is compared, by the filter's name.

    Raises:
        UserError: a function that we do not have, or a regular expression that is none.
    """
    made = {}
    for each in _objects(path, "filter_list", given or []):
        name, steps = each.get("name"), _objects(path, "filter", each.get("filter") or [])
        if not isinstance(name, str) or not any(step.get("function") == "take_first" for step in steps):
            raise UserError(
                f"{path}: filter_list: filter {name!r}: expected a name, and take_first among its functions"
            )
        made[name] = answers.one_after_another([_step(path, name, step) for step in steps])
    return made


def _step(path: Path, name: str, step: dict[str, Any]) -> Callable[[str], str]:
    function, more = step.get("function"), {key: value for key, value in step.items() if key != "function"}
    known = {"regex_pattern": "pattern", "group_select": "which", "fallback": "fallback"}
    if function not in ("regex", *_PLAIN):
        expected = ", ".join(("regex", *_PLAIN))
        raise UserError(f"{path}: filter {name}: function {function!r}: not supported: expected {expected}")
    for key in more:
        if function != "regex" or key not in known:
            raise UserError(f"{path}: filter {name}: {function}: {key}: not supported")
    if function != "regex":
        return _PLAIN[function]
    settings = {"pattern": r"#### (\-?[0-9\.\,]+)", **{known[key]: value for key, value in more.items()}}
    return _compiling(path, f"filter {name}", answers.taking, settings)


def _compiling(path: Path, where: str, make: Callable[..., Callable[[str], str]], given: Any) -> Callable[[str], str]:
    try:
        return make(**given)
    except (re.error, TypeError) as error:
        raise UserError(f"{path}: {where}: not a regular expression: {error}") from None


def generation(path: Path, given: Any, between: str) -> tuple[tuple[str, ...], SampleConfig]:
    """Where an answer stops, and how it is drawn: greedily unless do_sample or a temperature says otherwise.

    Raises:
        UserError: a setting that we do not have, or of the wrong type.
    """
    values = dict(given or {})
    until, sampled = values.pop("until", [between]), values.pop("do_sample", None)
    stop = until if isinstance(until, list) else [until]
    if not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"{path}: generation_kwargs.until = {until!r}: expected texts")
    lengths = [values.pop(key) for key in _LENGTHS if key in values]
    numbers = {"max_tokens": lengths[0] if lengths else 256, "temperature": values.pop("temperature", None)}
    numbers |= {key: values.pop(key) for key in ("top_p", "top_k") if key in values}
    if values or len(lengths) > 1:
        found = next(iter(values), "several maximal lengths")
        raise UserError(f"{path}: generation_kwargs: {found}: not supported")
    if numbers["temperature"] is None:
        numbers["temperature"] = 1.0 if sampled else 0.0
    if sampled is False:
        numbers["temperature"] = 0.0
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | (float if key in ("temperature", "top_p") else int)):
            raise UserError(f"{path}: generation_kwargs: {key} = {value!r}: expected a number")
    return tuple(stop), SampleConfig(**numbers)


def _objects(path: Path, key: str, given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise UserError(f"{path}: {key}: expected a list of objects")
    return given
