"""The report as one page: no script, no other file; readable on a telephone and on paper."""

import html
from pathlib import Path

from convert.verify.report import Report
from convert.verify.text import Section, sections, verdict
from mlxgpt.common.files import atomic_write

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #197a3d; --bad: #c02626; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.verdict { border-left: .4rem solid var(--good); padding: .5rem 1rem; overflow-wrap: anywhere; font-weight: 600; }
.verdict.bad { border-color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
tr.bad td { color: var(--bad); font-weight: 600; }
@media (max-width: 40rem) { body { margin: .5rem auto; padding: 0 .5rem; }
  td { overflow-wrap: anywhere; padding: .2rem .3rem; } }
@media (prefers-color-scheme: dark) { :root { --good: #5fd38d; --bad: #ff8080; } }
@media print { body { margin: 0; max-width: none; font-size: 9pt; }
  .wide { overflow: visible; } tr { break-inside: avoid; } }
"""
_ORDER = ("findings", "not checked", "checked", "numbers", "tensors", "notes")


def write_page(report: Report, path: Path) -> None:
    """Writes the page.

    Raises:
        UserError: the system refuses to write.
    """
    with atomic_write(path) as file:
        file.write(page(report).encode())


def page(report: Report) -> str:
    """The whole document; everything that a file or a library said is escaped."""
    tables = sorted((table for table in sections(report) if table[2]), key=lambda table: _ORDER.index(table[0]))
    title = html.escape(f"verify: {report.a} | {report.b}")
    bad = "" if report.agrees else " bad"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'<p class="verdict{bad}">{html.escape(verdict(report))}</p>\n{"".join(map(_table, tables))}</body>\n</html>\n'
    )


def _table(section: Section) -> str:
    title, head, rows = section
    cells = "".join(f'<th scope="col">{html.escape(word)}</th>' for word in head)
    lines = []
    for row in rows:
        bad = ' class="bad"' if title == "findings" or "NO" in row or row[-1] == "asked for" else ""
        lines.append(f"<tr{bad}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n")
    body = "".join(lines)
    return (
        f'<h2>{html.escape(title)}</h2>\n<div class="wide"><table>\n<thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )
