"""Reward functions of users' files, in a process of their own: a file that hangs or dies takes no training along."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlxgpt
from mlxgpt.common.errors import UserError

_START = (
    "import sys; sys.path.insert(0, {root!r}); from mlxgpt.common.align.rl import worker; "
    "del sys.path[0]; worker.main()"
)
_LOADING = 60.0  # seconds for a file's own imports


def parse(name: str) -> tuple[str, str]:
    """FILE.py:FUNCTION as (file, function); the function is '' where none is named."""
    path, _, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    return path, function


class Process:
    """The worker; it starts when it is first asked, and again after one that had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._answers = -1

    def ask(self, request: Mapping[str, Any], seconds: float, where: str) -> dict[str, Any]:
        """What the worker answers.

        Raises:
            UserError: the function raised, its process ended, or the time was not enough.
        """
        if self._process is None:
            self._begin()
        end = time.monotonic() + seconds
        line = _read(self._requests, self._answers, (json.dumps(request) + "\n").encode(), seconds)
        if not line.endswith(b"\n"):
            process, late = self._process, time.monotonic() >= end
            assert process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0 if late else 5)
            code = process.poll()
            self.close()
            if code is not None:
                raise UserError(f"{where}: its process ended with exit code {code}")
            raise UserError(
                f"{where}: {seconds:g} s were not enough: expected an answer sooner, or a larger rl.seconds"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"{where}: {answer['error']}")
        return answer

    def _begin(self) -> None:
        theirs, self._requests = os.pipe()
        self._answers, mine = os.pipe()
        code = _START.format(root=str(Path(mlxgpt.__file__).parent.parent))
        command = [sys.executable, "-P", "-B", "-c", code, str(theirs), str(mine)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(theirs, mine), start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        os.close(theirs)
        os.close(mine)
        os.set_blocking(self._requests, False)

    def close(self) -> None:
        """Ends the process and what it started in its session."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self._requests)
        os.close(self._answers)


def _read(requests: int, answers: int, request: bytes, seconds: float) -> bytes:
    """Writes a request and reads a line; what came of it when the time was over, or the other side had closed."""
    end, said = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as ready:
        ready.register(answers, selectors.EVENT_READ)
        if request:
            ready.register(requests, selectors.EVENT_WRITE)
        while not said.endswith(b"\n") and (left := end - time.monotonic()) > 0:
            for key, _ in ready.select(left):
                if key.fd == answers:
                    piece = os.read(answers, 1 << 16)
                    if not piece:
                        return said
                    said += piece
                    continue
                try:
                    request = request[os.write(requests, request) :]
                except BrokenPipeError:
                    request = b""
                if not request:
                    ready.unregister(requests)
    return said


class Function:
    """One function of a file: FILE.py or FILE.py:FUNCTION."""

    def __init__(self, path: str, function: str, process: Process, seconds: float):
        self.path, self.function, self._process, self._seconds = str(Path(path).resolve()), function, process, seconds
        self.where = f"--reward {path}{f':{function}' if function else ''}"
        self._process.ask({"path": self.path, "function": function}, _LOADING, self.where)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> list[float]:
        """The rewards."""
        request = {"path": self.path, "function": self.function, "prompts": prompts, "completions": completions}
        return self._process.ask(request | {"columns": columns}, self._seconds, self.where)["rewards"]
