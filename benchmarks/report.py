"""The one form of a result: a row a comparison, printed as a table or as JSON for ``python -m benchmarks``."""

import json
import statistics
from dataclasses import asdict, dataclass


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

    @property
    def median(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def lower_quartile(self) -> float:
        """The lower quartile of the ratios: what a claim may rest on."""
        return statistics.quantiles(self.ratios, n=4, method="inclusive")[0] if len(self.ratios) > 1 else self.ratios[0]

    def cells(self) -> list[str]:
        """What the table shows."""
        figures = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in (self.ours, self.peer)]
        ratios = [f"{value:.2f}" for value in (self.lower_quartile, self.median)]
        return [self.what, self.against, self.unit, *figures, *ratios, str(len(self.ratios)), self.goal]


HEADER = ["what", "against", "unit", "ours", "peer", "ratio, lower quartile", "median", "pairs", "goal"]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, aligned for a terminal."""
    cells = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def finish(rows: list[Row], as_json: bool) -> None:
    """Prints the rows, as every benchmark does at its end."""
    print(json.dumps([asdict(row) for row in rows]) if as_json else table(rows))
