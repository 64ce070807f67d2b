"""The report as text: what a user reads, and what is pasted into a bug report."""

from collections.abc import Iterable, Iterator
from typing import Any

from mlxgpt.common.doctor.compare import TITLES
from mlxgpt.common.plan.show import size
from mlxgpt.common.units import short

_NONE = "not readable here"


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The whole report."""
    yield f"mlxgpt doctor {report['mlxgpt']}, {report['date']}{', quick' if report['quick'] else ''}"
    yield from _machine(report["machine"], report["pressure_after"])
    yield from _frameworks(report)
    yield from _ladder(report["ladder"])
    if report["speed"] or report["bandwidth"]:
        yield from _speed(report)
        yield from _bandwidth(report["bandwidth"])
    yield ""
    yield _verdict(report)


def _machine(machine: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    yield "\nmachine"
    rows = [
        ("chip", f"{machine['chip']}, {machine['cores']} cores"),
        ("memory", f"{size(machine['memory'])}, free now {size(machine['memory_free'])}"),
        ("system", f"{machine['system']}, {machine['architecture']}"),
    ]
    if machine["rosetta"] is not None:
        rows.append(("Rosetta", "yes: install an arm64 Python" if machine["rosetta"] else "no"))
    rows.append(("Python", machine["python"]))
    rows += _wrapped("packages", (f"{name} {version}" for name, version in machine["packages"].items()))
    rows += [("graphics", card) for card in machine["graphics"] or ()]
    for key, label in (("thermal", "thermal"), ("memory_pressure", "memory pressure"), ("swap", "swap used")):
        before, now = machine[key], after[key]
        text = before or _NONE
        rows.append((label, text if now in (None, before) else f"{text}; at the end {now}"))
    rows += [("power", machine["power"])] if machine["power"] else []
    rows += _wrapped("variables", (f"{name}={value}" for name, value in machine["variables"].items()))
    yield from (f"  {label:<17} {text}" for label, text in rows)


def _wrapped(label: str, words: Iterable[str], width: int = 60) -> list[tuple[str, str]]:
    """Rows of at most ``width`` characters; the label stands before the first."""
    made = [""]
    for word in words:
        if made[-1] and len(made[-1]) + len(word) + 2 > width:
            made.append("")
        made[-1] += f", {word}" if made[-1] else word
    return [(label if not number else "", text) for number, text in enumerate(made) if text]


def _frameworks(report: dict[str, Any]) -> Iterator[str]:
    yield "\nframeworks"
    for name, facts in report["frameworks"].items():
        parts = [f"{facts['version']} on {facts['device']}"]
        parts += [f"BLAS {facts['blas']}"] if facts.get("blas") else []
        parts += [f"threads {facts['threads']}"] if facts.get("threads") else []
        parts += [f"TF32 {facts['tf32']}"] if facts.get("tf32") else []
        yield from (f"  {label:<17} {text}" for label, text in _wrapped(TITLES[name], parts))
        if facts["chip"] is None and facts["device"] != "cpu":
            yield f"  {'':<17} not in the table of chips: shares of its peak are left out"
    yield from (f"  {'note':<17} {note}" for note in report["notes"])
    for name, why in report["not_here"].items():
        yield f"  {TITLES[name]:<17} not here: {why}"


def _ladder(findings: list[dict[str, Any]]) -> Iterator[str]:
    yield f"\n{'ladder':<12}{'compared':<26}{'found':>9}{'gate':>9}  verdict"
    for one in findings:
        found, gate = ("-" if one[key] is None else f"{one[key]:.1e}" for key in ("value", "gate"))
        where = f"  {one['where']}" if one["verdict"] == "FAILED" and one["where"] else ""
        note = f"  {one['note']}" if one["note"] else ""
        yield f"{one['rung']:<12}{one['compared']:<26}{found:>9}{gate:>9}  {one['verdict']}{where}{note}"


def _speed(report: dict[str, Any]) -> Iterator[str]:
    title = f"{'step speed':<27}{'batch':>9}{'dtype':>10}{'tokens/s':>10}{'TFLOP/s':>9}{'of peak':>9}"
    yield f"\n{title}  verdict"
    for row in report["speed"]:
        name = f"{TITLES[row['framework']]:<8}{row['model']}, {short(row['parameters'])}"
        start = f"{name:<27}{'{rows}x{length}'.format(**row):>9}{row['dtype']:>10}"
        if row["verdict"] == "left out":
            yield f"{start}{'':28}  left out: {row['note']}"
            continue
        share = "-" if row["peak_share"] is None else f"{row['peak_share']:.1%}"
        yield f"{start}{row['tokens_per_second']:>10,.0f}{row['tflops']:>9.3f}{share:>9}  {row['verdict']}"
        memory = f"memory {size(row['memory_predicted'])} predicted, {size(row['memory_measured'])} measured"
        yield f"{'':<8}{memory}"


def _bandwidth(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"\n{'bandwidth':<17}{'array':>10}{'copy':>12}{'triad':>12}{'of peak':>10}  verdict"
    for row in rows:
        start = f"{TITLES[row['framework']]:<17}{row['mib']:>6} MiB"
        if row["verdict"] == "left out":
            yield f"{start}{'':34}  left out: {row['note']}"
            continue
        share = "-" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.0%}"
        yield f"{start}{row['copy']:>7.1f} GB/s{row['triad']:>7.1f} GB/s{share:>10}  {row['verdict']}"


def _verdict(report: dict[str, Any]) -> str:
    words = [one["verdict"] for one in report["ladder"]]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("ok", "FAILED", "not here") if word in words)
    return f"verdict: {report['verdict']} ({counts}), in {report['seconds']:.0f} s"
