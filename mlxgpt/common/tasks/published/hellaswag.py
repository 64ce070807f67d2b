"""HellaSwag (Zellers et al. 2019): which of four sentences goes on."""

import re
from pathlib import Path

from mlxgpt.common.rows.values import string_at
from mlxgpt.common.tasks.published import place
from mlxgpt.common.tasks.task import Question, Task

_TRAIN = ["hellaswag_train.jsonl", *place.hub("train")]
_VAL = ["hellaswag_val.jsonl", *place.hub("validation")]


def read(name: str, data: Path, shots: int) -> Task:
    """The validation split; examples are of the training split."""
    questions = [_question(row) for row in place.rows(name, data, _VAL)]
    examples = [_question(row) for row in place.rows(name, data, _TRAIN, given=False)] if shots else []
    return Task(name, "choice", questions, examples, shots)


def _question(row: place.Row) -> Question:
    where, values = row
    begun, rest = (string_at(values, key, where, empty=True) for key in ("ctx_a", "ctx_b"))
    text = f"{string_at(values, 'activity_label', where)}: {begun} {rest.capitalize()}"
    choices = tuple(_cleaned(ending) for ending in place.strings_at(values, "endings", where))
    return Question(where, _cleaned(text), choices, gold=(place.index_at(values, "label", where, len(choices)),))


def _cleaned(text: str) -> str:
    """Without WikiHow's marks in brackets, of which [title] ends a sentence."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
