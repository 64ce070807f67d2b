"""The rungs that run the models: logits, activations, gradients, greedy tokens; compared between programs.

A figure is a largest difference, relative to the reference's largest value. The gate is ``max(1e-5, 4 * floor)``, where
the floor is what float32 costs torch against its own float64 on the same weights (docs/parity.md).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.adopt.evidence import log_softmax
from convert.verify.processes import GREEDY, Runs
from convert.verify.report import Checked, Figure, Report, worst
from mlxgpt.common.inference.probe import SCALES, spell

GATE = 1e-5
NO_GATE = 1e-2  # a floor above this is rounding alone: nothing can be said
# a trained model at x8: the same weights in MLX and torch were 5 floors apart where the worst floor was 2.4e-3
NO_GRADIENTS = 1e-3
SHOWN = 5  # findings a rung and pair


@dataclass(frozen=True)
class Pair:
    """A's arrays by one program and B's by another."""

    name: str
    a: Any
    b: Any


def pairs(runs: Runs, programs: tuple[list[str], list[str]], keys: tuple[str, str]) -> Iterator[Pair]:
    """Each program against itself, and then the first against the last: that is the proof that is not trivial."""
    there = [[by for by in programs[side] if (by, keys[side]) in runs.arrays] for side in (0, 1)]
    chosen = [(by, by) for by in there[0] if by in there[1]]
    if not chosen:
        chosen = [(one, other) for one in there[0] for other in there[1]]
    elif len(there[0]) > 1 and len(there[1]) > 1:
        chosen.append((there[0][0], there[1][-1]))
    for one, other in chosen:
        yield Pair(f"A in {one} | B in {other}", runs.arrays[one, keys[0]], runs.arrays[other, keys[1]])


class Floors:
    """What float32 costs torch, by array, 0 where torch did not run; and the gates above that.

    A user's class has tables of angles of its own, mostly in float32: ``angles`` is what that costs its embeddings, by
    scale. Logits were off by 3 times it and gradients by 6 in mlx-examples' transformer_lm with 2 blocks: gates are at
    least 10 times. With such a table for rope, llama2.c's class was 7 floors off at x8: gates there are ``wide`` times.
    """

    def __init__(self, runs: Runs, key: str):
        self.angles: Mapping[str, float] = {}
        self.wide = 1.0
        self._exact, self._plain = runs.exact, runs.arrays.get(("torch", key))

    def gate(self, name: str, floor: float) -> float:
        """The gate of an array, such as logits.x8, above its floor."""
        scale = name.split(".")[1]
        return max(GATE, 4 * floor * (1.0 if scale == "x1" else self.wide), 10 * self.angles.get(scale, 0.0))

    @property
    def measured(self) -> bool:
        """Whether there is a floor."""
        return self._exact is not None and self._plain is not None

    def of(self, name: str, scale: float | None = None) -> float:
        """The floor of one array, relative to its largest value or to ``scale``."""
        if self._exact is None or self._plain is None or name not in self._exact:
            return 0.0
        return worst(self._plain[name], self._exact[name], scale)[0]


def compare_logits(pair: Pair, floors: Floors, report: Report, least: float = 0.0) -> None:
    """Logits at every scale. ``least`` is a gate for weights that are quantized otherwise than here, at x1."""
    scales = [scale for scale in SCALES if f"logits.{spell(scale)}" in pair.a]
    for scale in scales:
        name = f"logits.{spell(scale)}"
        floor = floors.of(name)
        if floor > NO_GATE:
            report.skip(f"{name}: {pair.name}", f"float32 alone moves torch's by {floor:.1e}", scale == 1)
            continue
        figure = _logits(pair, spell(scale), max(floors.gate(name, floor), least), pair.a[name], pair.b[name])
        report.figures.append(figure)
        if not figure.agrees:
            report.find(
                "logits", pair.name, f"{figure.what}: {figure.value:.2e} (gate {figure.gate:.1e}), {figure.where}"
            )
    report.checked.append(Checked("logits", f"{pair.name}, {' and '.join(map(spell, scales))}"))


def _logits(pair: Pair, what: str, gate: float, a: np.ndarray, b: np.ndarray) -> Figure:
    value, mean, where = worst(b, a)
    kl = top1 = None
    if math.isfinite(value):
        p, q = log_softmax(a), log_softmax(b)
        kl = float((np.exp(p) * (p - q)).sum(axis=-1).mean())
        top1 = float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())
    return Figure("logits", pair.name, what, value, gate, mean, kl, top1, where)


def compare_activations(pair: Pair, floors: Floors, report: Report) -> None:
    """The residual stream after every block; a finding names the first place where it diverges."""
    count = 0
    for scale in SCALES:
        prefix = f"hidden.{spell(scale)}."
        if f"logits.{spell(scale)}" not in pair.a:
            continue
        names = [name for name in pair.a if name.startswith(prefix) and name in pair.b]
        if not names:
            report.skip(f"activations: {pair.name}", "the library does not give them", "activations" in report.demanded)
            return
        first = None
        for name in names:
            floor = floors.of(name)
            what = f"{spell(scale)} {name.removeprefix(prefix)}"
            if floor > NO_GATE:
                moved = f"float32 alone moves torch's by {floor:.1e}"
                report.skip(f"activations {what}: {pair.name}", moved, "activations" in report.demanded and scale == 1)
                continue
            count += 1
            value, mean, where = worst(pair.b[name], pair.a[name])
            figure = Figure("activations", pair.name, what, value, floors.gate(name, floor), mean, where=where)
            report.figures.append(figure)
            first = first or (None if figure.agrees else figure)
        if first:
            place = first.what.split()[1]
            said = f"{pair.name}, {spell(scale)}: first to diverge, {first.value:.2e} (gate {first.gate:.1e})"
            report.find("activations", place, said)
    report.checked.append(Checked("activations", f"{pair.name}, {count} places at {' and '.join(map(spell, SCALES))}"))


def compare_gradients(pair: Pair, floors: Floors, report: Report) -> None:
    """Every gradient by name, of its own largest value; where that is rounding alone, of the largest of all."""
    names: list[str] = []
    for scale in SCALES:
        prefix = f"gradient.{spell(scale)}."
        names = [name for name in pair.a if name.startswith(prefix)]
        others = {name for name in pair.b if name.startswith(prefix)}
        if not names or not others:
            report.skip(f"gradients: {pair.name}", "the library does not give them", "gradients" in report.demanded)
            return
        for name in sorted(set(names) ^ others):
            report.find("gradients", name.removeprefix(prefix), f"{pair.name}: only one side has it")
        figures, floor = _gradients(pair, [name for name in names if name in others], prefix, floors)
        if floor > NO_GRADIENTS and scale != 1:
            report.skip(f"gradients {spell(scale)}: {pair.name}", f"float32 alone moves torch's by {floor:.1e}", False)
            continue
        report.figures += sorted(figures, key=lambda figure: figure.gate - figure.value)[:1]
        wrong = sorted((figure for figure in figures if not figure.agrees), key=lambda figure: -figure.value)
        for figure in wrong[:SHOWN]:
            said = f"{pair.name}, {spell(scale)}: {figure.value:.2e} (gate {figure.gate:.1e})"
            report.find("gradients", figure.what.split()[1], said)
        if len(wrong) > SHOWN:
            report.find("gradients", pair.name, f"{spell(scale)}: {len(wrong)} of {len(names)} differ, the worst above")
    report.checked.append(
        Checked("gradients", f"{pair.name}, {len(names)} by name at {' and '.join(map(spell, SCALES))}")
    )


def _gradients(pair: Pair, names: list[str], prefix: str, floors: Floors) -> tuple[list[Figure], float]:
    """A figure for each name, and the floor of them all: the worst, since one sample of rounding says little."""
    tops = {name: float(np.abs(pair.a[name]).max(initial=0.0)) for name in names}
    largest = max((top for top in tops.values() if math.isfinite(top)), default=1.0) or 1.0
    scales = {name: top if top >= 1e-7 * largest else largest for name, top in tops.items()}
    found = {name: floors.of(name, scale) for name, scale in scales.items()}
    scales |= {name: largest for name, floor in found.items() if floor > NO_GATE}
    floor = max((each for each in found.values() if each <= NO_GATE), default=0.0)
    figures = []
    for name in names:
        value, mean, where = worst(pair.b[name], pair.a[name], scales[name])
        what = f"{prefix.split('.')[1]} {name.removeprefix(prefix)}"
        figures.append(Figure("gradients", pair.name, what, value, floors.gate(name, floor), mean, where=where))
    return figures, floor


def compare_greedy(pair: Pair, floors: Floors, report: Report) -> None:
    """Tokens decoded with a cache; a first difference where the two likeliest are within the gate is a tie."""
    if "greedy.tokens" not in pair.a or "greedy.tokens" not in pair.b:
        report.skip(f"greedy: {pair.name}", "no tokens came", True)
        return
    a, b = pair.a["greedy.tokens"], pair.b["greedy.tokens"]
    count = min(len(a), len(b))
    different = np.flatnonzero(a[:count] != b[:count])
    what = f"{pair.name}, {count} tokens"
    if different.size:
        at = int(different[0])
        margin = max(float(side["greedy.margins"][at]) for side in (pair.a, pair.b))
        gate = floors.gate("logits.x1", floors.of("logits.x1"))
        if margin > gate:
            said = f"token {at + 1} of {count}: {a[at]} | {b[at]}, by {margin:.1e} of the largest logit"
            report.find("greedy", pair.name, said)
        else:
            what = f"{pair.name}, {at} tokens"
            report.notes.append(f"greedy, {pair.name}: token {at + 1} is a tie within {gate:.1e}; what follows differs")
    elif len(a) != len(b):
        report.find("greedy", pair.name, f"{len(a)} | {len(b)} tokens")
    if count < GREEDY:
        note = f"greedy: {count} tokens, as many as the context holds"
        if note not in report.notes:
            report.notes.append(note)
    report.checked.append(Checked("greedy", what))
