"""Two models on the same questions: how far apart, and whether that could be chance.

Paired, since both were asked the same: a question that is hard for both tells nothing about which is better. The
interval is the percentile bootstrap's over questions (Efron 1979); 0/1 metrics also have McNemar's exact test (1947).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.errors import UserError
from mlxgpt.common.tasks.task import Question

RESAMPLES = 10_000
LEVEL = 0.95
_AT_ONCE = 1 << 20  # questions that are drawn at once


@dataclass(frozen=True)
class Difference:
    """One metric of two models."""

    first: float
    second: float
    difference: float  # the first less the second
    low: float  # of the interval
    high: float
    only_first: int | None  # 0/1: questions that it alone has right; None: not such a metric
    only_second: int | None
    p: float | None  # McNemar's: how likely so uneven counts are if neither is better


def digest(question: Question, shown: str = "") -> str:
    """sha256 of what is asked, wherever it came from, and of what is ``shown`` before it; its first half."""
    values = asdict(question)
    del values["where"], values["key"]
    return hashlib.sha256(json.dumps(values | {"shown": shown}, sort_keys=True).encode()).hexdigest()[:32]


def expect_same(first: Sequence[str], second: Sequence[str], names: tuple[str, str], task: str) -> None:
    """Refuses questions, by their digests, that are not the same in the same order.

    Raises:
        UserError: says from which on they differ.
    """
    if list(first) != list(second):
        pairs = enumerate(zip(first, second, strict=False), start=1)
        at = next((number for number, (one, other) in pairs if one != other), min(len(first), len(second)) + 1)
        counts = f"{len(second)} questions, {names[0]} {len(first)}"
        raise UserError(
            f"{names[1]}: was asked other questions of {task} than {names[0]}, from number {at} on ({counts}): "
            "expected the same task, --limit and --shots"
        )


def logged(rows: Iterable[Mapping[str, Any]], task: str, where: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """The digests of a task's questions among the rows of a log, and every number that each of them has, by name.

    Raises:
        UserError: no rows of that task, or rows that are no log's.
    """
    own = [row for row in rows if row.get("task") == task]
    if not own:
        raise UserError(f"{where}: nothing of the task {task}: expected a --log of it")
    if not all(isinstance(row.get("sha256"), str) for row in own):
        raise UserError(f"{where}: rows without sha256: expected what --log writes")
    names = [name for name in own[0] if all(type(row.get(name)) in (int, float) for row in own)]
    return [row["sha256"] for row in own], {name: np.array([row[name] for row in own], np.float64) for name in names}


def compare(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Difference]:
    """Metric -> its difference, of the values by question (questions,) that both have, named as Outcome.each."""
    names = [name for name in first if name in second]
    a, b = ({name: each[name].astype(np.float64) for name in names} for each in (first, second))
    means = [{name: values.mean(keepdims=True) for name, values in each.items()} for each in (a, b)]
    whole, drawn = [_figures(each) for each in means], [_figures(each) for each in _resampled((a, b), seed, resamples)]
    outside = (1 - LEVEL) / 2
    found = {}
    for name, one in whole[0].items():
        apart = drawn[0][name] - drawn[1][name]
        low, high = np.quantile(apart, (outside, 1 - outside))
        only, p = (None, None), None
        if name in a and all(np.isin(each[name], (0, 1)).all() for each in (a, b)):
            only = int((a[name] > b[name]).sum()), int((b[name] > a[name]).sum())
            p = mcnemar(*only)
        values = float(one[0]), float(whole[1][name][0])
        found[name] = Difference(*values, values[0] - values[1], float(low), float(high), *only, p)
    return found


def _figures(means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The metrics of means by question, each (resamples,): as metrics.of has them."""
    found = {name: values for name, values in means.items() if name not in ("logprob", "words", "bytes")}
    if "logprob" in means and "bytes" in means:
        nats = -means["logprob"]
        found["word_perplexity"] = np.exp(np.minimum(nats / means["words"], 700))
        found["byte_perplexity"] = np.exp(np.minimum(nats / means["bytes"], 700))
        found["bits_per_byte"] = nats / means["bytes"] / math.log(2)
    elif "logprob" in means:
        found["perplexity"] = np.exp(np.minimum(-means["logprob"], 700))
    return found


def _resampled(models: Sequence[Mapping[str, np.ndarray]], seed: int, resamples: int) -> list[dict[str, np.ndarray]]:
    """The means (resamples,) of each model's values over questions drawn with replacement, the same for all."""
    count = len(next(iter(models[0].values()), ()))
    made = [{name: np.empty(resamples) for name in each} for each in models]
    step = max(1, _AT_ONCE // max(1, count))
    for start in range(0, resamples, step) if count else ():
        rows = min(step, resamples - start)
        drawn = rng.integers(seed, "bootstrap", start, count=rows * count, high=count).reshape(rows, count)
        for each, means in zip(models, made, strict=True):
            for name, values in each.items():
                means[name][start : start + rows] = values[drawn].mean(axis=1)
    return made


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p of such discordant counts, or more uneven ones, if each side were as likely: exact, binomial."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    ways = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * ways / 2**total)


def lines(differences: Mapping[str, Difference], task: str, questions: int, names: tuple[str, str]) -> list[str]:
    """A table: each metric of the first and the second, and how far the first is above it."""
    made = [f"{task}: {names[0]} less {names[1]}, {questions} questions, interval of {LEVEL:.0%}"]
    width = max(15, *(len(name) + 2 for name in differences)) if differences else 0
    for name, each in differences.items():
        line = f"  {name:<{width}}{_number(each.first)} - {_number(each.second)} = {_number(each.difference, '+')}"
        line += f"  [{_number(each.low, '+')}, {_number(each.high, '+')}]"
        if each.p is not None:
            line += f"  right alone: {each.only_first} and {each.only_second}, p {each.p:.3g}"
        made.append(line)
    return made


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 1e6 else f"{value:{sign}.4g}"
