"""Every speed and memory figure that the documentation claims, each beside its peer in the same run.

    python -m benchmarks [--rounds 9] [--only NAME ...] [--no-write]

Prints one table and writes it to docs/benchmarks.md with the date, versions and machine. Every contender gets one
thread unless OMP_NUM_THREADS says otherwise: a busy neighbour disturbs more than one.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.report import Row, table

SUITE = ("startup", "tokenizing", "train_step", "head", "decode", "planning")
PACKAGES = ("mlxgpt", "mlx", "torch", "mlx-lm", "transformers", "tokenizers", "tiktoken", "numpy")
REPORT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def run(name: str, rounds: int) -> list[Row]:
    """The rows of one benchmark, from a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds", str(rounds), "--json"]
    done = subprocess.run(command, env={**THREADS, **os.environ}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def installed(package: str) -> str:
    """``package 1.2.3``."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def describe() -> str:
    """Where and with what the figures were measured."""
    from mlxgpt import blas
    from mlxgpt.common import chips

    library = blas.describe()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{datetime.date.today()}, {platform.system()} {platform.machine()}, {chips.name()}, {os.cpu_count()} cores, "
        f"{memory:.0f} GiB; BLAS of MLX: {library['name']} {library['core']}; Python {platform.python_version()}; "
        + ", ".join(installed(package) for package in PACKAGES)
    )


def main() -> None:
    """Runs the suite, prints its table and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="pairs of each comparison")
    parser.add_argument("--only", nargs="+", choices=SUITE, metavar="NAME", help=", ".join(SUITE))
    parser.add_argument("--no-write", action="store_true", help="leave docs/benchmarks.md as it is")
    args = parser.parse_args()
    rows = []
    for name in args.only or SUITE:
        start = time.perf_counter()
        rows += run(name, args.rounds)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(table(rows))
    if not args.no_write and not args.only:
        REPORT.write_text(
            "# Benchmarks\n\nWritten by `make bench`. A ratio is ours / peer, taken pair by pair as both take turns; "
            "where less is better\n(seconds, memory), so is a smaller ratio. Nothing here was measured on Metal.\n\n"
            f"{describe()}\n\n{table(rows)}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
