"""Kind ``code``: programs that a model writes, run against tests; pass@k (Chen et al. 2021).

Nothing is run here: who scores gives what runs programs, and only where a user asked for it (--run-code).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.errors import UserError
from mlxgpt.common.tasks.task import Asked, Question, Scorer, Task

USUAL = (1, 10, 100)
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
