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
from types import ModuleType
from typing import Any, NamedTuple

from mlxgpt.common import failures
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.plan import machine


class Job(NamedTuple):
    """Steps to measure: micro-batches of ``rows`` rows of ``length`` tokens; sizes in the code are divided by scale."""

    recipe: Recipe
    rows: int
    length: int
    micro_batches: int
    scale: int
    steps: int


def serve(measure: Callable[[Job], dict[str, int]], limit: Callable[[int], None], devices: ModuleType) -> None:
    """Tells what the device ``sys.argv[1]`` is, then takes a pickled number of bytes, its limit, and pickled Jobs.

    Everything is on stdin and stdout, an answer a line of JSON: first {"device", "cpu", "capacity"} or {"refused":
    "..."}; to the limit none; to a Job what ``measure`` gives, or {"error": "..."}. ``limit`` sets the device's limit.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    out, sys.stdout = sys.stdout, sys.stderr
    messages: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_receive, args=(messages,), daemon=True).start()
    print(json.dumps(introduce(sys.argv[1], devices)), file=out, flush=True)
    allowed = messages.get()
    cap_address_space(allowed)
    limit(allowed)
    while True:
        job = messages.get()
        try:
            answer: dict[str, Any] = measure(job)
        except (RuntimeError, MemoryError, ValueError) as error:  # out of memory is any of these
            known = failures.meaning(error)  # which also removes a kernel that was not written whole
            answer = {"error": known.line if known else " ".join(str(error).split())[:200] or type(error).__name__}
        print(json.dumps(answer), file=out, flush=True)


def introduce(name: str, devices: ModuleType) -> dict[str, Any]:
    """What the device of ``--device name`` is, by a framework's module ``device``."""
    try:
        device = devices.find(name)
    except UserError as error:
        return {"refused": str(error)}
    described = devices.describe(device)["device"]
    return {"device": described, "cpu": described == "cpu", "capacity": devices.capacity(device)}


def _receive(messages: "queue.Queue[Any]") -> None:
    """Ends the process as soon as nobody is left to answer to."""
    try:
        while True:
            messages.put(pickle.load(sys.stdin.buffer))
    except (EOFError, pickle.UnpicklingError, OSError):
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
