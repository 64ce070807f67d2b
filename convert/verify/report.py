"""What ``verify`` found: figures with their gates, findings, what was checked and what was not, and why."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RUNGS = ("tensors", "config", "tokenizer", "logits", "activations", "gradients", "greedy")
ON_FILES = ("tensors", "config", "tokenizer")


@dataclass(frozen=True)
class Finding:
    """A difference. ``name`` is the tensor, field, text or pair of programs that it is about."""

    rung: str
    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.rung}: {self.name}: {self.message}"


@dataclass(frozen=True)
class Checked:
    """What was compared and agrees or not, in words."""

    rung: str
    what: str


@dataclass(frozen=True)
class NotChecked:
    """What was not compared, and why; ``requested``: it should have been, so there is no agreement."""

    what: str
    reason: str
    requested: bool


@dataclass(frozen=True)
class Figure:
    """One comparison of numbers: the largest difference, relative to the reference's largest value, and its gate."""

    rung: str
    pair: str
    what: str
    value: float
    gate: float
    mean: float = 0.0
    kl: float | None = None
    top1: float | None = None
    where: str = ""

    @property
    def agrees(self) -> bool:
        """At most the gate; what is not finite agrees with nothing."""
        return math.isfinite(self.gate) and self.value <= self.gate


@dataclass(frozen=True)
class Row:
    """One tensor on both sides; None where a side does not have it. ``sha256`` of shape-less little-endian bytes."""

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str, str]
    max_d: float | None
    sha256: tuple[str, str]
    agrees: bool
    note: str = ""


@dataclass
class Report:
    """The outcome. ``agrees`` only if every requested rung ran and found nothing.

    report = verify("out/ckpt.pt", "model")
    report.agrees, report.findings, report.to_json()
    """

    a: str
    b: str
    findings: list[Finding] = field(default_factory=list)
    checked: list[Checked] = field(default_factory=list)
    not_checked: list[NotChecked] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    demanded: frozenset[str] = frozenset()  # rungs that were asked for by name

    @property
    def agrees(self) -> bool:
        """Whether everything that was asked for ran, and found no difference."""
        return bool(self.checked) and not self.findings and not any(item.requested for item in self.not_checked)

    def find(self, rung: str, name: str, message: str) -> None:
        """Adds a finding."""
        self.findings.append(Finding(rung, name, message))

    def skip(self, what: str, reason: str, requested: bool) -> None:
        """Adds what was not checked, once."""
        item = NotChecked(what, reason, requested)
        if item not in self.not_checked:
            self.not_checked.append(item)

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become None."""
        figures = [asdict(figure) | {"agrees": figure.agrees} for figure in self.figures]
        made = {
            "agrees": self.agrees,
            "a": self.a,
            "b": self.b,
            "findings": [asdict(item) for item in self.findings],
            "checked": [asdict(item) for item in self.checked],
            "not_checked": [asdict(item) for item in self.not_checked],
            "notes": self.notes,
            "figures": figures,
            "tensors": [asdict(row) for row in self.tensors],
        }
        plain: dict[str, Any] = _plain(made)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def worst(found: np.ndarray, expected: np.ndarray, scale: float | None = None) -> tuple[float, float, str]:
    """max and mean |found - expected| / scale, where scale is max |expected| unless given; and where, with both values.

    NaN or Inf on either side, or another shape, gives infinity: a broken array agrees with nothing.
    """
    if found.shape != expected.shape:
        return math.inf, math.inf, f"shape {list(found.shape)}, expected {list(expected.shape)}"
    a, b = found.astype(np.float64), expected.astype(np.float64)
    bad = [int(np.count_nonzero(~np.isfinite(array))) for array in (a, b)]
    if any(bad):
        return math.inf, math.inf, f"{bad[0]} and {bad[1]} values are not finite"
    if not a.size:
        return 0.0, 0.0, ""
    gap = np.abs(a - b)
    at = np.unravel_index(int(gap.argmax()), gap.shape)
    scale = float(np.abs(b).max()) if scale is None else scale
    scale = scale or 1.0
    where = f"at {[int(i) for i in at]}: {a[at]:.9g} | {b[at]:.9g}"
    return float(gap[at] / scale), float(gap.mean() / scale), where
