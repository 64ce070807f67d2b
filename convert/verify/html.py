"""The report as one page: no script, no other file; readable on a telephone and on paper."""

from pathlib import Path

from convert.verify.report import Report
from convert.verify.text import sections, verdict
from mlxgpt.common.files import atomic_write

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
    import jinja2  # which a conversion does not need

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        title=f"verify: {report.a} | {report.b}",
        agrees=report.agrees,
        verdict=verdict(report),
        tables=sorted((table for table in sections(report) if table[2]), key=lambda table: _ORDER.index(table[0])),
    )
