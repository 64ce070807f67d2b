"""Answers against references: exact match, BLEU and chrF (Papineni 2002, Popovic 2015), ROUGE-L (Lin 2004)."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from mlxgpt.common.errors import UserError

NEEDS = {"exact": None, "bleu": "sacrebleu", "chrf": "sacrebleu", "rouge_l": "rouge_score"}
"""Metric -> the package that computes it."""


def check_packages(names: Sequence[str]) -> None:
    """Raises UserError if the package of a metric is not installed."""
    for name in names:
        package = NEEDS[name]
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"tune.metrics: {name} needs {package}: pip install 'mlxgpt[metrics]'")


def score(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Each metric over all answers: exact and rouge_l from 0 to 1, bleu and chrf from 0 to 100; more is better."""
    return {name: _METRICS[name](answers, references) for name in names}


def _exact(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that equal the reference, up to white space at the ends."""
    return sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True)) / len(references)


def _bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Of the whole corpus, with sacrebleu's defaults (13a tokens, exponential smoothing)."""
    import sacrebleu

    return sacrebleu.corpus_bleu(list(answers), [list(references)]).score


def _chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of the whole corpus."""
    import sacrebleu

    return sacrebleu.corpus_chrf(list(answers), [list(references)]).score


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def _rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """The mean F1 of the longest common subsequence of words."""
    found = [_rouge().score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    return float(sum(found) / len(found))


_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact": _exact,
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
}
