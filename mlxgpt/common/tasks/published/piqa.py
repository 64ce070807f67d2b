"""PIQA (Bisk et al. 2020): which of two ways reaches a goal."""

from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.files import read_lines
from mlxgpt.common.rows.values import string_at
from mlxgpt.common.tasks.published import place
from mlxgpt.common.tasks.task import Question, Task


def read(name: str, data: Path, shots: int) -> Task:
    """The validation split; examples are of the training split. Published labels lie in a file of their own."""
    valid, train = (["valid.jsonl", *place.hub("validation")], place.hub("train"))
    questions = [_question(row) for row in _labelled(place.rows(name, data, valid), "valid")]
    rows = place.rows(name, data, train, given=False) if shots else []
    return Task(name, "choice", questions, [_question(row) for row in _labelled(rows, "train")], shots)


def _labelled(rows: list[place.Row], split: str) -> list[place.Row]:
    """The rows with their labels, which are in SPLIT-labels.lst where the rows have none."""
    if not rows or "label" in rows[0][1]:
        return rows
    file = Path(rows[0][0].rpartition(" row ")[0]).with_name(f"{split}-labels.lst")
    if not file.is_file():
        raise UserError(f"{rows[0][0]}: no key 'label', and no file {file}: expected one of them")
    labels = [line for line in read_lines(file) if line.strip()]
    if len(labels) != len(rows):
        raise UserError(f"{file}: {len(labels)} labels: expected {len(rows)}, one for each row")
    return [(where, {**values, "label": label}) for (where, values), label in zip(rows, labels, strict=True)]


def _question(row: place.Row) -> Question:
    where, values = row
    choices = tuple(string_at(values, key, where) for key in ("sol1", "sol2"))
    text = f"Question: {string_at(values, 'goal', where)}\nAnswer:"
    return Question(where, text, choices, gold=(place.index_at(values, "label", where, 2),))
