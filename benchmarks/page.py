"""`mlxgpt report` on a run of 10,000 steps, the whole command, beside a plain matplotlib script on the same file.

    python -m benchmarks.page [--rounds 5] [--steps 10000] [--json]

The script reads metrics.jsonl and saves the same five curves as SVG; it makes no page.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.pairs import commands
from benchmarks.report import finish

WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_report import make_run
make_run(Path(sys.argv[1]), int(sys.argv[2]))
"""
SCRIPT = """
import json, sys
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
lines = [json.loads(line) for line in open(sys.argv[1])]
train, val = ([line for line in lines if line["split"] == split] for split in ("train", "val"))
for name in ("loss", "lr", "grad_norm", "seconds", "memory"):
    figure, ax = plt.subplots(figsize=(6.4, 3.0))
    ax.plot([line["step"] for line in train], [line[name] for line in train])
    if name == "loss":
        ax.plot([line["step"] for line in val], [line[name] for line in val], "o")
    figure.savefig(f"{sys.argv[2]}/{name}.svg")
"""


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = f"{place}/run"
        subprocess.run([sys.executable, "-c", WRITE, run, str(args.steps)], check=True)
        ours = [sys.executable, "-m", "mlxgpt", "report", run, "-o", f"{place}/page.html"]
        peer = [sys.executable, "-c", SCRIPT, str(Path(run) / "metrics.jsonl"), place]
        what = f"report of {args.steps:,} steps"
        rows = [commands(what, "a plain matplotlib script", ours, peer, args.rounds, "at most 3 s")]
    finish(rows, args.json)


if __name__ == "__main__":
    main()
