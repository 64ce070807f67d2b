"""GSM8K (Cobbe et al. 2021): word problems of school, whose answers end in a number behind ####."""

from pathlib import Path

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.rows.values import string_at
from mlxgpt.common.tasks import answers  # A3
from mlxgpt.common.tasks.published import place
from mlxgpt.common.tasks.task import Question, Task

SHOTS = 5
_STOP = ("Question:", "</s>", "<|im_end|>")


def read(name: str, data: Path, shots: int) -> Task:
    """The test split; examples are of the training split. The number behind ####, or the last one, is compared."""
    test, train = (place.hub(split, "main") for split in ("test", "train"))
    questions = [_question(row) for row in place.rows(name, data, test)]
    examples = [_question(row) for row in place.rows(name, data, train, given=False)] if shots else []
    filters = {
        "strict-match": answers.taking(r"#### (\-?[0-9\.\,]+)"),
        "flexible-extract": answers.taking(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", which=-1),
    }
    return Task(
        name,
        "answer",
        questions,
        examples,
        shots,
        leave_out=False,
        stop=_STOP,
        sample=SampleConfig(temperature=0.0, max_tokens=256),
        filters=filters,
        alike=answers.making_alike([",", r"\$", "(?s).*#### ", r"\.$"], ignore_case=True),
    )


def _question(row: place.Row) -> Question:
    where, values = row
    text = f"Question: {string_at(values, 'question', where)}\nAnswer:"
    return Question(where, text, target=string_at(values, "answer", where))
