"""Programs that nobody has read, each in a process with little time and memory, no network and an empty folder.

What a system offers is taken: docs/evaluate.md says what each one lets pass. It is meant for programs that models
write, which fail in every way but seldom mean harm; it is no virtual machine.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlxgpt
from mlxgpt.common.errors import UserError

_START = (
    "import sys; sys.path.insert(0, {root!r}); from mlxgpt.common.user_code import cell; del sys.path[0]; cell.main()"
)
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
_LONGEST = 1 << 16  # bytes of an answer


@dataclass(frozen=True)
class Limits:
    """Of one program."""

    seconds: int = 5  # of a processor
    clock: int = 15  # seconds by the clock
    memory: int = 1 << 30  # bytes of addresses
    file_size: int = 1 << 24  # bytes of a file that it writes


@dataclass(frozen=True)
class Ended:
    """What became of a program."""

    passed: bool  # it came to the end of its last line
    why: str = ""  # if not: an exception, the time, a signal
    closed: tuple[str, ...] = ()  # what the kernel keeps it from: files, processes


def run(program: str, limits: Limits = Limits()) -> Ended:
    """Runs a program; whatever it does, its process is gone afterwards and so is its folder."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as name:
        folder = os.path.realpath(name)
        word_out, word_in = os.pipe()
        answer_out, answer_in = os.pipe()
        os.write(word_in, word.encode())
        os.close(word_in)
        request = {"program": program, "memory": limits.memory, "file_size": limits.file_size}
        request |= {"seconds": limits.seconds, "word": word_out, "answer": answer_in}
        command = [sys.executable, "-P", "-s", "-B", "-c", _START.format(root=str(Path(mlxgpt.__file__).parent.parent))]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
            pass_fds=(word_out, answer_in),
            start_new_session=True,
        )
        os.close(word_out)
        os.close(answer_in)
        said = bytearray()
        reader = threading.Thread(target=_read, args=(answer_out, said), daemon=True)
        reader.start()
        try:
            late = _give(process, json.dumps(request).encode(), limits.clock)
        finally:
            _end(process)
            reader.join(5)
        return _judged(bytes(said), word, process.returncode, late, limits)


def _give(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bool:
    """Hands the request over and waits for the end; True if that did not come in time."""
    try:
        process.communicate(request, timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _read(pipe: int, said: bytearray) -> None:
    """All that comes, of which only the first bytes are kept."""
    with open(pipe, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while piece := file.read(_LONGEST):
            said += piece[: _LONGEST - len(said)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it started in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _judged(said: bytes, word: str, code: int, late: bool, limits: Limits) -> Ended:
    try:
        answer: dict[str, Any] = json.loads(said)
    except ValueError:
        answer = {}
    closed = tuple(answer.get("closed", ()))
    if answer.get("word") == word:
        return Ended(True, "", closed)
    if answer.get("error"):
        return Ended(False, str(answer["error"]), closed)
    if late:
        return Ended(False, f"{limits.clock} s by the clock were not enough", closed)
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return Ended(False, f"{limits.seconds} s of a processor were not enough", closed)
    died = f"ended by {signal.Signals(-code).name}" if code < 0 else "ended before its last line"
    return Ended(False, died, closed)


def run_all(
    programs: Sequence[str],
    limits: Limits = Limits(),
    say: Callable[[str], None] = lambda text: None,
) -> list[Ended]:
    """``run`` of each, in their order, as many at a time as there are processors.

    Raises:
        UserError: not even an empty program comes to its end here.
    """
    check()
    ended: list[Ended] = []
    began = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for each in pool.map(lambda program: run(program, limits), programs):
            ended.append(each)
            if time.perf_counter() - began > 0.5:
                began = time.perf_counter()
                say(f"ran {len(ended)} of {len(programs)} programs")
    return ended


def check() -> tuple[str, ...]:
    """What the kernel keeps programs from, here: files, processes.

    Raises:
        UserError: no program comes to its end here, so that all would count as wrong.
    """
    tried = run("assert 1 + 1 == 2")
    if not tried.passed:
        raise UserError(f"--run-code: {sys.executable} runs no program here: {tried.why}")
    return tried.closed
