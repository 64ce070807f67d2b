"""The rung tensors: one pair in memory at a time, bit for bit; where dtypes differ, after rounding the wider side."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from convert.formats.opened import Moments, Opened, Tensor
from convert.verify import hints as verify_hints
from convert.verify.report import Checked, Report, Row
from convert.verify.steps import Steps, steps_of


class Change(NamedTuple):
    """What rounds one side to what the other can hold, and the dtype that this gives."""

    dtype: np.dtype
    run: Callable[[np.ndarray], np.ndarray]


@dataclass
class Outcome:
    """What the rungs after this one need to know."""

    finite: bool = True
    equal: bool = True  # every pair, after rounding
    # what takes each side to what both can hold: rounding, by tensor
    rounding: tuple[dict[str, Change], dict[str, Change]] = field(default_factory=lambda: ({}, {}))
    steps: bool = False  # some quantized tensors are within half a step, not equal to a quantization made here
    kinds: set[str] = field(default_factory=set)  # in words, what was rounded to what


@dataclass(frozen=True)
class _Verdict:
    """One pair of equal shape: whether it agrees, in words how, and what each side is rounded by."""

    agrees: bool
    note: str = ""
    rounds: tuple[Change | None, Change | None] = (None, None)
    steps: bool = False


def canonical(array: np.ndarray) -> np.ndarray:
    """Little-endian and contiguous, in our layout."""
    order = array.dtype.newbyteorder("<") if array.dtype.kind in "iuf" else array.dtype
    return np.ascontiguousarray(array, dtype=order)


def sha256(array: np.ndarray) -> str:
    """Of the canonical bytes."""
    flat = canonical(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).hexdigest()


def compare(a: Opened, b: Opened, report: Report) -> Outcome:
    """Holds every tensor of ``a`` against the one of ``b``: a row each in the report, findings where they differ."""
    outcome, steps, hints = Outcome(), (steps_of(a), steps_of(b)), verify_hints.Hints(a, b)
    for name in dict.fromkeys([*a.tensors, *b.tensors]):
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is None or other is None:
            _alone(name, one, other, report)
            outcome.equal = False
            continue
        first, second = one.read(), other.read()
        if not _finite(name, first, second, report):
            outcome.finite = outcome.equal = False
        digests = sha256(first), sha256(second)
        hints.seen(name, digests)
        verdict = _verdict(name, first, second, digests, steps)
        gap = _gap(first, second)
        if not verdict.agrees:
            outcome.equal = False
            hints.differs(name, first, second)
        for side, change in enumerate(verdict.rounds):
            if change:
                outcome.rounding[side][name] = change
        outcome.steps |= verdict.steps
        if verdict.note and verdict.agrees:
            outcome.kinds.add(verdict.note)
        tied = [side for side, opened in (("A", a), ("B", b)) if name == "wte.weight" and opened.config.tied]
        ties = f"the head too (tied) in {' and '.join(tied)}" if tied else ""
        note = ", ".join(filter(None, (verdict.note, _layout(one, other), ties)))
        shapes, dtypes = (one.shape, other.shape), (str(one.dtype), str(other.dtype))
        report.tensors.append(Row(name, shapes, dtypes, gap, digests, verdict.agrees, note))
    hints.report(report)
    return outcome


def compare_moments(a: Moments | None, b: Moments | None, report: Report) -> None:
    """AdamW's state, bit for bit, where both sides have one; one that was left behind is a note."""
    if a is None or b is None:
        if a or b:
            report.notes.append(f"AdamW's moments are in {'A' if a else 'B'} alone")
        return
    if a.t != b.t:
        report.find("tensors", "t", f"AdamW's count of updates: {a.t} | {b.t}")
    for group, one, other in (("m", a.m, b.m), ("v", a.v, b.v)):
        for name in one:
            if name in other and sha256(one[name].read()) != sha256(other[name].read()):
                report.find("tensors", f"{group}.{name}", "AdamW's moment differs")
    report.checked.append(Checked("tensors", f"AdamW's moments of {len(a.m)} tensors, t = {a.t} | {b.t}"))


def _alone(name: str, one: Tensor | None, other: Tensor | None, report: Report) -> None:
    side, there = ("B", one) if other is None else ("A", other)
    assert there
    shapes = (one.shape if one else None, other.shape if other else None)
    dtypes = (str(one.dtype) if one else "", str(other.dtype) if other else "")
    report.tensors.append(Row(name, shapes, dtypes, None, ("", ""), False, f"missing in {side}"))
    report.find("tensors", name, f"missing in {side}; the other side has {list(there.shape)}")


def _finite(name: str, first: np.ndarray, second: np.ndarray, report: Report) -> bool:
    """Counts NaN and Inf, which agree with nothing, not even with themselves."""
    fine = True
    for side, array in (("A", first), ("B", second)):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        if bad:
            report.find("tensors", name, f"{bad} values in {side} are not finite (NaN or Inf)")
            fine = False
    return fine


def _gap(first: np.ndarray, second: np.ndarray) -> float | None:
    """max |d| of arrays of one shape."""
    if first.shape != second.shape:
        return None
    if not first.size:
        return 0.0
    gap = first.astype(np.float32 if first.dtype.itemsize <= 4 else np.float64)
    gap = np.abs(np.subtract(gap, second.astype(gap.dtype), out=gap), out=gap)
    return float(gap.max())


def _layout(one: Tensor, other: Tensor) -> str:
    """Which side's file holds the transpose; our layout is [out, in]."""
    sides = [side for side, tensor in (("A", one), ("B", other)) if tensor.transposed]
    return f"stored as [in, out] in {' and '.join(sides)}" if sides else ""


def _verdict(
    name: str, first: np.ndarray, second: np.ndarray, digests: tuple[str, str], steps: tuple[Steps, Steps]
) -> _Verdict:
    """Whether two arrays are one tensor, up to the rounding that their dtypes and quantizations make."""
    if first.shape != second.shape:
        return _Verdict(False, f"shape {list(first.shape)} | {list(second.shape)}")
    if first.dtype == second.dtype and digests[0] == digests[1]:
        return _Verdict(True)
    if first.dtype == second.dtype and np.array_equal(first, second):
        return _Verdict(True, "equal but for the sign of zeros")
    for side, (values, target) in enumerate(((first, second), (second, first))):
        step = steps[1 - side].get(name)
        if step is None:
            continue
        label, change = "AB"[side], Change(np.dtype(np.float32), step.again)
        if sha256(step.again(values)) == sha256(target):
            return _Verdict(True, f"{label} rounded to {step.kind}", _on(side, change))
        if step.within(values, target):
            return _Verdict(True, f"within half a step of {label} ({step.kind})", _on(side, change), True)
    if first.dtype != second.dtype:
        wide = 0 if first.dtype.itemsize >= second.dtype.itemsize else 1
        for side in (wide, 1 - wide):
            values, target = (first, second) if side == 0 else (second, first)
            if target.dtype.itemsize > values.dtype.itemsize:
                continue
            with np.errstate(over="ignore"):
                same = sha256(values.astype(target.dtype)) == sha256(target)
            if same:
                change = Change(target.dtype, partial(np.ndarray.astype, dtype=target.dtype))
                return _Verdict(True, f"{'AB'[side]} rounded to {target.dtype}", _on(side, change))
    return _Verdict(False)


def _on(side: int, change: Change) -> tuple[Change | None, Change | None]:
    return (change, None) if side == 0 else (None, change)


def rounded(opened: Opened, changes: Mapping[str, Change]) -> Opened:
    """``opened`` with these tensors rounded when they are read, and without what a probe does not need."""

    def lazily(tensor: Tensor, change: Change) -> Tensor:
        return Tensor(tensor.shape, change.dtype, lambda: change.run(tensor.read()))

    tensors = {
        name: lazily(tensor, changes[name]) if name in changes else tensor for name, tensor in opened.tensors.items()
    }
    return dataclasses.replace(opened, tensors=tensors, moments=None)
