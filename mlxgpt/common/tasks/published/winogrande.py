"""WinoGrande (Sakaguchi et al. 2020): which of two names a sentence means.

Scored partially: how likely the rest of the sentence is behind each name (Trinh and Le 2018).
"""

from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.values import string_at
from mlxgpt.common.tasks.published import place
from mlxgpt.common.tasks.task import Question, Task


def read(name: str, data: Path, shots: int) -> Task:
    """The validation split; examples are of the largest training split."""
    dev = ["dev.jsonl", *place.hub("validation", "winogrande_xl")]
    train = ["train_xl.jsonl", *place.hub("train", "winogrande_xl")]
    questions = [_question(row) for row in place.rows(name, data, dev)]
    examples = [_question(row) for row in place.rows(name, data, train, given=False)] if shots else []
    return Task(name, "choice", questions, examples, shots, metrics=("acc",))


def _question(row: place.Row) -> Question:
    where, values = row
    head, gap, rest = string_at(values, "sentence", where).partition("_")
    if not gap or not rest.strip():
        raise UserError(f"{where}: sentence has no _ with text behind it: expected the place of the name")
    texts = tuple(head + string_at(values, key, where) for key in ("option1", "option2"))
    gold = (place.index_at(values, "answer", where, 2, first=1),)
    return Question(where, choices=texts, texts=texts, gold=gold, target=rest.strip())
