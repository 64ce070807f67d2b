"""The figures of a report by matplotlib: as SVG for the page and as PNG, from the same drawing.

A curve with more points than pixels is drawn as the mean of each bin, over a band from its minimum to its maximum.
"""

import functools
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.runs.summary import Run

COLORS = ("#0b62a4", "#d1495b", "#2e8b57", "#8f5fbf", "#c77d0a", "#3aa6b9", "#7a4b2a", "#555555")
"""By run, in the order given, and again from the start."""
BINS = 600
_SIZE = (5.4, 2.8)  # inches; small, so that text stays readable on a phone
_WIDE = (6.4, 3.0)  # of the loss, which takes the page's width
_MIB = 2.0**20
_ALIGNED = {
    "rewards": ("Rewards", "of chosen and rejected answers", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    "accuracies": ("Accuracy", "share of pairs whose chosen answer has the higher reward", ("rewards/accuracies",)),
    "logps": ("Log-probabilities", "of whole answers", ("logps/chosen", "logps/rejected")),
    "kl": ("Divergence", "from the model that the run began with, estimated", ("kl",)),
    "reward": ("Reward", "mean of a rollout's completions, and their deviation", ("reward", "reward_std")),
    "completions": ("Length", "tokens of a completion, mean of a rollout", ("completions/mean_length",)),
    "shares": (
        "Shares",
        "of completions cut at rl.max_tokens, groups of equal rewards, tokens whose ratio was clipped",
        ("completions/clipped_ratio", "frac_reward_zero_std", "clip_ratio/region_mean"),
    ),
    "likelihood": ("Likelihood and odds", "of chosen answers", ("nll_loss", "log_odds_chosen", "log_odds_ratio")),
}
"""What preferences and rewards measure: figure -> title, note and metrics."""


class Figure(NamedTuple):
    """One figure: a name for files, a title, a note and the SVG element."""

    name: str
    title: str
    note: str
    svg: str


class Curve(NamedTuple):
    """A binned curve: centers, means, minima and maxima of the bins."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def colored(runs: list[Run]) -> list[tuple[str, Run]]:
    """Each run with its color."""
    return list(zip(itertools.cycle(COLORS), runs, strict=False))


def curve(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> Curve:
    """The finite points of (x, y) in at most ``bins`` bins of equal count."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= bins:
        return Curve(x, y, y, y)
    edges = np.linspace(0, len(x), bins + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return Curve(
        np.add.reduceat(x, edges) / counts,
        np.add.reduceat(y, edges) / counts,
        np.minimum.reduceat(y, edges),
        np.maximum.reduceat(y, edges),
    )


def differences(first: Run, other: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps that both runs have, and the distance of their training losses there."""
    steps, here, there = np.intersect1d(first.train["step"], other.train["step"], return_indices=True)
    if not len(steps):
        return steps, steps
    return steps, np.abs(first.train["loss"][here] - other.train["loss"][there])


def tokens_per_second(run: Run) -> np.ndarray:
    """By line of the training columns; NaN where the step before is missing."""
    tokens, seconds = run.train["tokens"], run.train["seconds"]
    before = 0.0 if run.train["step"][:1] == [1.0] else np.nan
    return np.diff(tokens, prepend=before) / np.where(seconds > 0, seconds, np.nan)


def draw(runs: list[Run], export: Path | None = None) -> list[Figure]:
    """Every figure that the runs have numbers for; with ``export`` also NAME.png there.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed: pip install 'mlxgpt[report]'") from None
    matplotlib.use("Agg")
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "mlxgpt", "font.size": 10, "font.family": "sans-serif",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
        "axes.edgecolor": "#999999", "lines.linewidth": 1.4, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a log scale with nothing on it, and the like
        return list(_figures(runs, export))


def _figures(runs: list[Run], export: Path | None) -> Iterator[Figure]:
    from matplotlib.figure import Figure as Canvas

    def figure(
        name: str, title: str, note: str, panels: list[Callable[[Any], None]], ratios: tuple[int, ...] = (1,),
        size: tuple[float, float] = _SIZE,
    ) -> Figure:  # fmt: skip
        canvas = Canvas(figsize=(size[0], size[1] * (1 + 0.6 * (len(panels) - 1))), layout="constrained")
        axes = canvas.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            panel(ax)
        axes[-1].set_xlabel("step")
        if export:
            canvas.savefig(export / f"{name}.png", dpi=150)
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
        return Figure(name, title, note, _own_ids(svg, name))

    panels, note = [lambda ax: _losses(ax, runs)], "lines: training; dots: validation"
    if in_bits(runs):
        note += "; bits a byte, since the vocabularies differ"
    elif len(runs) > 1 and any(len(differences(runs[0], run)[0]) for run in runs[1:]):
        panels.append(lambda ax: _differences(ax, runs))
        note += f"; below: distance of the training loss from {runs[0].name}"
    yield figure("loss", "Loss", note, panels, (5, 3)[: len(panels)], _WIDE)
    yield figure("learning_rate", "Learning rate", "", [lambda ax: _lines(ax, runs, "lr")])
    yield figure(
        "gradient_norm", "Gradient norm", "before clipping", [lambda ax: _lines(ax, runs, "grad_norm", log=True)]
    )
    yield figure("tokens_per_second", "Tokens per second", "", [lambda ax: _lines(ax, runs, tokens_per_second, True)])
    if any("memory" in run.train for run in runs):
        scaled = [
            lambda ax: _lines(ax, runs, lambda run: run.train.get("memory", run.train["step"] * np.nan) / _MIB, True)
        ]
        yield figure("memory", "Memory", "MiB, peak since the start", scaled)
    for name, (title, said, metrics) in _ALIGNED.items():
        columns = [column for column in metrics if any(column in {**run.train, **run.val} for run in runs)]
        if columns:
            note = f"{said}; dots: validation"
            yield figure(name, title, note, [functools.partial(_several, runs=runs, columns=columns)])
    for task, names in tasks(runs).items():
        panels = [functools.partial(_task, runs=runs, task=task, names=group) for group in names]
        file = f"task_{re.sub(r'[^A-Za-z0-9_]', '_', task)}"
        yield figure(file, f"Task {task}", "at each validation", panels, (1,) * len(panels))


def tasks(runs: list[Run]) -> dict[str, list[list[str]]]:
    """Task -> its metrics in groups that fit on one axis: shares together, every other alone."""
    found: dict[str, list[list[str]]] = {}
    for column in dict.fromkeys(name for run in runs for name in run.val if name.startswith("tasks/")):
        task, _, metric = column.removeprefix("tasks/").rpartition("/")
        groups = found.setdefault(task, [[]])
        values = np.concatenate([run.val[column] for run in runs if column in run.val])
        share = not metric.endswith(("perplexity", "bits_per_byte")) and np.nanmax(values, initial=0) <= 1
        groups[0].append(metric) if share else groups.append([metric])
    return {task: [group for group in groups if group] for task, groups in found.items()}


def _several(ax: Any, runs: list[Run], columns: list[str]) -> None:
    """Metrics in training and, as dots, at validations. Colors are runs, dashes are metrics."""
    for dashes, column in zip(itertools.cycle(("-", "--", ":", "-.")), columns, strict=False):
        for number, (color, run) in enumerate(colored(runs)):
            line = curve(run.train["step"], run.train.get(column, run.train["step"] * np.nan))
            ax.plot(line.x, line.mean, dashes, color=color, label=None if number else column.rpartition("/")[2])
            if column in run.val:
                ax.plot(run.val["step"], run.val[column], "o", color=color, markersize=3, markeredgecolor="white")
    if len(columns) > 1:
        ax.legend(loc="best", fontsize=8)


def _task(ax: Any, runs: list[Run], task: str, names: list[str]) -> None:
    """Colors are runs, dashes are metrics."""
    for dashes, metric in zip(itertools.cycle(("-", "--", ":", "-.")), names, strict=False):
        for number, (color, run) in enumerate(colored(runs)):
            values = run.val.get(f"tasks/{task}/{metric}", run.val["step"] * np.nan)
            label = metric if number == 0 else None
            ax.plot(run.val["step"], values, dashes, color=color, marker="o", markersize=3, label=label)
    ax.set_ylabel(names[0] if len(names) == 1 else "share")
    if len(names) > 1:
        ax.legend(loc="best", fontsize=8)


def _own_ids(svg: str, name: str) -> str:
    """The SVG with ids that are unique in the page, since references resolve to the first match."""
    for mark in ('id="', 'xlink:href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}{name}-")
    return svg


def in_bits(runs: list[Run]) -> bool:
    """Whether losses are compared in bits a byte: nats a token of different vocabularies cannot be."""
    sizes = {run.recipe.get("model", {}).get("vocab_size") for run in runs}
    return len(sizes) > 1 and all(np.isfinite(run.bits_a_byte) for run in runs)


def _losses(ax: Any, runs: list[Run]) -> None:
    bits = in_bits(runs)
    for color, run in colored(runs):
        scale = run.bits_a_byte if bits else 1.0
        line = curve(run.train["step"], scale * run.train.get("loss", run.train["step"] * np.nan))
        ax.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, linewidth=0)
        ax.plot(line.x, line.mean, color=color, label=run.name)
        if len(run.val["step"]):
            ax.plot(run.val["step"], scale * run.val["loss"], "o", color=color, markersize=4, markeredgecolor="white")
    ax.set_ylabel("loss" if any(run.aligned for run in runs) else "bits a byte" if bits else "nats a token")
    if len(runs) > 1 and any(len(run.train["step"]) for run in runs):
        ax.legend(loc="upper right")


def _differences(ax: Any, runs: list[Run]) -> None:
    for color, run in colored(runs)[1:]:
        steps, apart = differences(runs[0], run)
        line = curve(steps, np.where(apart > 0, apart, np.nan))
        ax.plot(line.x, line.high, color=color)
    ax.set_yscale("log")
    ax.set_ylabel("|difference|")


def label_log(ax: Any) -> None:
    """Labels a logarithmic axis as densely as there is room: all digits, 2 and 5, or powers of ten alone."""
    from matplotlib.ticker import LogLocator

    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}" if high < 100 * low else "")
    if high > 4 * low:
        ax.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))


def _lines(
    ax: Any, runs: list[Run], what: str | Callable[[Run], np.ndarray], from_zero: bool = False, log: bool = False
) -> None:
    for color, run in colored(runs):
        if not len(run.train["step"]):
            continue
        values = run.train.get(what) if isinstance(what, str) else what(run)
        if values is None:
            continue
        line = curve(run.train["step"], values)
        ax.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, linewidth=0)
        ax.plot(line.x, line.mean, color=color)
    if log and any((run.train.get(str(what), np.array([0.0])) > 0).any() for run in runs):
        ax.set_yscale("log")
        label_log(ax)
    if from_zero:
        ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
