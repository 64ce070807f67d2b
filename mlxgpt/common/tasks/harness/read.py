"""A task from its YAML: the local part of what lm-evaluation-harness 0.4.13 reads, asked in the same words."""

import json
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.rows.values import shown, unicode
from mlxgpt.common.tasks import own
from mlxgpt.common.tasks.harness import keys, settings, templates
from mlxgpt.common.tasks.harness.rows import Data, Row
from mlxgpt.common.tasks.task import Question, Task

KINDS = {
    "multiple_choice": "choice", "loglikelihood": "cloze", "loglikelihood_rolling": "text", "generate_until": "answer",
}  # fmt: skip
_TEXTS = ("task", "description", "target_delimiter", "fewshot_delimiter", "training_split", "validation_split")
_TEXTS += ("test_split", "fewshot_split", "output_type", "dataset_path")
_SAMPLERS = ("default", "first_n")


def read(path: Path, shots: int | None = None) -> Task:
    """The task that a YAML file describes; its examples are read only where there are any.

    Raises:
        UserError: a key or a value that we do not have, data that is not there, or a row that is no question.
    """
    values = keys.read(path)
    for key in _TEXTS:
        if not isinstance(values.get(key, ""), str):
            raise UserError(f"{path}: {key} = {values[key]!r}: expected text")
        unicode(values.get(key, ""), f"{path}: {key}")
    kind = KINDS.get(values.get("output_type", "generate_until"))
    if kind is None:
        raise UserError(f"{path}: output_type = {values['output_type']!r}: expected {', '.join(KINDS)}")
    test = values.get("test_split") or values.get("validation_split")
    if not test:
        raise UserError(f"{path}: no test_split or validation_split: expected the split that is asked")
    shots = _shots(path, values.get("num_fewshot", 0)) if shots is None else shots
    data, shown = Data(path, values), _few(path, values)
    rows = data.rows("test_split" if "test_split" in values else "validation_split", test)
    reader = _Reader(path, kind, values, rows[0][1])
    pool = reader.examples(data, shown) if shots else []
    between = values.get("fewshot_delimiter", "\n\n")
    metrics, alike = settings.metrics(path, kind, values.get("metric_list"))
    for key in ("generation_kwargs", "filter_list"):
        if kind != "answer" and values.get(key):
            raise UserError(f"{path}: {key}: does nothing with output_type {values.get('output_type')}")
    stop, sample = settings.generation(path, values.get("generation_kwargs"), between)
    return Task(
        values.get("task") or path.stem,
        kind,
        [reader.question(row) for row in rows],
        pool,
        shots,
        first=shown.get("sampler") == "first_n",
        leave_out=reader.pool_split == values.get("test_split"),
        before_target=values.get("target_delimiter", " "),
        between=between,
        stop=stop if kind == "answer" else (),
        sample=sample,
        metrics=metrics,
        filters=settings.filters(path, values.get("filter_list")),
        alike=alike,
    )


def _shots(path: Path, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{path}: num_fewshot = {value!r}: expected 0 or a positive whole number")
    return value


def _few(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """fewshot_config, checked."""
    given = values.get("fewshot_config") or {}
    for key in given if isinstance(given, dict) else ("",):
        if key not in ("sampler", "split", "samples"):
            raise UserError(f"{path}: fewshot_config.{key}: not supported: expected sampler, split or samples")
    if given.get("sampler", "default") not in _SAMPLERS:
        raise UserError(f"{path}: fewshot_config.sampler = {given['sampler']!r}: expected {', '.join(_SAMPLERS)}")
    samples = given.get("samples", [])
    if not isinstance(samples, list) or not all(isinstance(each, dict) for each in samples):
        raise UserError(f"{path}: fewshot_config.samples: expected a list of rows")
    return given


class _Reader:
    """The rows of one file as questions."""

    def __init__(self, path: Path, kind: str, values: dict[str, Any], first: dict[str, Any]):
        self._path, self._kind, self._values, self._columns = path, kind, values, first.keys()
        self._text, self._choice, self._target = (values.get(f"doc_to_{part}") for part in ("text", "choice", "target"))
        needed = {"choice": ("text", "choice", "target"), "text": ("target",)}.get(kind, ("text", "target"))
        for key in (f"doc_to_{part}" for part in needed):
            if key not in values:
                raise UserError(f"{path}: no key {key}{nearest(key, values)}: expected it for output_type {kind}")
        if kind in ("cloze", "text") and self._choice is not None:
            raise UserError(f"{path}: doc_to_choice: does nothing with output_type {values['output_type']}")
        self.pool_split: str | None = None  # fewshot_split, as the comparison with test_split has it

    def examples(self, data: Data, given: dict[str, Any]) -> list[Question]:
        """What examples are drawn from: fewshot_split, else samples, training, validation or test."""
        self.pool_split = given.get("split", self._values.get("fewshot_split"))
        samples = [(f"{self._path}: sample {number}", row) for number, row in enumerate(given.get("samples", []), 1)]
        if self.pool_split is not None:
            rows = data.rows("fewshot_split", self.pool_split)
        elif samples:
            rows = samples
        else:
            key = next(key for key in ("training_split", "validation_split", "test_split") if key in self._values)
            rows = data.rows(key, self._values[key])
        return [self.question(row) for row in rows]

    def question(self, row: Row) -> Question:
        """The question of a row.

        Raises:
            UserError: a text, a choice or a target that is none.
        """
        where, values = row
        numbers = self._choice is not None
        target = templates.field("doc_to_target", self._target, values, where, self._columns, numbers)
        if self._kind == "text":
            return Question(where, _text(target, "doc_to_target", where), key=_key(values))
        text = templates.field("doc_to_text", self._text, values, where, self._columns, numbers)
        choices = templates.choices(self._choice, values, where, self._columns) if numbers else None
        if self._kind == "choice":
            made = _choice(text, choices, target, where)
        else:
            made = _written(text, choices, target, where, several=self._kind == "answer")
        return Question(**made, where=where, before=self._before(values, where), key=_key(values))

    def _before(self, values: dict[str, Any], where: str) -> str:
        description = self._values.get("description", "")
        found = templates.field("description", description, values, where, self._columns, numbers=False)
        return _text(found, "description", where, empty=True)


def _choice(text: Any, choices: Any, target: Any, where: str) -> dict[str, Any]:
    """The parts of a question with choices; where the text is a number, that choice is right, and choices are texts."""
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: doc_to_choice is {shown(choices)}: expected a list of at least two texts")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise UserError(
                f"{where}: choice {number} is {shown(choice)}: expected text (YAML's yes and no need quotes)"
            )
        unicode(choice, f"{where}: choice {number}")
    own.distinct(choices, where)
    if isinstance(text, int):
        gold = _right(text, choices, "doc_to_text", where)
        texts = tuple(choices)
        return {"choices": texts, "texts": texts, "gold": (gold,), "target": _text(target, "doc_to_target", where)}
    targets = target if isinstance(target, list) else [target]
    if not targets:
        raise UserError(f"{where}: doc_to_target is []: expected the right choice")
    gold = tuple(dict.fromkeys(_right(each, choices, "doc_to_target", where) for each in targets))
    return {"text": _text(text, "doc_to_text", where, empty=True), "choices": tuple(choices), "gold": gold}


def _right(target: Any, choices: list[str], key: str, where: str) -> int:
    """The index of the right choice, which is named by index or text."""
    if isinstance(target, int) and 0 <= target < len(choices):
        return int(target)
    if isinstance(target, str) and target in choices:
        return choices.index(target)
    raise UserError(f"{where}: {key} is {shown(target)}: expected 0 to {len(choices) - 1}, or the text of a choice")


def _written(text: Any, choices: Any, target: Any, where: str, several: bool) -> dict[str, Any]:
    """The parts of a question whose answer is text; ``several``: it may have more than one that is right."""
    if choices is not None:
        if not isinstance(choices, list) or not isinstance(target, int) or not 0 <= target < len(choices):
            raise UserError(f"{where}: doc_to_target is {shown(target)}: expected the index of one of doc_to_choice")
        target = choices[target]
    targets = target if isinstance(target, list) and several else [target]
    if several:
        targets = [str(each) if isinstance(each, int | float) else each for each in targets]
    if not targets:
        raise UserError(f"{where}: doc_to_target is []: expected a right answer")
    first, *others = (_text(each, "doc_to_target", where) for each in targets)
    return {"text": _text(text, "doc_to_text", where, empty=True), "target": first, "choices": tuple(others)}


def _text(value: Any, key: str, where: str, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise UserError(f"{where}: {key} is {shown(value)}: expected text")
    return unicode(value, f"{where}: {key}")


def _key(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)
