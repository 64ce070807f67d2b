"""ARC (Clark et al. 2018): science questions of school exams, in an easy and a challenging part."""

from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.values import shown, string_at, value_at
from mlxgpt.common.tasks.published import place
from mlxgpt.common.tasks.task import Question, Task

_PARTS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


def read(name: str, data: Path, shots: int) -> Task:
    """The test split; examples are of the training split."""
    part = _PARTS[name]
    test, train = ([f"{part}-{split.title()}.jsonl", *place.hub(split, part)] for split in ("test", "train"))
    questions = [_question(row) for row in place.rows(name, data, test)]
    examples = [_question(row) for row in place.rows(name, data, train, given=False)] if shots else []
    return Task(name, "choice", questions, examples, shots, leave_out=False)


def _question(row: place.Row) -> Question:
    where, values = row
    asked, choices = values.get("question"), values.get("choices")
    if isinstance(asked, dict):  # as published: {"stem": ..., "choices": [{"text": ..., "label": ...}]}
        values = {**values, "question": asked.get("stem")}
        choices = asked.get("choices")
    if isinstance(choices, list):
        choices = {key: [_at(each, key, where) for each in choices] for key in ("text", "label")}
    if not isinstance(choices, dict):
        raise UserError(f"{where}: choices is {shown(choices)}: expected text and label of each")
    texts, labels = (tuple(place.strings_at(choices, key, where)) for key in ("text", "label"))
    answer = value_at(values, "answerKey", where)
    if answer not in labels or len(labels) != len(texts):
        raise UserError(f"{where}: answerKey is {shown(answer)}: expected one of {', '.join(labels)}, a choice each")
    text = f"Question: {string_at(values, 'question', where)}\nAnswer:"
    return Question(where, text, texts, gold=(labels.index(answer),))


def _at(choice: Any, key: str, where: str) -> Any:
    if not isinstance(choice, dict):
        raise UserError(f"{where}: a choice is {shown(choice)}: expected its text and its label")
    return choice.get(key)
