"""From what came of each question to metrics with their standard errors, as lm-evaluation-harness 0.4.13 has them."""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mlxgpt.common.tasks.task import Asked, Metric, Outcome, Question, Task

RESAMPLES = 100_000  # of the bootstrap, lm-evaluation-harness's bootstrap_iters
_CHUNK = 1000  # resamples of one of its generators


def summed_up(
    task: Task, questions: Sequence[Question], asked: Asked, cut: int = 0, resamples: int = RESAMPLES
) -> Outcome:
    """The outcome of a task, whole and by group, in the order in which groups come, parts after their whole."""
    named = [question.group for question in questions]
    parts = {group: np.array([each == group for each in named]) for group in dict.fromkeys(filter(None, named))}
    members = {
        whole: [name for name in parts if name == whole or name.startswith(f"{whole}/")]
        for whole in _wholes(list(parts))
    }

    def metrics(names: Sequence[str]) -> dict[str, Metric]:
        rows = [parts[name] for name in names] or [np.ones(len(questions), bool)]
        found = of({key: values[np.any(rows, axis=0)] for key, values in asked.each.items()}, resamples)
        if not task.apart or len(rows) < 2:
            return found
        each = [of({key: values[row] for key, values in asked.each.items()}, resamples) for row in rows]
        sizes = [int(row.sum()) for row in rows]
        return {
            key: Metric(one.value, pooled([part[key].stderr for part in each], sizes)) for key, one in found.items()
        }

    kept = (lambda found: {key: found[key] for key in found if key in task.metrics}) if task.metrics else dict
    return Outcome(
        task.name,
        task.kind,
        len(questions),
        kept(metrics(list(parts) if task.apart else [])),
        asked.each,
        {whole: kept(metrics(names)) for whole, names in members.items()},
        {whole: int(sum(parts[name].sum() for name in names)) for whole, names in members.items()},
        task.shots,
        cut,
        (*task.notes, *asked.notes),
    )


def _wholes(groups: Iterable[str]) -> list[str]:
    """Every group and what it is part of, as a of a/b, which comes first."""
    place: dict[str, int] = {}
    for group in groups:
        for whole in _path(group):
            place.setdefault(whole, len(place))
    return sorted(place, key=lambda group: [place[whole] for whole in _path(group)])


def _path(group: str) -> list[str]:
    steps = group.split("/")
    return ["/".join(steps[:end]) for end in range(1, len(steps) + 1)]


def of(each: Mapping[str, np.ndarray], resamples: int = RESAMPLES) -> dict[str, Metric]:
    """The metrics of (questions,) values: means, but for log-probabilities.

    ``logprob`` alone is of an answer: its ``perplexity`` is exp(-mean), a question each. With ``words`` and ``bytes``
    it is of a text: the perplexities divide by all words or bytes (Gao et al. 2021, lm-evaluation-harness).
    """
    found: dict[str, Metric] = {}
    for name, values in each.items():
        if name == "logprob" and "bytes" in each:
            total, size = float(values.sum()), float(each["bytes"].sum())
            found["word_perplexity"] = Metric(_exp(-total / float(each["words"].sum())), None)
            found["byte_perplexity"] = Metric(_exp(-total / size), None)
            found["bits_per_byte"] = Metric(-total / size / math.log(2), None)
        elif name == "logprob":
            found["perplexity"] = Metric(_exp(-float(values.mean())), bootstrapped(values, _perplexity, resamples))
        elif name not in ("words", "bytes"):
            found[name] = Metric(float(values.mean()), mean_error(values))
    return found


def mean_error(values: np.ndarray) -> float | None:
    """The standard error of a mean, from the sample's deviation; None for fewer than two values."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def bootstrapped(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = RESAMPLES
) -> float | None:
    """The deviation of ``statistic`` over resamples of ``values`` (Efron 1979); None for fewer than two of either.

    The indices are those of lm-evaluation-harness: ``random.choices`` of ``random.Random(n)`` for the n-th thousand.
    """
    if len(values) < 2 or not resamples:
        return None
    found = []
    for seed in range(max(1, resamples // _CHUNK)):
        *state, place = random.Random(seed).getstate()[1]
        draw = np.random.RandomState()
        draw.set_state(("MT19937", np.array(state, np.uint32), place, 0, 0.0))
        left = min(_CHUNK, resamples)
        while left:
            rows = min(left, max(1, (1 << 22) // len(values)))
            picked = (draw.random_sample(rows * len(values)) * len(values)).astype(np.int64)
            found.append(statistic(values[picked].reshape(rows, -1)))
            left -= rows
    return float(np.concatenate(found).std(ddof=1))


def pooled(errors: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """The standard error of groups' mean by size, from the pooled variance within them."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    within = sum((size - 1) * error**2 * size for error, size in zip(known, sizes, strict=True))
    return math.sqrt(within / (sum(sizes) - len(sizes)) / sum(sizes))


def _perplexity(samples: np.ndarray) -> np.ndarray:
    return np.exp(-samples.mean(axis=1))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
