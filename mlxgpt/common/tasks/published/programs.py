"""HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021): programs to write, and tests that run behind them."""

from pathlib import Path

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.values import string_at
from mlxgpt.common.tasks import code
from mlxgpt.common.tasks.published import place
from mlxgpt.common.tasks.task import Question, Task

SHOTS = 3  # of MBPP
_EXAMPLES, _TEST = (2, 3, 4), range(11, 511)  # task_id
_TASK = "You are an expert Python programmer, and here is your task:"
_END = "[DONE]"


def humaneval(name: str, data: Path, shots: int) -> Task:
    """The head of a function is given; what stands at the margin ends it."""
    if shots:
        raise UserError(f"--task {name}: {shots} examples before each question: expected 0: its questions are programs")
    questions = []
    for where, row in place.rows(name, data, ["HumanEval.jsonl", "human-eval*.jsonl", *place.hub("test")]):
        head, test = string_at(row, "prompt", where), string_at(row, "test", where)
        tests = f"{test}\ncheck({string_at(row, 'entry_point', where)})"
        solution = string_at(row, "canonical_solution", where)
        questions.append(Question(where, head, target=solution, program=head, tests=tests))
    return Task(name, "code", questions, before_target="", stop=code.STOP, sample=_greedy(1024))


def mbpp(name: str, data: Path, shots: int) -> Task:
    """A task in words and its tests are given; the test split is asked, behind the examples 2, 3 and 4."""
    found = place.rows(name, data, ["mbpp.jsonl", "sanitized-mbpp.json", *place.hub("test", "full")])
    rows = dict(_mbpp_row(row) for row in found)
    before = rows
    if shots and not any(number in rows for number in _EXAMPLES):
        before = dict(_mbpp_row(row) for row in place.rows(name, data, place.hub("prompt", "full"), given=False))
    asked = {number: question for number, question in rows.items() if number in _TEST} or rows
    note = f"{len(asked)} of {len(rows)} rows are asked: the test split, task_id {_TEST[0]} to {_TEST[-1]}"
    return Task(
        name,
        "code",
        list(asked.values()),
        [before[number] for number in _EXAMPLES if number in before],
        shots,
        first=True,
        leave_out=False,
        before_target="",
        stop=(_END,),
        sample=_greedy(256),
        notes=(note,) if len(asked) < len(rows) else (),
    )


def _mbpp_row(given: place.Row) -> tuple[int, Question]:
    where, row = given
    number = row.get("task_id")
    if type(number) is not int:
        raise UserError(f"{where}: task_id is {number!r}: expected a number")
    words = string_at(row, "text" if "text" in row else "prompt", where)
    tests = list(place.strings_at(row, "test_list", where, least=1))
    shown = "\n".join([f"{_TASK} {words} Your code should pass these tests:", "", *tests[:3], "[BEGIN]", ""])
    before = [str(row.get("test_setup_code") or ""), *map(str, row.get("test_imports") or ())]
    right = f"{string_at(row, 'code', where)}\n{_END}"
    return number, Question(where, shown, target=right, tests="\n".join(filter(None, [*before, *tests])))


def _greedy(most: int) -> SampleConfig:
    return SampleConfig(temperature=0.0, max_tokens=most)
