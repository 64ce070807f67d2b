"""Kind ``answer``: what a model writes behind a question, compared with the right answer.

Filters take from what was written the part that counts, and a task may make both sides alike first, both as lm-eval
0.4.13 does; an answer that a filter finds nothing in is INVALID.
"""

import re
import string
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mlxgpt.common.tasks.task import Asked, Question, Scorer, Task

INVALID = "[invalid]"
METRIC = "exact_match"


def ask(
    task: Task,
    questions: Sequence[Question],
    before: Sequence[str],
    scorer: Scorer,
    say: Callable[[str], None] = lambda text: None,
) -> Asked:
    """Asks each question behind what stands ``before`` it: ``exact_match`` or, by filter, ``exact_match,NAME``."""
    written = scorer.answers([shown + each.text for each, shown in zip(questions, before, strict=True)], task.stop,
                             task.sample, say)  # fmt: skip
    told: list[dict[str, object]] = [{"answer": text} for text in written]
    return Asked(matched(task, questions, written), told, [])


def matched(task: Task, questions: Sequence[Question], written: Sequence[str]) -> dict[str, np.ndarray]:
    """Metric -> (questions,) of 0 and 1: whether what was written is a right answer."""
    right = [{task.alike(answer) for answer in (each.target, *each.choices)} for each in questions]
    found = {}
    for name, taken in (task.filters or {"": str}).items():
        same = [task.alike(taken(text)) in answers for text, answers in zip(written, right, strict=True)]
        found[f"{METRIC},{name}" if name else METRIC] = np.array(same, np.float64)
    return found


def taking(pattern: str, which: int = 0, fallback: str = INVALID) -> Callable[[str], str]:
    """A filter that takes the match number ``which`` of a regular expression, or its first group that has something.

    Raises:
        re.error: it is none.
    """
    compiled = re.compile(pattern)

    def take(text: str) -> str:
        matches = compiled.findall(text)
        if not -len(matches) <= which < len(matches):
            return fallback
        groups = matches[which] if isinstance(matches[which], tuple) else (matches[which],)
        return next(filter(None, groups), fallback if len(groups) > 1 else "").strip()

    return take


def one_after_another(steps: Iterable[Callable[[str], str]]) -> Callable[[str], str]:
    """A filter of several."""
    steps = tuple(steps)

    def take(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return take


def making_alike(
    regexes: Sequence[str] = (),
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
) -> Callable[[str], str]:
    """What is done to answers of both sides: what the ``regexes`` match goes first, each in turn; then the rest.

    Raises:
        re.error: one of them is none.
    """
    compiled = [re.compile(regex) for regex in regexes]
    dropped = (string.punctuation if ignore_punctuation else "") + (string.digits if ignore_numbers else "")
    table = str.maketrans("", "", dropped)

    def alike(text: str) -> str:
        for regex in compiled:
            text = regex.sub("", text)
        return (text.lower() if ignore_case else text).translate(table)

    return alike
