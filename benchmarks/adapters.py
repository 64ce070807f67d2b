"""The interop matrix of adapters as a Markdown table: ours in PEFT and mlx-lm, theirs here; exit 1 if one is off.

    python -m benchmarks.adapters

A figure is the largest difference of logits on tiny models, relative to the largest logit, at most 1e-5; PEFT must
miss no name and find none that it does not expect. The measurements are the tests' own (tests/interop.py).
"""

import contextlib
import importlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks.parity import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> int:
    """Prints the table; 0 if every figure is within the gate."""
    # the tests' modules are no package, and importing them imports both frameworks
    interop = importlib.import_module("interop")
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    failed = 0
    print(f"{machine()}, peft {version('peft')}, mlx-lm {version('mlx-lm')}\n")
    with tempfile.TemporaryDirectory() as place:
        cells = interop.matrix(Path(place))
        head = True
        while True:
            with contextlib.redirect_stdout(None):  # the comparison says where the worst element is
                found = next(cells, None)
            if found is None:
                break
            name, method, figures = found
            if head:
                print(f"| model | method | {' | '.join(figures)} |\n|---|---|{'---|' * len(figures)}")
                head = False
            failed += sum(not figure <= interop.GATE for figure in figures.values())
            shown = (f"{figure:.1e}" + ("" if figure <= interop.GATE else " **over**") for figure in figures.values())
            print(f"| {name} | {method} | {' | '.join(shown)} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
