"""How long ``mlxgpt --help`` takes and how much memory it needs, beside mlx-lm's commands.

    python -m benchmarks.startup [--rounds 9] [--json]

Whole commands, from their start to their end, with warm files.
"""

import argparse
import sys

from benchmarks.pairs import commands
from benchmarks.report import finish

OURS = [sys.executable, "-m", "mlxgpt", "--help"]
PEER = [sys.executable, "-m", "mlx_lm", "generate", "--help"]


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    goal = "at most 0.15 s, 40 MB"
    finish([commands("mlxgpt --help", "mlx_lm.generate --help", OURS, PEER, args.rounds, goal)], args.json)


if __name__ == "__main__":
    main()
