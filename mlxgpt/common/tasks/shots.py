"""What stands before a question: a description and examples, drawn and joined as lm-evaluation-harness 0.4.13 does."""

import random
from collections.abc import Sequence
from dataclasses import replace

from mlxgpt.common.errors import UserError
from mlxgpt.common.tasks.task import Question, Task

SEED = 1234  # lm-evaluation-harness's fewshot_random_seed


def before(task: Task, questions: Sequence[Question]) -> list[str]:
    """What stands before the text of each of ``questions``, the first ones of the task (of each group, if apart).

    Raises:
        UserError: fewer examples than ``task.shots``, or an example without an answer.
    """
    draws: dict[str, _Draw] = {}
    made = []
    for question in questions:
        group = question.group if task.apart else ""
        if group not in draws:
            draws[group] = _Draw(task, group)
        shown = "".join(example(task, each) for each in draws[group].examples(question))
        made.append((question.before or task.description) + shown)
    return made


def example(task: Task, question: Question) -> str:
    """A question with its answer, as it stands before another."""
    text, answer = question.text, question.target
    if task.kind == "choice":
        right = question.gold[0]
        text = question.texts[right] if question.texts else text
        answer = question.target if question.texts else question.choices[right]
    if not answer:
        raise UserError(f"{question.where}: no answer: an example before other questions needs one")
    return text + task.before_target + answer + task.between


class _Draw:
    """The examples of one question after another: one generator for all of them."""

    def __init__(self, task: Task, group: str):
        pool = list(task.examples or task.questions)
        self._pool = [each for each in pool if each.group == group] if task.apart else pool
        self._task, self._random = task, random.Random(SEED)
        name = f" of {group}" if group else ""
        needed = task.shots + (task.leave_out and task.shots > 0)
        if len(self._pool) < needed:
            found = f"{task.name}: {task.shots} examples before each question{name}: found {len(self._pool)}"
            raise UserError(f"{found}: expected at least {needed}")

    def examples(self, question: Question) -> Sequence[Question]:
        task, pool = self._task, self._pool
        if not task.shots:
            return ()
        if not task.leave_out:
            return pool[: task.shots] if task.first else self._random.sample(pool, task.shots)
        if task.first:
            return self._others(pool, question)[: task.shots]
        drawn = self._others(self._random.sample(pool, task.shots + 1), question)[: task.shots]
        if len(drawn) < task.shots:  # the question was drawn twice: it is in the pool several times
            drawn = self._random.sample(self._others(pool, question), task.shots)
        return drawn

    def _others(self, drawn: Sequence[Question], question: Question) -> list[Question]:
        others = [each for each in drawn if _same(each) != _same(question)]
        if drawn is self._pool and len(others) < self._task.shots:
            name, shots = self._task.name, self._task.shots
            raise UserError(f"{name}: {shots} examples before each question: found {len(others)} besides the question")
        return others


def _same(question: Question) -> object:
    return replace(question, where="")
