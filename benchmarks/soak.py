"""A long run of MLX and of PyTorch beside each other: does memory stay flat, and does a step stay as fast as it was?

    python -m benchmarks.soak [--minutes 30] [--no-write]

Each is `mlxgpt train` at nanoGPT's CPU size on characters of pydocs, with a validation every 200 steps, a checkpoint
every 100 of which three stay, and in the middle a SIGTERM, after which --resume continues in a new process. Every step
notes its seconds, CPU seconds, resident memory and what the framework counts as allocated. Slopes are Theil and Sen's
over medians of a hundredth of a segment each, with their 95 % interval, after its first tenth.

Exit code 1 where a slope says with confidence that a segment's memory grew by more than 2 %, or its step slowed by more
than 5 %, or the intervals are too wide to say so.
"""

import argparse
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import DOCS, replace_section

SETTINGS = (
    "model.n_layer=4", "model.n_head=4", "model.n_embd=128", "model.block_size=64",
    "train.batch_size=12", "train.eval_every=200", "train.eval_batches=10", "train.save_every=100", "train.keep=3",
    "optim.schedule=constant", "sample.max_tokens=0",
)  # fmt: skip
PACKAGES = {"mlx": "mlxgpt", "torch": "torch_ref"}
FIELDS = ("step", "seconds", "cpu", "active", "rss")
BLOCKS, WARM_UP = 100, 0.1
LIMITS = {"cpu": 0.05, "seconds": 0.05, "active": 0.02, "rss": 0.02}
"""By how much of its level a figure may grow over a segment. Seconds by the clock are only shown."""


class Trend(NamedTuple):
    """A figure over one segment: its median, and its growth from end to end as a share of it, with a 95 % interval."""

    level: float
    growth: float
    low: float
    high: float

    def verdict(self, limit: float) -> str:
        """``flat``, ``grows``, or ``too short to tell``."""
        if self.low > limit:
            return "grows"
        return "flat" if self.high <= limit else "too short to tell"


def trend(values: np.ndarray) -> Trend:
    """Theil and Sen's slope over medians of blocks, after the warm-up; the interval is Sen's."""
    values = values[int(len(values) * WARM_UP) :]
    blocks = np.array([np.median(block) for block in np.array_split(values, min(BLOCKS, len(values))) if len(block)])
    n, level = len(blocks), float(np.median(values))
    i, j = np.triu_indices(n, 1)
    slopes = np.sort((blocks[j] - blocks[i]) / (j - i)) * (n - 1) / level
    half = 1.96 * np.sqrt(n * (n - 1) * (2 * n + 5) / 18) / 2
    middle = len(slopes) / 2
    low, high = (slopes[int(np.clip(at, 0, len(slopes) - 1))] for at in (middle - half, middle + half))
    return Trend(level, float(np.median(slopes)), float(low), float(high))


def resident() -> int:
    """Bytes that are resident now; where only the peak can be had, that."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(backend: str, log: str, words: list[str]) -> int:
    """`mlxgpt train WORDS`, with a line of ``log`` a step."""
    from mlxgpt import cli

    engine = importlib.import_module(f"{PACKAGES[backend]}.engine").Engine
    step = engine.train_step
    with open(log, "a", buffering=1) as file:

        def noting(self: Any, number: int, *rest: Any) -> Any:
            clock, cpu = time.perf_counter(), time.process_time()
            stats = step(self, number, *rest)
            seconds = time.perf_counter() - clock, time.process_time() - cpu
            line = (number, *seconds, self.memory()["active"], resident())
            file.write(json.dumps(line) + "\n")
            return stats

        engine.train_step = noting
        return cli.main(["train", *words, "--backend", backend])


def segments(place: Path, minutes: float) -> dict[str, list[np.ndarray]]:
    """Both frameworks beside each other, twice; framework -> a table (steps, FIELDS) a segment."""
    (place / "recipe.toml").write_text("[model]\n")
    prepare = ["data", "prepare", "pydocs", "--tokenizer", "char", "--out", str(place / "shards")]
    subprocess.run([sys.executable, "-m", "mlxgpt", *prepare], check=True, stdout=subprocess.DEVNULL)
    settings = [word for setting in (*SETTINGS, f"data.source={place / 'shards'}") for word in ("--set", setting)]
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    found: dict[str, list[np.ndarray]] = {backend: [] for backend in PACKAGES}
    for part in (1, 2):
        running = {}
        for backend in PACKAGES:
            run, log = place / backend, place / f"{backend}-{part}.jsonl"
            words = ["--resume", str(run)] if part == 2 else [str(place / "recipe.toml"), "--out", str(run), *settings]
            words += ["--steps", "100000000"] if part == 1 else []
            command = [sys.executable, "-m", "benchmarks.soak", "--child", backend, str(log), *words]
            said = open(place / f"{backend}-{part}.txt", "w")  # noqa: SIM115  (the child's; closed with this process)
            running[backend] = subprocess.Popen(
                command, env=os.environ | threads, stdout=said, stderr=subprocess.STDOUT, text=True
            )
        end = time.monotonic() + minutes * 30
        while time.monotonic() < end:
            for backend, process in running.items():
                if process.poll() is not None:
                    last = (place / f"{backend}-{part}.txt").read_text().splitlines()[-1:]
                    raise SystemExit(f"{backend}: its training ended by itself, exit code {process.returncode}: {last}")
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))
        for backend, process in running.items():
            process.send_signal(signal.SIGTERM)
            if process.wait(300) != 143:
                raise SystemExit(f"{backend}: exit code {process.returncode} after SIGTERM, expected 143")
            lines = (place / f"{backend}-{part}.jsonl").read_text().splitlines()
            found[backend].append(np.array([json.loads(line) for line in lines]))
    return found


def check(place: Path, found: dict[str, list[np.ndarray]]) -> list[str]:
    """What is wrong with the runs themselves: steps that are not all there, checkpoints that retention forgot."""
    from mlxgpt.commands.look import runs as runs_command
    from mlxgpt.common.folders import resolve

    wrong = []
    for backend, parts in found.items():
        steps = np.concatenate([part[:, 0] for part in parts]).astype(int)
        if steps.tolist() != list(range(1, len(steps) + 1)):
            wrong.append(f"{backend}: the steps of both segments are not 1 to {len(steps)}")
        damage, _ = runs_command.find_damage(place / backend)
        wrong += damage
        if len(resolve.steps_of(place / backend)) > 4:  # three, and the best
            wrong.append(f"{backend}: {len(resolve.steps_of(place / backend))} checkpoints, expected at most 4")
    return wrong


def judge(found: dict[str, list[np.ndarray]]) -> tuple[list[list[str]], bool]:
    """A row of the table for each figure of each segment, and whether all that judges is flat."""
    rows, good = [], True
    scale = {"cpu": (1e3, "ms"), "seconds": (1e3, "ms"), "active": (2**-20, "MiB"), "rss": (2**-20, "MiB")}
    for backend, parts in found.items():
        for number, part in enumerate(parts, start=1):
            for name, (factor, unit) in scale.items():
                if backend == "torch" and name == "active":
                    continue  # PyTorch does not count on a CPU
                seen = trend(part[:, FIELDS.index(name)])
                verdict = seen.verdict(LIMITS[name])
                good &= verdict == "flat" or name == "seconds"
                growth = f"{seen.growth:+.2%} ({seen.low:+.2%} to {seen.high:+.2%})"
                what = {"cpu": "CPU a step", "seconds": "clock a step", "active": "allocated", "rss": "resident"}[name]
                rows.append([backend, str(number), f"{len(part):,}", what, f"{seen.level * factor:.4g} {unit}", growth,
                             verdict])  # fmt: skip
    return rows, good


def plot(found: dict[str, list[np.ndarray]], path: Path) -> None:
    """Step time and memory over minutes, both segments; medians of blocks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = (("seconds", "ms a step, by the clock", 1e3), ("cpu", "ms a step, CPU", 1e3), ("rss", "MiB", 2**-20))
    axes = figure.subplots(len(panels), 1, sharex=True)
    for ax, (name, label, factor) in zip(axes, panels, strict=True):
        for color, (backend, parts) in zip(("#0b62a4", "#d1495b"), found.items(), strict=True):
            start = 0.0
            for number, part in enumerate(parts):
                clock = start + np.cumsum(part[:, 1]) / 60
                shown = [(name, "-", "resident" if name == "rss" else "")]
                if name == "rss" and backend == "mlx":
                    shown.append(("active", "--", "allocated"))
                for field, line, what in shown:
                    pieces = np.array_split(np.arange(len(part)), min(300, len(part)))
                    x = [float(clock[piece].mean()) for piece in pieces]
                    y = [float(np.median(part[piece, FIELDS.index(field)])) * factor for piece in pieces]
                    text = " ".join(filter(None, ({"mlx": "MLX", "torch": "PyTorch"}[backend], what)))
                    ax.plot(x, y, line, color=color, linewidth=1, label=text if not number else None)
                start = float(clock[-1])
                if not number:
                    ax.axvline(start, color=color, alpha=0.3, linewidth=1)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.grid(color="#e6e6e6")
        ax.legend(loc="center right", frameon=False, ncols=3)
    axes[-1].set_xlabel("minutes of steps; vertical lines: stopped, and resumed in a new process")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> int:
    """Runs, prints the table and the verdict, and keeps both with the plot in docs/."""
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of both segments together; default: 30")
    parser.add_argument(
        "--no-write", action="store_true", help="leave docs/reliability.md and docs/soak.png as they are"
    )
    args = parser.parse_args()
    from benchmarks.__main__ import describe

    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = segments(Path(folder), args.minutes)
        wrong = check(Path(folder), found)
    rows, good = judge(found)
    head = ["framework", "segment", "steps", "figure", "median", "growth over the segment (95 % interval)", "verdict"]
    lines = [" | ".join(["", *line, ""]).strip() for line in (head, ["---"] * len(head), *rows)]
    good = good and not wrong
    verdict = "flat memory, no drift" if good else "NOT flat, or too short to tell"
    for line in (*lines, *wrong, f"{args.minutes:g} minutes: {verdict}"):
        print(line)
    if not args.no_write:
        plot(found, DOCS / "soak.png")
        body = (
            f"`python -m benchmarks.soak --minutes {args.minutes:g}`: {verdict}.\n\n"
            + "\n".join(lines)
            + "\n\nA validation every 200 steps, a checkpoint every 100 of which three stay, in the middle a SIGTERM\n"
            f"and --resume; both frameworks beside each other, one thread each. {describe()}.\n\n![soak](soak.png)\n"
        )
        page = (DOCS / "reliability.md").read_text(encoding="utf-8")
        (DOCS / "reliability.md").write_text(replace_section(page, "Soak", body, "Memory settings"), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
