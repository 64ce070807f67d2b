"""Fair timings: contenders live in processes of their own and take turns, and ratios are taken round by round.

A contender is a function ``setup(*args) -> run`` in a module under benchmarks/; ``run()`` does one round of work and
returns the units done (tokens, bytes). Its process is ``python -m benchmarks.pairs MODULE FUNCTION [ARG ...]``, which
answers each line on stdin with the seconds and units of one round. Whole commands are measured by ``once``.
"""

import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import Row


@dataclass
class Contender:
    """One process that does rounds on demand; ``env`` is added to ours (BLAS choice, threads)."""

    name: str
    module: str
    function: str
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable
    rates: list[float] = field(default_factory=list)  # units a second
    cpu: list[float] = field(default_factory=list)  # units a second of CPU time, all threads and children
    peak: int = 0

    def start(self) -> None:
        """Starts the process and waits until it is warm."""
        command = [self.python, "-m", "benchmarks.pairs", self.module, self.function, *self.args]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **self.env}
        )
        assert self.process.stdin and self.process.stdout
        self._ask, self._replies = self.process.stdin, self.process.stdout
        self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._replies.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def round(self) -> float:
        """Units a second of one more round."""
        self._ask.write("go\n")
        self._ask.flush()
        answer = self._answer()
        self.peak = int(answer["peak"])
        self.rates.append(answer["units"] / answer["seconds"])
        self.cpu.append(answer["units"] / answer["cpu"])
        return self.rates[-1]

    def stop(self) -> None:
        """Ends the process."""
        self._ask.close()
        self.process.wait()


def race(contenders: list[Contender], rounds: int) -> None:
    """Runs all of them in turn, ``rounds`` times, after one uncounted round each."""
    for contender in contenders:
        contender.start()
    for _ in range(rounds):
        for contender in contenders:
            contender.round()
    for contender in contenders:
        contender.stop()


def row(what: str, against: str, unit: str, ours: Contender, peer: Contender, goal: str = "", of: str = "") -> Row:
    """Two that raced, and their ratios pair by pair: rates; ms a unit where that is the ``unit``; ``of`` "cpu" time."""
    pairs = [(a, b) for a, b in zip(*(side.cpu if of == "cpu" else side.rates for side in (ours, peer)), strict=True)]
    if unit == "ms":
        pairs = [(1000 / a, 1000 / b) for a, b in pairs]
    return _row(what, against, unit, pairs, goal, ours.peak, peer.peak)


def _row(
    what: str, against: str, unit: str, pairs: list[tuple[float, float]], goal: str, memory: int, peer_memory: int
) -> Row:
    ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    return Row(what, against, unit, ours, peer, ratios, goal, memory / 2**20, peer_memory / 2**20)


class Usage(NamedTuple):
    """What a whole process needed: seconds, seconds of CPU time, peak resident bytes."""

    seconds: float
    cpu: float
    peak: int


def once(command: list[str]) -> Usage:
    """Runs a command to its end, which must be a good one."""
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        # spawned, not forked: a child counts the pages of the parent that it was forked from
        process = os.posix_spawn(
            command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, nowhere.fileno(), fd) for fd in (1, 2)]
        )
        _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def commands(
    what: str,
    against: str,
    ours: list[str],
    peer: list[str],
    rounds: int,
    goal: str = "",
    before: Callable[[], object] = lambda: None,
) -> Row:
    """Whole processes in turn, in seconds and MiB, after one uncounted round; ``before`` is called before each."""
    found = []
    for _ in range(rounds + 1):
        pair = []
        for command in (ours, peer):
            before()
            pair.append(once(command))
        found.append(pair)
    seconds = [(a.seconds, b.seconds) for a, b in found[1:]]
    memory = (statistics.median(pair[i].peak for pair in found[1:]) for i in (0, 1))
    return _row(what, against, "s", seconds, goal, *map(int, memory))


def serve(module: str, function: str, *args: str) -> None:
    """The contender's side: warms up once, then one round a line."""
    run = getattr(importlib.import_module(f"benchmarks.{module}"), function)(*args)
    out, sys.stdout = sys.stdout, sys.stderr
    run()
    print("{}", file=out, flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), cpu_time()
        units = run()
        answer = {
            "seconds": time.perf_counter() - start,
            "cpu": cpu_time() - cpu,
            "units": units,
            "peak": peak_memory(),
        }
        print(json.dumps(answer), file=out, flush=True)


def cpu_time() -> float:
    """Seconds of CPU time of this process, its threads and the children that it waited for."""
    return time.process_time() + sum(os.times()[2:4])


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    try:
        # ru_maxrss begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    serve(*sys.argv[1:])
