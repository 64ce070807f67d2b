"""Fair timings: contenders live in processes of their own and take turns, and ratios are taken round by round.

A contender is a function ``setup(*args) -> run`` in a module under benchmarks/; ``run()`` does one round of work and
returns the units done (tokens, bytes). Its process is ``python -m benchmarks.pairs MODULE FUNCTION [ARG ...]``, which
answers each line on stdin with the seconds and units of one round.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

from benchmarks.report import Row


@dataclass
class Contender:
    """One process that does rounds on demand; ``env`` is added to ours (BLAS choice, threads)."""

    name: str
    module: str
    function: str
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    peak: int = 0

    def start(self) -> None:
        """Starts the process and waits until it is warm."""
        command = [sys.executable, "-m", "benchmarks.pairs", self.module, self.function, *self.args]
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


def row(what: str, against: str, unit: str, ours: Contender, peer: Contender, goal: str = "") -> Row:
    """Rates of two that raced, and their ratios pair by pair."""
    ratios = [a / b for a, b in zip(ours.rates, peer.rates, strict=True)]
    return Row(what, against, unit, statistics.median(ours.rates), statistics.median(peer.rates), ratios, goal)


def serve(module: str, function: str, *args: str) -> None:
    """The contender's side: warms up once, then one round a line."""
    run = getattr(importlib.import_module(f"benchmarks.{module}"), function)(*args)
    out, sys.stdout = sys.stdout, sys.stderr
    run()
    print("{}", file=out, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        units = run()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "units": units, "peak": peak_memory()}), file=out, flush=True)


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    serve(*sys.argv[1:])
