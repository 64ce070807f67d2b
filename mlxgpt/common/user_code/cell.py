"""The process in which one program runs: it gives up what it can, runs the program, and says if it came to the end.

limited.py starts it. Standard input has a JSON object: ``program``, ``memory``, ``file_size``, ``seconds``, and the
numbers of two pipes: ``word``, which has a word, and ``answer``, which gets it back. The word is read behind the
program's last line, so that a program that ends sooner, in whichever way, cannot have it by chance.
"""

import contextlib
import json
import os
import resource
import sys
import threading
import types
from pathlib import Path
from typing import Any

from mlxgpt.common.user_code import guard, kernel

NAME = "program"
MOST = 500  # characters that are told of an exception

# Python's own names for what starts processes or disturbs others, and for what changes files
_PROCESSES = ("os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.exec", "os.kill", "os.killpg",
              "subprocess.Popen", "pty.spawn", "ctypes.dlopen")  # fmt: skip
_CHANGES = ("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
            "os.truncate", "os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree")  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Runs the program of standard input."""
    given: dict[str, Any] = json.load(sys.stdin)
    folder = Path.cwd()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    guard.close_network()
    closed = kernel.close(folder)
    _limit(given, "processes" in closed)
    sys.addaudithook(lambda event, values: _refuse(event, values, folder))
    answer: dict[str, Any] = {"closed": closed}
    with open(given["answer"], "w", encoding="utf-8") as told:
        try:
            _run(given["program"])
            answer["word"] = os.read(given["word"], 64).decode()
        except BaseException as error:
            with contextlib.suppress(BaseException):
                answer["error"] = f"{type(error).__name__}: {error}"[:MOST].rstrip(": ")
        json.dump(answer, told)
    os._exit(0)  # whatever threads and exit handlers it left


def _run(program: str) -> None:
    """In a module of its own, for dataclasses and pickle look for one."""
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module
    exec(compile(program, f"<{NAME}>", "exec", dont_inherit=True), module.__dict__)


def _limit(given: dict[str, Any], threads: bool) -> None:
    """Limits of the system; a system that does not have one goes on without."""
    limits = {
        resource.RLIMIT_CPU: given["seconds"],
        resource.RLIMIT_AS: given["memory"],
        resource.RLIMIT_FSIZE: given["file_size"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if not threads:
        limits[resource.RLIMIT_NPROC] = 0  # on Linux of threads, too; root is above it
    for limit, value in limits.items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (value, value))
    threading.stack_size(1 << 20)


def _refuse(event: str, values: tuple[Any, ...], folder: Path) -> None:
    """What the kernel may not have been told, Python refuses."""
    if event in _PROCESSES:
        raise PermissionError(f"{event}: a program starts and disturbs no processes here")
    if event == "open":
        path, _, flags = values
        writes = isinstance(flags, int) and flags & _WRITING
        if writes and not isinstance(path, int) and not _inside(path, folder):
            raise PermissionError(f"{path!s}: a program writes in its own folder here")
    elif event in _CHANGES and isinstance(values[0], str | bytes | os.PathLike) and not _inside(values[0], folder):
        raise PermissionError(f"{event}: a program changes files in its own folder here")


def _inside(path: Any, folder: Path) -> bool:
    place = os.path.realpath(os.fsdecode(path))
    return place == os.devnull or Path(place).is_relative_to(folder)
