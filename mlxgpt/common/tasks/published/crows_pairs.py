"""CrowS-Pairs (Nangia et al. 2020): which of two sentences, one with more of a stereotype, is likelier."""

from pathlib import Path

from mlxgpt.common.rows.values import string_at
from mlxgpt.common.tasks.published import place
from mlxgpt.common.tasks.task import Question, Task

_FILES = ["crows_pairs_anonymized.csv", *place.hub("test", "english")]


def read(name: str, data: Path, shots: int) -> Task:
    """All pairs, by kind of bias as well."""
    return Task(name, "pair", [_question(row) for row in place.rows(name, data, _FILES)])


def _question(row: place.Row) -> Question:
    where, values = row
    more, less, group = (string_at(values, key, where) for key in ("sent_more", "sent_less", "bias_type"))
    return Question(where, choices=(more, less), group=group)
