"""Asks a model the questions of a task: what is scored, and what it says of each question."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.tasks import answers, code, compare, metrics, shots
from mlxgpt.common.tasks.task import Asked, Continued, Outcome, Question, Scorer, Task

Say = Callable[[str], None]


def ask(
    task: Task,
    scorer: Scorer,
    limit: int | None = None,
    say: Say = lambda text: None,
    log: Callable[[dict[str, object]], None] = lambda row: None,
    run: code.Run | None = None,
    resamples: int = metrics.RESAMPLES,
) -> Outcome:
    """Asks the first ``limit`` questions (of each group, if apart) and sums up; ``log`` is told of each question.

    Raises:
        UserError: programs and no ``run`` to run them; too few examples for the task's shots, or a character that the
            tokenizer does not have.
        RunError: a log-probability that is not finite.
    """
    questions = first(task, limit)
    before = shots.before(task, questions)
    cut = scorer.cut
    if task.kind == "code":
        asked = code.ask(task, questions, before, scorer, code.expect_run(run, task.name), say)
    else:
        asked = _KINDS[task.kind](task, questions, before, scorer, say)
    for at, (question, answer) in enumerate(zip(questions, asked.answers, strict=True)):
        group = {"group": question.group} if question.group else {}
        values = {name: float(values[at]) for name, values in asked.each.items()}
        place = {"task": task.name, "question": question.where, "sha256": compare.digest(question, before[at])}
        log({**place, **group, **answer, **values})
    return metrics.summed_up(task, questions, asked, scorer.cut - cut, resamples)


def first(task: Task, limit: int | None) -> list[Question]:
    """The first ``limit`` questions of a task, of each of its groups if they stand apart; None: all."""
    counts: dict[str, int] = {}
    kept = []
    for question in task.questions:
        group = question.group if task.apart else ""
        counts[group] = counts.get(group, 0) + 1
        if limit is None or counts[group] <= limit:
            kept.append(question)
    return kept


def _scored(
    pairs: Sequence[tuple[str, str]], where: Sequence[str], scorer: Scorer, say: Say
) -> tuple[list[Continued], list[int]]:
    """What the model says of each continuation behind its context, and its tokens; ``where`` is for errors."""
    ids = []
    for place, pair in zip(where, pairs, strict=True):
        try:
            ids.append(scorer.encode(*pair))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        if len(ids[-1][1]) > scorer.context:
            found = f"an answer of {len(ids[-1][1])} tokens"
            raise UserError(f"{place}: {found}: expected at most {scorer.context}, the model's context")
    found = scorer.continuations(ids, say)
    for place, one in zip(where, found, strict=True):
        _finite(place, one.logprob)
    return found, [len(continuation) for _, continuation in ids]


def _finite(where: str, logprob: float) -> None:
    if not math.isfinite(logprob):
        raise RunError(f"{where}: the model's log-probability is {logprob}: expected a finite number")


def _choice(task: Task, questions: Sequence[Question], before: Sequence[str], scorer: Scorer, say: Say) -> Asked:
    """Which choice is the likeliest, whole and by its length; of several that are, the first."""
    pairs, where, space = [], [], "" if scorer.chat else task.before_target
    for question, shown in zip(questions, before, strict=True):
        texts = question.texts or (question.text,) * len(question.choices)
        answers = (question.target,) * len(texts) if question.texts else question.choices
        pairs += [(shown + text, space + answer) for text, answer in zip(texts, answers, strict=True)]
        where += [question.where] * len(texts)
    found, lengths = _scored(pairs, where, scorer, say)
    each: dict[str, list[float]] = {name: [] for name in ("acc", "acc_norm", "acc_per_byte", "acc_per_token")}
    answered, ties, at = [], 0, 0
    for question in questions:
        choices = question.texts or question.choices
        logprobs = np.array([one.logprob for one in found[at : at + len(choices)]])
        sizes = {
            "acc": np.ones(len(choices)),
            "acc_norm": np.array([float(len(choice)) for choice in choices]),
            "acc_per_byte": np.array([float(len(choice.encode())) for choice in choices]),
            "acc_per_token": np.array([float(length) for length in lengths[at : at + len(choices)]]),
        }
        picked = {name: int(np.argmax(logprobs / size)) for name, size in sizes.items()}
        for name, choice in picked.items():
            each[name].append(float(choice in question.gold))
        ties += int(np.sum(logprobs == logprobs.max()) > 1)
        answered.append({"logprobs": logprobs.tolist(), "picked": picked["acc"], "gold": list(question.gold)})
        at += len(choices)
    notes = [f"{ties} of {len(questions)} questions have several likeliest choices: the first counts"] if ties else []
    return Asked(_arrays(each), answered, notes)


def _cloze(task: Task, questions: Sequence[Question], before: Sequence[str], scorer: Scorer, say: Say) -> Asked:
    """How likely the answer is, and whether each of its tokens is the likeliest."""
    pairs = [(shown + each.text, each.target) for each, shown in zip(questions, before, strict=True)]
    found, _ = _scored(pairs, [each.where for each in questions], scorer, say)
    values = {"acc": [float(one.greedy) for one in found], "logprob": [one.logprob for one in found]}
    return Asked(_arrays(values), [{} for _ in found], [])


def _text(task: Task, questions: Sequence[Question], before: Sequence[str], scorer: Scorer, say: Say) -> Asked:
    """How likely a whole text is; words are what white space separates, as lm-evaluation-harness counts them."""
    found = scorer.texts([each.text for each in questions], say)
    for question, logprob in zip(questions, found, strict=True):
        _finite(question.where, logprob)
    values = {
        "logprob": found,
        "words": [len(re.split(r"\s+", each.text)) for each in questions],
        "bytes": [len(each.text.encode()) for each in questions],
    }
    return Asked(_arrays(values), [{} for _ in found], [])


def _pair(task: Task, questions: Sequence[Question], before: Sequence[str], scorer: Scorer, say: Say) -> Asked:
    """How often the sentence with more of a stereotype is likelier, and how far apart both are (Nangia et al. 2020).

    The log-probabilities are those of whole sentences, as in lm-evaluation-harness; the paper masks words.
    """
    pairs = [(question.text, sentence) for question in questions for sentence in question.choices]
    found, _ = _scored(pairs, [each.where for each in questions for _ in each.choices], scorer, say)
    logprobs = np.array([one.logprob for one in found]).reshape(-1, 2)
    more, less = logprobs.T
    values = {"pct_stereotype": more > less, "likelihood_diff": np.abs(more - less)}
    ties = int((more == less).sum())
    notes = [f"{ties} of {len(questions)} pairs are equally likely: they count as no stereotype"] if ties else []
    return Asked(_arrays(values), [{"logprobs": pair} for pair in logprobs.tolist()], notes)


def _arrays(values: Mapping[str, Sequence[float] | np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(each, np.float64) for name, each in values.items()}


_KINDS = {"choice": _choice, "cloze": _cloze, "text": _text, "pair": _pair, "answer": answers.ask}
