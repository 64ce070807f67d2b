"""Metrics of a classifier: the confusion matrix that an engine accumulates, and what follows from it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlxgpt.common.batch import Batch

_KEY = "confusion"


def count(batch: Batch, answers: np.ndarray) -> dict[str, float]:
    """Counts by key ``confusion LABEL ANSWER``; answers (B, T), counted at targets only."""
    asked = batch.weights > 0
    pairs, counts = np.unique(np.stack([batch.targets[asked], answers[asked]]), axis=1, return_counts=True)
    return {f"{_KEY} {label} {answer}": float(n) for (label, answer), n in zip(pairs.T, counts, strict=True)}


def table(sums: Mapping[str, float], n: int) -> np.ndarray:
    """(n, n) confusion matrix: rows are labels, columns answers."""
    made = np.zeros((n, n), np.int64)
    for key, value in sums.items():
        if key.startswith(f"{_KEY} "):
            label, answer = map(int, key.split()[1:])
            made[label, answer] = int(value)
    return made


def figures(sums: Mapping[str, float], n: int) -> dict[str, float]:
    """``accuracy``, and ``macro_f1``: the mean of the labels' F1, 0 for a label that neither occurs nor is answered."""
    counts = table(sums, n)
    right, given, said = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    f1 = 2 * right / np.maximum(given + said, 1)
    return {"accuracy": float(right.sum() / counts.sum()), "macro_f1": float(f1.mean())}


def as_dict(sums: Mapping[str, float], labels: Sequence[str]) -> dict[str, Any]:
    """For --json."""
    counts = table(sums, len(labels))
    return figures(sums, len(labels)) | {"labels": list(labels), "confusion": counts.tolist()}


def lines(sums: Mapping[str, float], labels: Sequence[str], most: int = 20) -> list[str]:
    """The matrix to print, with precision, recall and F1 per label; beyond ``most`` labels without the counts."""
    counts = table(sums, len(labels))
    width = max(7, *(min(len(label), 20) for label in labels)) + 1
    shown = len(labels) <= most
    heads = [f"{label[:20]:>{width}}" for label in labels] if shown else []
    made = [f"{'label':<{width}}" + "".join(heads) + f"{'precision':>11}{'recall':>8}{'F1':>8}"]
    for n, label in enumerate(labels):
        right, given, said = counts[n, n], counts[n].sum(), counts[:, n].sum()
        cells = "".join(f"{value:>{width},}" for value in counts[n]) if shown else ""
        precision, recall, f1 = right / max(said, 1), right / max(given, 1), 2 * right / max(given + said, 1)
        made.append(f"{label[:20]:<{width}}{cells}{precision:>11.3f}{recall:>8.3f}{f1:>8.3f}")
    return made
