"""Kind ``code``: programs that a model writes, run against tests; pass@k (Chen et al. 2021).

Nothing is run here: who scores gives what runs programs, and only where a user asked for it (--run-code).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.tasks.task import Asked, Question, Scorer, Task

USUAL = (1, 10, 100)
_MBPP_TASK = "You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:"
_MBPP_STOP = "[DONE]"
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What ends a function whose head a model was given."""


class Ended(Protocol):
    """What became of a program: user_code/limited.py."""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        ...

    @property
    def why(self) -> str:
        """If not, what happened."""
        ...


Run = Callable[[Sequence[str]], Sequence[Ended]]
"""Runs programs that nobody has read, and says what became of each."""


def expect_run(run: Run | None, name: str) -> Run:
    """Refuses to run code where nobody allowed it.

    Raises:
        UserError: says what --run-code does.
    """
    if run is None:
        raise UserError(
            f"--task {name}: its score needs programs to be run that the model writes: --run-code runs them on this "
            "machine, each in a process without network, with little time and memory and a folder of its own"
        )
    return run


def ask(
    task: Task,
    questions: Sequence[Question],
    before: Sequence[str],
    scorer: Scorer,
    run: Run,
    say: Callable[[str], None] = lambda text: None,
) -> Asked:
    """Asks for ``task.draws`` programs a question, each draw under a seed of its own, and runs them: pass@k.

    Raises:
        UserError: more than one draw, all of which would be the same, or fewer than a pass@k asks for.
    """
    check_draws(task)
    contexts = [shown + each.text for each, shown in zip(questions, before, strict=True)]
    written: list[list[str]] = [[] for _ in contexts]
    for draw in range(task.draws):
        seed = task.sample.seed if task.draws == 1 else rng.key32(task.sample.seed, "draw", draw)
        sample = dataclasses.replace(task.sample, seed=seed)
        for texts, text in zip(written, scorer.answers(contexts, task.stop, sample, say), strict=True):
            texts.append(text)
    ended = list(run([program(each, text) for each, texts in zip(questions, written, strict=True) for text in texts]))
    rows = [ended[start : start + task.draws] for start in range(0, len(ended), task.draws)]
    passed = np.array([sum(each.passed for each in row) for row in rows])
    told: list[dict[str, object]] = [
        {"programs": texts, "ended": [each.why or "passed" for each in row]}
        for texts, row in zip(written, rows, strict=True)
    ]
    return Asked({f"pass@{k}": pass_at(passed, task.draws, k) for k in counts(task)}, told, [])


def check_draws(task: Task) -> None:
    """Refuses settings that cannot be scored.

    Raises:
        UserError: draws that are all the same, or fewer than a pass@k asks for.
    """
    if task.draws > 1 and task.sample.temperature == 0:
        raise UserError(
            f"{task.name}: {task.draws} draws at temperature 0 are the same: expected a temperature, such as 0.8"
        )
    counts(task)


def counts(task: Task) -> tuple[int, ...]:
    """Every k of the task's pass@k: of its metrics, or the usual ones that its draws allow.

    Raises:
        UserError: a metric is not pass@k, or k is more than the draws.
    """
    found = [re.fullmatch(r"pass@([1-9]\d*)", name) for name in task.metrics]
    for name, match in zip(task.metrics, found, strict=True):
        if match is None or int(match[1]) > task.draws:
            raise UserError(f"{task.name}: metric {name!r}: expected pass@K, K at most the {task.draws} draws")
    return tuple(int(match[1]) for match in found if match) or tuple(k for k in USUAL if k <= task.draws)


def program(question: Question, text: str) -> str:
    """What is run: the part that was given, what the model wrote, and the tests."""
    return f"{question.program}{text}\n\n{question.tests}\n"


def pass_at(passed: np.ndarray, draws: int, k: int) -> np.ndarray:
    """The chance that one of ``k`` programs passes, by the count of those that ``passed`` (questions,) of ``draws``.

    1 - C(n - c, k) / C(n, k), which is unbiased; as a product, for the binomials are large (Chen et al. 2021).
    """
    rest = draws - passed[:, None].astype(np.float64)
    left = np.clip((rest - np.arange(k)) / (draws - np.arange(k)), 0, None)  # 0 where fewer than k fail
    return 1 - left.prod(axis=1)


def humaneval(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Question]:
    """Questions of HumanEval's rows (task_id, prompt, entry_point, canonical_solution, test), each with its place.

    Raises:
        UserError: a row lacks one.
    """
    made = []
    for where, row in rows:
        prompt, solution, test, entry = (
            _text(row, key, where) for key in ("prompt", "canonical_solution", "test", "entry_point")
        )
        tests = f"{test}\ncheck({entry})"
        made.append(Question(where, text=prompt, target=solution, program=prompt, tests=tests))
    return made


def humaneval_task(name: str, questions: Sequence[Question]) -> Task:
    """As lm-eval asks: what stands at the margin ends the function; greedy, one draw."""
    return Task(
        name,
        "code",
        questions,
        before_target="",
        stop=STOP,
        sample=SampleConfig(temperature=0.0, max_tokens=1024),
    )


def mbpp(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[int, Question]:
    """task_id -> question, of MBPP's rows (task_id, text or prompt, code, test_list, maybe test_setup_code).

    Raises:
        UserError: a row lacks one, or has no tests.
    """
    made = {}
    for where, row in rows:
        asked = _text(row, "text" if "text" in row else "prompt", where)
        tests = row.get("test_list")
        if not isinstance(tests, Sequence) or isinstance(tests, str) or not all(isinstance(one, str) for one in tests):
            raise UserError(f"{where}: test_list = {tests!r}: expected a list of tests")
        if not tests:
            raise UserError(f"{where}: test_list is empty: expected tests, or any program would pass")
        number = row.get("task_id")
        if type(number) is not int:
            raise UserError(f"{where}: task_id = {number!r}: expected a number")
        before = [str(row.get("test_setup_code") or ""), *map(str, row.get("test_imports") or ())]
        shown = "\n".join([_MBPP_TASK.format(task=asked), "", *tests[:3], "[BEGIN]", ""])
        made[number] = Question(
            where,
            text=shown,
            target=f"{_text(row, 'code', where)}\n{_MBPP_STOP}",
            tests="\n".join(filter(None, [*before, *tests])),
        )
    return made


def mbpp_task(name: str, rows: Mapping[int, Question]) -> Task:
    """As lm-eval asks: after the examples 2, 3 and 4; the test split, 11 to 510, where the file has it all."""
    examples = [rows[number] for number in (2, 3, 4) if number in rows]
    asked = {number: question for number, question in rows.items() if 11 <= number <= 510}
    notes = ()
    if asked and len(asked) < len(rows):
        notes = (f"{len(asked)} of {len(rows)} rows are asked: the test split, task_id 11 to 510",)
    shots = 3 if len(examples) == 3 and asked else 0
    return Task(
        name, "code", list((asked or rows).values()), examples=examples, shots=shots, first=True, before_target="",
        stop=(_MBPP_STOP,), sample=SampleConfig(temperature=0.0, max_tokens=256), notes=notes,
    )  # fmt: skip


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    """The text of a row's key.

    Raises:
        UserError: it has none.
    """
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {key} = {value!r}: expected text")
    return value
