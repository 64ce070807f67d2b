"""The report on a terminal: tables of 80 columns, in which what repeats is said once and long names are folded."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

from convert.verify.report import Figure, Report, Row

SHOWN = 40  # tensors in a table; those that differ always
_WIDTH = 80
_SCREEN = 24  # lines
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}

Section = tuple[str, list[str], list[list[str]]]
"""A table: title, head, rows. A row with the cell NO is a difference."""


def show(report: Report, out: TextIO) -> None:
    """Writes the report: verdict, findings, tables; on a terminal in color, with long lines wrapped.

    Where it is longer than a screen, the verdict stands below it again.
    """
    red, green, plain = ("\033[31m", "\033[32m", "\033[0m") if out.isatty() else ("", "", "")
    width = shutil.get_terminal_size().columns if out.isatty() else 0
    told = f"{green if report.agrees else red}{verdict(report)}{plain}"
    *others, findings = sections(report)[2:]
    lines = [told, *_listed(findings, width, red, plain)]
    tensors, footnotes = _tensors(report)
    for (title, head, rows), below in [(tensors, footnotes), *((table, []) for table in _numbers(report))]:
        if not rows:
            continue
        lines += ["", title]
        for row, text in zip([head, *rows], _aligned([head, *rows]), strict=True):
            lines.append(f"{red}{text}{plain}" if "NO" in row else text)
        lines += below
    for section in others:
        lines += _listed(section, width)
    if len(lines) > _SCREEN:
        lines += ["", told]
    print("\n".join(lines), file=out)


def _listed(section: Section, width: int, color: str = "", plain: str = "") -> list[str]:
    """A section as lines; none without rows."""
    title, _, rows = section
    lines = ["", title] if rows else []
    for row in rows:
        line = ": ".join(row)
        text = textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False) if width else line
        lines.append(f"{color}{text}{plain}")
    return lines


def verdict(report: Report) -> str:
    """The first line."""
    if report.agrees:
        return f"agrees: {report.a} | {report.b}"
    missing = sum(item.requested for item in report.not_checked)
    counts = [f"{len(report.findings)} findings"] * bool(report.findings)
    counts += [f"{missing} not checked that were asked for"] * bool(missing)
    return f"does not agree: {report.a} | {report.b}: {', '.join(counts) or 'nothing was checked'}"


def sections(report: Report) -> list[Section]:
    """Every table, whole; some have no rows."""
    tensors = ["tensor", "shape", "dtype", "max |d|", "sha256", "agrees", "note"]
    numbers = ["rung", "programs", "what", "max |d|", "gate", "mean |d|", "KL", "top-1", "agrees"]
    asked = {True: "asked for", False: "not asked for"}
    return [
        ("tensors", tensors, [_tensor(row, 8) for row in report.tensors]),
        ("numbers", numbers, [[each.rung, each.pair, *_figure(each)] for each in report.figures]),
        ("checked", ["rung", "what"], [[item.rung, item.what] for item in report.checked]),
        (
            "not checked",
            ["what", "reason", "asked for"],
            [[item.what, item.reason, asked[item.requested]] for item in report.not_checked],
        ),
        ("notes", ["note"], [[note] for note in report.notes]),
        ("findings", ["rung", "name", "found"], [[item.rung, item.name, item.message] for item in report.findings]),
    ]


def _tensors(report: Report) -> tuple[Section, list[str]]:
    """The first tensors and all that differ; what is to be said of them, by number, to stand below."""
    shown = [row for n, row in enumerate(report.tensors) if n < SHOWN or not row.agrees]
    notes = {note: f"({n})" for n, note in enumerate(dict.fromkeys(row.note for row in shown if row.note), start=1)}
    rows = [[*_tensor(row, 6)[:6], notes.get(row.note, "")] for row in shown]
    left = len(report.tensors) - len(shown)
    title = f"tensors ({left} more agree)" if left else "tensors"
    head = ["tensor", "shape", "dtype", "max |d|", "sha256", "ok", ""]
    return (title, head, rows), [f"{number} {note}" for note, number in notes.items()]


def _numbers(report: Report) -> list[Section]:
    """A table a pair of programs; of activations only those that differ."""
    head = ["rung", "what", "max |d|", "gate", "mean", "KL", "top-1", "ok"]
    shown = [each for each in report.figures if each.rung != "activations" or not each.agrees]
    return [
        (f"numbers, {pair}", head, [[each.rung, *_figure(each)] for each in shown if each.pair == pair])
        for pair in dict.fromkeys(each.pair for each in shown)
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    """The rows of a table as text, its widest column folded where all would take more than 80 columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widest = widths.index(max(widths))
    widths[widest] = max(16, min(widths[widest], _WIDTH - sum(widths) + widths[widest] - len(widths) + 1))
    made = []
    for row in rows:
        size = widths[widest]
        pieces = [row[widest][start : start + size] for start in range(0, len(row[widest]) or 1, size)]
        lines = [[*row[:widest], pieces[0], *row[widest + 1 :]]]
        lines += [["" if n != widest else piece for n in range(len(row))] for piece in pieces[1:]]
        text = [" ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        made.append("\n".join(line.rstrip() for line in text))
    return made


def _tensor(row: Row, digits: int) -> list[str]:
    """The cells of one tensor; ``digits`` of a sha256 where there are two."""
    gap = "-" if row.max_d is None else "0" if row.max_d == 0 else f"{row.max_d:.1e}"
    one, other = row.sha256
    digest = one[:8] if one == other else f"{one[:digits] or '-'}|{other[:digits] or '-'}"
    shape = "|".join(dict.fromkeys(_list(shape) for shape in row.shapes))
    dtype = "|".join(dict.fromkeys(_SHORT.get(name, name) or "-" for name in row.dtypes))
    return [row.name, shape, dtype, gap, digest, _yes(row.agrees), row.note]


def _figure(figure: Figure) -> list[str]:
    more = ["" if figure.kl is None else f"{figure.kl:.1e}", "" if figure.top1 is None else f"{figure.top1:.1%}"]
    numbers = [f"{figure.value:.1e}", f"{figure.gate:.1e}", f"{figure.mean:.1e}"]
    return [figure.what, *numbers, *more, _yes(figure.agrees)]


def _list(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape))


def _yes(agrees: bool) -> str:
    return "yes" if agrees else "NO"
