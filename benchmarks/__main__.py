"""Every speed and memory figure that the documentation claims, each beside its peer in the same run.

    python -m benchmarks [SECTION ...] [--rounds N] [--no-write]     make bench
    python -m benchmarks --quick                                     make bench-quick: two minutes, writes nothing

Prints a table a section and puts it into docs/benchmarks.md, with the date, versions and machine; sections that were
not run stay as they are. Every contender gets one thread unless OMP_NUM_THREADS says otherwise: a busy neighbor
disturbs more than one.
"""

import argparse
import datetime
import importlib
import inspect
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from benchmarks.report import DOCS, Row, replace_section, table


class Section(NamedTuple):
    """A module under benchmarks/: its heading, the pairs of a full run, and what a quick run asks of it."""

    heading: str
    rounds: int
    quick: str


SECTIONS = {
    "startup": Section("Start-up", 7, "--rounds 1"),
    "tokenizing": Section("Tokenizing", 5, "--rounds 2 --megabytes 2"),
    "train_step": Section("Training step", 7, "--rounds 2 --size tiny --no-compiled --no-installed"),
    "head": Section("Head and loss", 5, "--rounds 2 --frameworks mlx --forms frozen --tokens 512"),
    "decode": Section("Decoding and the first token", 7, "--rounds 1 --tokens 16"),
    "speculate": Section("Drafts", 5, "--rounds 1 --size 1M --tokens 32 --frameworks mlx --cases copy batch"),
    "cache": Section("Key-value cache", 5, "--rounds 1 --tokens 128 --steps 60"),
    "checkpointing": Section("Checkpoints", 5, "--rounds 2 --steps 10 --layers 2"),
    "verify": Section("Verifying", 3, "--rounds 1 --layers 2"),
    "convert": Section("Conversion", 5, "--rounds 1 --megabytes 50 --timed"),
    "lora": Section("Fine-tuning", 9, "--rounds 1 --rows 8"),
    "planning": Section("Planned memory", 1, "--few"),
    "serve": Section("Serving", 5, "--rounds 1 --size 10M --clients 8 --parts load"),
    "quantize": Section(
        "Quantization", 3, "--rounds 1 --models trained --bits 4 --steps 60 --tuning 0 --peers convert"
    ),
    "tasks": Section("Tasks", 5, "--rounds 1 --questions 4 --sets endings --peers mlx_lm"),
    "align": Section("Preferences", 5, "--rounds 1 --methods lora"),
    "page": Section("Report", 5, "--rounds 1 --steps 1000"),
}
APART = {"tasks": ("MLXGPT_LM_EVAL",), "align": ("MLXGPT_TRL", "MLXGPT_MLX_LM_LORA")}
"""Sections whose peers have environments of their own: the variables that name one."""
PACKAGES = ("mlxgpt", "mlx", "torch", "mlx-lm", "peft", "transformers", "tokenizers", "tiktoken", "numpy")
REPORT = DOCS / "benchmarks.md"
NOTES = "Notes"
"""The heading of what is written by hand; sections go before it."""
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def run(name: str, words: list[str]) -> str:
    """The table of one benchmark, from a process of its own, which prints rows or a table that is not of pairs."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *words, "--json"]
    done = subprocess.run(command, env={**THREADS, **os.environ}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
    made = json.loads(done.stdout.splitlines()[-1])
    return made if isinstance(made, str) else table([Row(**row) for row in made])


def installed(package: str) -> str:
    """``package 1.2.3``."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def describe() -> str:
    """When, where and with what the figures were measured."""
    from mlxgpt import blas
    from mlxgpt.common.plan import chips

    library = blas.describe()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{datetime.date.today()}, {platform.system()} {platform.machine()}, {chips.chip_name()}, "
        f"{os.cpu_count()} cores, {memory:.0f} GiB; BLAS of MLX: {library['name']} {library['core']}; "
        f"Python {platform.python_version()}; " + ", ".join(installed(package) for package in PACKAGES)
    )


def about(name: str) -> str:
    """What a module's docstring says beside its usage: the first line and the last paragraph."""
    paragraphs = inspect.cleandoc(importlib.import_module(f"benchmarks.{name}").__doc__ or "").split("\n\n")
    return "\n\n".join(paragraph for paragraph in paragraphs if not paragraph.startswith("    "))


def write(name: str, made: str, seconds: float) -> None:
    """The section's place in docs/benchmarks.md."""
    body = f"{about(name)}\n\n{made}\n\n`python -m benchmarks {name}`, {seconds / 60:.1f} minutes; {describe()}."
    page = REPORT.read_text(encoding="utf-8")
    REPORT.write_text(replace_section(page, SECTIONS[name].heading, body, before=NOTES), encoding="utf-8")


def main() -> None:
    """Runs the sections, prints their tables and writes each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "section", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all; tasks and align: see their --help"
    )
    parser.add_argument("--rounds", type=int, help="pairs of each comparison; default: 3 to 7, by section")
    parser.add_argument("--quick", action="store_true", help="fewest pairs, smallest sizes; writes nothing")
    parser.add_argument("--no-write", action="store_true", help="leave docs/benchmarks.md as it is")
    args = parser.parse_args()
    if unknown := set(args.section) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: expected sections of {', '.join(SECTIONS)}")
    began = time.perf_counter()
    every = [name for name in SECTIONS if any(key in os.environ for key in APART.get(name, os.environ))]
    for name in args.section or every:
        start = time.perf_counter()
        section = SECTIONS[name]
        made = run(name, section.quick.split() if args.quick else ["--rounds", str(args.rounds or section.rounds)])
        seconds = time.perf_counter() - start
        print(f"\n{section.heading}: {seconds:.0f} s\n\n{made}", flush=True)
        if not (args.quick or args.no_write):
            write(name, made, seconds)
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
