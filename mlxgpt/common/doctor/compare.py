"""Verdicts: the ladder's arrays of two sides, against gates that have a reason each.

A side is a framework on a device. An accelerator is held against the same framework's CPU and, where both frameworks
are there, against the other's; two CPUs against each other. Figures are a largest difference of the reference's
largest value, by array, unless GATES says otherwise; NaN fails.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mlxgpt.common.doctor.measure import RUNGS

Arrays = Mapping[str, np.ndarray]
TITLES = {"mlx": "MLX", "torch": "PyTorch"}


@dataclass(frozen=True)
class Gate:
    """The largest figure allowed between CPUs, where an accelerator takes part, and where TF32 is on; and why."""

    cpu: float
    accelerator: float
    tf32: float
    why: str


GATES = {
    "logits": Gate(1e-5, 3e-5, 1e-2, "two CPUs are 1e-6 apart, TF32 8e-4 to 1.4e-3"),
    "gradients": Gate(1e-5, 3e-5, 1e-2, "two CPUs are 1e-6 to 3e-6 apart, TF32 1e-3 to 2e-3"),
    "first step": Gate(1e-6, 1e-5, 1e-4, "nats; two CPUs are 1e-7 apart; ten times that of the CPUs' ladder"),
    "training": Gate(1e-5, 1e-4, 1e-3, "nats, of 20 steps; two CPUs are 2e-7 apart; no bias correction: 1e-2"),
    "cache": Gate(1e-5, 3e-5, 1e-2, "a cache adds nothing to the rounding of logits"),
    "lora": Gate(1e-5, 3e-5, 1e-2, "two CPUs are 1e-6 to 3e-6 apart"),
    "quantized": Gate(2e-5, 6e-5, 1e-2, "two CPUs are 1e-6 to 5e-6 apart; a GPU multiplies what is packed"),
}
FLOOR = 10.0  # a gate is also this many times what float32 costs PyTorch's CPU, from its own float64
BF16 = 2.0  # times the reference's own distance of bfloat16 from float32; of two CPUs it is within 1.3
_BF16_WHY = "distance of bfloat16 from the same device's float32 (root mean square), at most twice the reference's"


@dataclass(frozen=True)
class Side:
    """A framework on a device; ``cpu`` is False for an accelerator."""

    framework: str
    cpu: bool

    def __str__(self) -> str:
        return f"{TITLES[self.framework]} {'CPU' if self.cpu else 'GPU'}"


@dataclass(frozen=True)
class Finding:
    """One line of the ladder. ``value`` is None where nothing was compared, and ``note`` says why."""

    rung: str
    compared: str
    value: float | None
    gate: float | None
    where: str = ""
    note: str = ""
    why: str = ""

    @property
    def verdict(self) -> str:
        """``ok``, ``FAILED`` or ``not here``."""
        if self.value is None:
            return "FAILED" if self.gate is not None else "not here"
        return "ok" if self.gate is not None and self.value <= self.gate else "FAILED"

    def described(self) -> dict[str, object]:
        """As JSON has it; a value that is not finite is null."""
        made = {**dataclasses.asdict(self), "verdict": self.verdict}
        return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in made.items()}


def worst(found: np.ndarray, expected: np.ndarray, scale: float | None = None) -> float:
    """max |found - expected| / max |expected|, or / ``scale``; infinite for NaN, Inf and another shape."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return math.inf
    gap = float(np.abs(found - expected).max(initial=0.0))
    return gap / (scale or float(np.abs(expected).max(initial=0.0)) or 1.0)


def problems_of(arrays: Arrays, rung: str) -> dict[str, dict[str, np.ndarray]]:
    """Problem -> its arrays of a rung, by name."""
    made: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        which, problem, rest = name.split("/", 2)
        if which == rung:
            made.setdefault(problem, {})[rest] = array
    return made


def largest(found: Arrays, expected: Arrays, gradients: bool) -> tuple[float, str]:
    """The worst array and its name, of forward or of gradients; a gradient below 1e-7 of all counts as of all's."""
    names = [name for name in expected if name.startswith("gradient.") == gradients]
    missing = [name for name in names if name not in found]
    if missing or not names:
        return math.inf, f"{missing[0]} is missing" if missing else "nothing was computed"
    tops = {name: float(np.abs(expected[name]).max(initial=0.0)) for name in names}
    top = max(tops.values())
    scales = {name: each if each >= 1e-7 * top else top for name, each in tops.items()}
    gaps = {name: worst(found[name], expected[name], scales[name]) for name in names}
    at = max(gaps, key=lambda name: gaps[name])
    return gaps[at], at


def apart(found: Arrays, expected: Arrays) -> float:
    """Root mean square over the arrays of |found - expected| / |expected|, which no single element decides."""
    names = [name for name in expected if name == "logits" or name.startswith("gradient.")]
    if not names or any(name not in found or not np.isfinite(found[name]).all() for name in names):
        return math.inf
    shares = []
    for name in names:
        a, b = np.asarray(found[name], np.float64), np.asarray(expected[name], np.float64)
        shares.append(float(np.sum((a - b) ** 2)) / (float(np.sum(b**2)) or 1.0))
    return math.sqrt(sum(shares) / len(shares))


class Pair:
    """Two sides; ``floors`` are PyTorch's float64 arrays and its CPU's float32, where they are there."""

    def __init__(
        self,
        sides: tuple[Side, Side],
        arrays: tuple[Arrays, Arrays],
        floors: tuple[Arrays, Arrays] | None,
        tf32: bool = False,
    ):
        self.a, self.b = sides
        self.found, self.expected = arrays
        self.floors, self.tf32 = floors, tf32
        self.name = f"{self.a} | {self.b}"

    def gate(self, name: str) -> float:
        """The gate of GATES that holds for these sides."""
        gate = GATES[name]
        plain = gate.cpu if self.a.cpu and self.b.cpu else gate.accelerator
        return max(plain, gate.tf32) if self.tf32 else plain

    def _floor(self, rung: str, problem: str, gradients: bool) -> float:
        if self.floors is None:
            return 0.0
        exact, plain = (problems_of(arrays, rung).get(problem, {}) for arrays in self.floors)
        value = largest(plain, exact, gradients)[0] if exact and plain else 0.0
        return value if math.isfinite(value) else 0.0

    def findings(self) -> Iterator[Finding]:
        """A line a rung."""
        for rung in RUNGS:
            source = "logits" if rung == "gradients" else rung
            theirs, ours = problems_of(self.expected, source), problems_of(self.found, source)
            broken = _broken(rung, self.name, (self.a, ours), (self.b, theirs))
            if broken:
                yield broken
            elif not theirs:
                yield Finding(rung, self.name, None, 0.0, note="nothing was computed: the process ended")
            else:
                yield _worst([one for problem in theirs for one in self.compare(rung, problem, ours, theirs)])

    def compare(
        self, rung: str, problem: str, ours: Mapping[str, Arrays], theirs: Mapping[str, Arrays]
    ) -> Iterator[Finding]:
        """Every figure of one rung and problem."""
        found, expected = ours.get(problem, {}), theirs[problem]

        def finding(gate: str, value: float, limit: float, where: str = "", why: str = "") -> Finding:
            return Finding(
                rung, self.name, value, limit, f"{problem}: {where}".rstrip(": "), why=why or GATES[gate].why
            )

        if rung in ("logits", "gradients", "lora", "quantized"):
            for gradients in (False, True):
                if rung not in ("logits", "gradients") or gradients == (rung == "gradients"):
                    value, where = largest(found, expected, gradients)
                    source = "logits" if rung == "gradients" else rung
                    limit = max(self.gate(rung), FLOOR * self._floor(source, problem, gradients))
                    yield finding(rung, value, limit, where)
        elif rung == "training":
            losses = found.get("losses", np.zeros(0)), expected["losses"]
            first, whole = (worst(*(each[:n] for each in losses), scale=1.0) for n in (1, None))
            yield finding("first step", first, self.gate("first step"), "step 1")
            yield finding("training", whole, self.gate("training"), f"{len(expected['losses'])} steps")
        elif rung == "cache":
            value = worst(found.get("with", np.zeros(0)), found.get("without", np.ones(1)))
            yield finding("cache", value, self.gate("cache"), f"{self.a}, with a cache and without")
            yield finding("cache", *self._greedy(found, expected))
        else:
            plain = [problems_of(arrays, "logits").get(problem, {}) for arrays in (self.found, self.expected)]
            ours_apart, theirs_apart = apart(found, plain[0]), apart(expected, plain[1])
            yield finding(rung, ours_apart, BF16 * theirs_apart, why=_BF16_WHY)

    def _greedy(self, found: Arrays, expected: Arrays) -> tuple[float, float, str]:
        """The margin of the first token that differs, as large as twice the gate of logits, or 0."""
        limit = 2 * self.gate("logits")
        if "tokens" not in found or len(found["tokens"]) != len(expected["tokens"]):
            return math.inf, limit, "tokens drawn greedily: another number of them"
        value = tie(found["tokens"], expected["tokens"], found["margins"], expected["margins"])
        return value, limit, "tokens drawn greedily, margin of the first that differs"


def tie(a: np.ndarray, b: np.ndarray, margins_a: np.ndarray, margins_b: np.ndarray) -> float:
    """0 where the tokens are the same; else the larger margin where they first differ: by how much it is no tie."""
    different = np.flatnonzero(a != b)
    if not different.size:
        return 0.0
    return float(max(margins_a[different[0]], margins_b[different[0]]))


def _worst(found: list[Finding]) -> Finding:
    """The one nearest to its gate, or farthest above."""
    return max(found, key=lambda one: math.inf if one.value is None else one.value / (one.gate or 1e-30))


def _broken(rung: str, name: str, *sides: tuple[Side, Mapping[str, Arrays]]) -> Finding | None:
    """A failed finding where a side said why it has no arrays."""
    for side, problems in sides:
        for problem, arrays in problems.items():
            if "error" in arrays:
                return Finding(rung, name, None, 0.0, f"{problem}: {side}", note=str(arrays["error"]))
    return None


def alone(side: Side, arrays: Arrays, exact: Arrays) -> Iterator[Finding]:
    """A CPU without a second framework: its cache against itself; PyTorch's also against its own float64."""
    pair = Pair((side, side), (arrays, exact), None)
    for rung in RUNGS:
        source = "logits" if rung == "gradients" else rung
        ours = problems_of(arrays, source)
        theirs = ours if rung == "cache" else problems_of(exact, source)
        name = f"{side} | itself" if rung == "cache" else f"{side} | its float64"
        if broken := _broken(rung, name, (side, ours)):
            yield broken
        elif theirs:
            found = [one for problem in theirs for one in pair.compare(rung, problem, ours, theirs)]
            yield dataclasses.replace(_worst(found), compared=name)
        else:
            yield Finding(rung, str(side), None, None, note="no accelerator and no second framework to compare with")
