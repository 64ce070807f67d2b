"""LAMBADA (Paperno et al. 2016): the last word of a passage."""

from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.files import read_lines
from mlxgpt.common.rows.values import string_at
from mlxgpt.common.tasks.published import place
from mlxgpt.common.tasks.task import Question, Task

_OPENAI = ["lambada_test_en.jsonl", "lambada_test.jsonl", *place.hub("test", "default")]


def read(name: str, data: Path, shots: int) -> Task:
    """The test split of OpenAI's form, or of the authors' (standard). Examples are of the same split, or of validation.

    As in lm-evaluation-harness, a passage of OpenAI's form may be its own example.
    """
    if name == "lambada_openai":
        questions = [_question(row) for row in place.rows(name, data, _OPENAI)]
        return Task(name, "cloze", questions, questions, shots, leave_out=False)
    questions = _standard(name, data, "test", "test")
    examples = _standard(name, data, "development", "validation", given=False) if shots else []
    return Task(name, "cloze", questions, examples, shots, leave_out=False)


def _standard(name: str, data: Path, published: str, split: str, given: bool = True) -> list[Question]:
    """Passages of the authors' text files, one a line, or of the hub's."""
    patterns = [f"lambada_{published}_plain_text.txt", *place.hub(split, "plain_text")]
    found = [data] if given and data.is_file() else place.files(name, place.home(name, data), patterns)
    if found[0].suffix != ".txt":
        return [_question(row) for row in place.rows(name, data, patterns, given)]
    lines = read_lines(found[0])
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{found[0]}: empty: expected a passage a line")
    return [_question((f"{found[0]} line {number}", {"text": line})) for number, line in enumerate(lines, 1)]


def _question(row: place.Row) -> Question:
    where, values = row
    text, space, last = string_at(values, "text", where).rpartition(" ")
    if not space or not last:
        raise UserError(f"{where}: text has no last word behind a space: expected a passage")
    return Question(where, text, target=f" {last}")
