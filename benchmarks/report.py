"""The one form of a result: a row a comparison, printed as a table or as JSON; and the page that keeps the tables."""

import json
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


@dataclass
class Row:
    """One figure of ours beside the peer's, and their ratios pair by pair."""

    what: str
    against: str
    unit: str
    ours: float
    peer: float
    ratios: list[float]  # ours / peer, a pair each
    goal: str = ""
    memory: float = 0.0  # MiB, the peak of our process; 0: not measured
    peer_memory: float = 0.0

    @property
    def median(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def worse_quartile(self) -> float:
        """The quartile of the ratios that speaks against us: what a claim may rest on."""
        if len(self.ratios) == 1:
            return self.ratios[0]
        lower, _, upper = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return upper if self.unit in ("s", "ms", "MiB") else lower

    def cells(self) -> list[str]:
        """What the table shows."""
        figures = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in (self.ours, self.peer)]
        ratios = [f"{value:.2f}" for value in (self.worse_quartile, self.median)]
        memory = [f"{value:,.0f}" if value else "" for value in (self.memory, self.peer_memory)]
        return [self.what, self.against, self.unit, *figures, *ratios, str(len(self.ratios)), *memory, self.goal]


HEADER = ["what", "against", "unit", "ours", "peer", "ratio, worse quartile", "median", "pairs", "MiB, ours", "peer's",
          "goal"]  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, aligned for a terminal."""
    cells = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def replace_section(page: str, heading: str, body: str, before: str = "") -> str:
    """The Markdown page with ``body`` under ``## heading``; a new one goes before the heading ``before``, or last."""
    made = f"## {heading}\n\n{body.strip()}\n"
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    title = [part.partition("\n")[0].removeprefix("## ") for part in parts]
    if heading in title:
        parts[title.index(heading)] = made
    else:
        parts.insert(title.index(before) if before in title else len(parts), made)
    return "\n".join(part.strip() + "\n" for part in parts if part.strip())


def finish(rows: list[Row], as_json: bool) -> None:
    """Prints the rows, as every benchmark does at its end."""
    print(json.dumps([asdict(row) for row in rows]) if as_json else table(rows))
