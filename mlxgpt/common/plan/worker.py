"""The process that measures: takes jobs from stdin, runs real steps, answers with bytes; ends with its parent."""

import contextlib
import json
import os
import pickle
import queue
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from mlxgpt.common.config import Recipe
from mlxgpt.common.plan import machine


class Job(NamedTuple):
    """Steps to measure: micro-batches of ``rows`` rows of ``length`` tokens; sizes in the code are divided by scale."""

    recipe: Recipe
    rows: int
    length: int
    micro_batches: int
    scale: int
    steps: int


def serve(measure: Callable[[Job], dict[str, int]], limit: Callable[[int], None]) -> None:
    """Answers each pickled Job on stdin with a line of JSON, within ``sys.argv[2]`` bytes; ``limit`` sets the device's.

    An answer is what ``measure`` gives, or {"error": "..."}.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    out, sys.stdout = sys.stdout, sys.stderr
    allowed = int(sys.argv[2])
    cap_address_space(allowed)
    limit(allowed)
    jobs: queue.Queue[Job] = queue.Queue()
    threading.Thread(target=_receive, args=(jobs,), daemon=True).start()
    while True:
        job = jobs.get()
        try:
            answer: dict[str, Any] = measure(job)
        except (RuntimeError, MemoryError, ValueError) as error:  # out of memory is any of these
            answer = {"error": " ".join(str(error).split())[:200] or type(error).__name__}
        print(json.dumps(answer), file=out, flush=True)


def _receive(jobs: "queue.Queue[Job]") -> None:
    """Ends the process, and the compilers that it runs, as soon as nobody is left to answer to."""
    try:
        while True:
            jobs.put(pickle.load(sys.stdin.buffer))
    except (EOFError, pickle.UnpicklingError, OSError):
        with contextlib.suppress(OSError):
            if os.getpgrp() == os.getpid():
                os.killpg(0, signal.SIGKILL)
        os._exit(0)


def cap_address_space(more: int) -> None:
    """Lets the process take ``more`` bytes beyond what it has now, where the system keeps such a limit (Linux)."""
    used = machine.address_space()
    if used is None:
        return
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        asked = used + more
        resource.setrlimit(resource.RLIMIT_AS, (asked if hard == resource.RLIM_INFINITY else min(asked, hard), hard))
