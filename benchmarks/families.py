"""Every family against transformers, as Markdown tables; exit 1 if a figure is over its gate or a tensor is not equal.

    python -m benchmarks.families [--only NAME] [--write]

A figure is the largest distance from float64, relative to its largest value, in float32 on the CPU. The measurements
are the tests' own (tests/ladder.py, tests/arriving.py). --write puts them and the list of families
into docs/formats.md.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.parity import machine
from mlxgpt.common.model.family.table import FAMILIES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
START, END = "<!-- benchmarks.families -->", "<!-- end of benchmarks.families -->"
LIST, LIST_END = "<!-- families -->", "<!-- end of families -->"
TOKENS = 64
JUDGED = ("MLX", "torch", "transformers")
OUT = ("written here", *(f"{what}: {who}" for what in ("x1", "x8", "gradients x1", "x8") for who in JUDGED),
       "widest of its gate", "tensors in transformers")  # fmt: skip
IN = ("read here", *JUDGED, "gate", "written back")


def line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def head(cells: tuple[str, ...]) -> list[str]:
    return [line(cells), f"|{'---|' * len(cells)}"]


def listed() -> str:
    """The table of the families, from their rows."""
    return "\n".join([*head(("`model_type`", "what it has of its own")),
                      *(line((name, row.about)) for name, row in FAMILIES.items())])  # fmt: skip


def replaced(page: str, start: str, text: str, end: str) -> str:
    """``page`` with ``text`` between its two marks."""
    before, after = page.split(start)[0], page.split(end)[1]
    return f"{before}{start}\n{text}\n{end}{after}"


def leaving(case: str, config: Any, ladder: Any, place: Path) -> tuple[list[str], bool]:
    """A model of ours, which transformers reads: distances of logits and gradients from float64, at two scales."""
    if config.block_size < TOKENS:
        config = dataclasses.replace(config, block_size=TOKENS)
    cells, widest = {}, 0.0
    for scale in (1.0, 8.0):
        for figure in ladder.compare(case, config, scale, place / f"x{scale:g}"):
            if "float64" in figure.what:
                if figure.what.endswith((", logits", ", gradients")) and "in chunks" not in figure.what:
                    cells[figure.rung, scale, figure.what.split(": ")[1].split(" ")[0]] = f"{figure.value:.1e}"
                widest = max(widest, figure.value / figure.gate)
    order = [(rung, scale, who) for rung in (2, 3) for scale in (1.0, 8.0) for who in JUDGED]
    # hf_probe demands that none is missing, none unexpected
    equal = ladder.same_tensors(config, place / "x1")
    said = f"{equal} equal, 0 missing, 0 unexpected"
    return [case, *(cells[key] for key in order), f"{widest:.2f}", said], widest <= 1


def main() -> int:
    """Prints the tables; 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose name holds this")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/formats.md")
    args = parser.parse_args()

    # the tests' modules are no package, and importing them imports both frameworks
    names = ("ladder", "arriving", "hub", "models")
    ladder, arriving, hub, models = map(importlib.import_module, names)
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    failed = 0
    lines = [f"{datetime.date.today()}, {machine()}.", ""]

    def add(*rows: str) -> None:
        lines.extend(rows)
        print(*rows, sep="\n", flush=True)

    print(lines[0] + "\n")
    add(*head(OUT))
    for case, config in (models.CASES | models.VARIANTS).items():
        if args.only in case:
            with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
                cells, fine = leaving(case, config, ladder, Path(place))
            failed += not fine
            add(line(cells))
    add("", *head(IN))
    theirs = {
        f"{case}, saved by transformers": (
            {"model_type": kind} | (hub.GPT2 if kind == "gpt2" else hub.SIZES) | old,
            False,
        )
        for case, (kind, old, _) in hub.THEIRS.items()
    }
    for case, (values, own) in (theirs | {name: (values, True) for name, values in hub.PUBLISHED.items()}).items():
        if args.only not in case:
            continue
        with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
            place = Path(temporary)
            model = arriving.saved(values, place / "theirs", own)
            if own:
                model = arriving.loaded(place / "theirs")
            arrived = arriving.arrive(case, place / "theirs", model)
            count = arriving.goes_back(place / "theirs", place / "ours", model)
        failed += not arrived.agrees
        figures = [f"{each:.1e}" for each in (arrived.mlx, arrived.torch, arrived.transformers, arrived.gate)]
        add(line([case, *figures, f"{count} equal, 0 missing, 0 unexpected"]))
    if args.write and not args.only:
        page = replaced(PAGE.read_text(encoding="utf-8"), LIST, listed(), LIST_END)
        PAGE.write_text(replaced(page, START, "\n".join(lines), END), encoding="utf-8")
    print(f"\n{failed} over the gate" if failed else "\nevery figure is within its gate")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
