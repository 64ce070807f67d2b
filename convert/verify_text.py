"""The report on a terminal: tables where there is one, plain lines where not."""

from collections.abc import Sequence
from typing import TextIO

from convert.verify_report import Figure, Report, Row

SHOWN = 40  # tensors in a table; those that differ always


def show(report: Report, out: TextIO) -> None:
    """Writes the report."""
    tables = sections(report)
    if out.isatty():
        _rich(report, tables, out)
        return
    for title, head, rows in tables:
        print(f"\n{title}", file=out)
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        for row in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=out)
    print(f"\n{verdict(report)}", file=out)


def verdict(report: Report) -> str:
    """The last line."""
    if report.agrees:
        return f"agrees: {report.a} | {report.b}"
    missing = sum(item.requested for item in report.not_checked)
    counts = [f"{len(report.findings)} findings"] * bool(report.findings)
    counts += [f"{missing} not checked that were asked for"] * bool(missing)
    return f"does not agree: {report.a} | {report.b}: {', '.join(counts) or 'nothing was checked'}"


Section = tuple[str, list[str], list[list[str]]]


def sections(report: Report, shown: int = SHOWN, every: bool = False) -> list[Section]:
    """(title, head, rows) of every table that has rows; ``every`` activation, or only those that differ."""
    rows = [row for n, row in enumerate(report.tensors) if n < shown or not row.agrees]
    left = len(report.tensors) - len(rows)
    title = "tensors" + (f" ({left} more agree)" if left else "")
    made: list[Section] = [
        (title, ["tensor", "shape", "dtype", "max |d|", "sha256", "agrees", "note"], [_tensor(row) for row in rows]),
        (
            "numbers",
            ["rung", "programs", "what", "max |d|", "gate", "mean |d|", "KL", "top-1", "agrees"],
            [_figure(each) for each in report.figures if every or each.rung != "activations" or not each.agrees],
        ),
        ("checked", ["rung", "what"], [[item.rung, item.what] for item in report.checked]),
        (
            "not checked",
            ["what", "reason", "asked for"],
            [[item.what, item.reason, "yes" if item.requested else "no"] for item in report.not_checked],
        ),
        ("notes", ["note"], [[note] for note in report.notes]),
        ("findings", ["rung", "name", "found"], [[item.rung, item.name, item.message] for item in report.findings]),
    ]
    return [section for section in made if section[2]]


def _tensor(row: Row) -> list[str]:
    one, other = row.shapes
    shape = _list(one) if one == other else f"{_list(one)} | {_list(other)}"
    dtype = row.dtypes[0] if row.dtypes[0] == row.dtypes[1] else " | ".join(name or "-" for name in row.dtypes)
    gap = "-" if row.max_d is None else "0" if row.max_d == 0 else f"{row.max_d:.2e}"
    short = [digest[:8] or "-" for digest in row.sha256]
    digest = short[0] if row.sha256[0] == row.sha256[1] else " | ".join(short)
    return [row.name, shape, dtype, gap, digest, _yes(row.agrees), row.note]


def _figure(figure: Figure) -> list[str]:
    more = ["" if figure.kl is None else f"{figure.kl:.1e}", "" if figure.top1 is None else f"{figure.top1:.1%}"]
    numbers = [f"{figure.value:.2e}", f"{figure.gate:.1e}", f"{figure.mean:.1e}"]
    return [figure.rung, figure.pair, figure.what, *numbers, *more, _yes(figure.agrees)]


def _list(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape))


def _yes(agrees: bool) -> str:
    return "yes" if agrees else "NO"


def _rich(report: Report, tables: list[Section], out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=out)
    for title, head, rows in tables:
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            style = "red" if title == "findings" or "NO" in row[4:] else None
            table.add_row(*map(Text, row), style=style)
        console.print(table)
    console.print(Text(verdict(report), style="green" if report.agrees else "bold red"))
