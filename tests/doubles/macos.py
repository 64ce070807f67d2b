"""macOS for our own code on Linux: what Python lacks there is missing, and what differs there differs.

A module of this repository that imports os, sys, platform, resource, fcntl or signal gets a stand-in: sys.platform is
darwin, functions that only Linux has are missing, ru_maxrss is in bytes, RLIMIT_AS has no effect, F_FULLFSYNC is there.
/proc, /sys, /dev/full and /dev/shm do not exist for it. Libraries, and Python's own, see Linux. No folder may hold two
names that a case-insensitive or normalizing disk takes for one, 256 files may be open, and ``sysctl`` and ``vm_stat``
answer as on an Apple M2 Pro. MLX multiplies with the BLAS of Linux, though blas.py says Accelerate.

    MLXGPT_DOUBLE=macos python -m pytest tests/test_runs.py
"""

import builtins
import errno
import fcntl
import importlib.util
import os
import platform
import resource
import signal
import sys
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

ROOT = str(Path(__file__).parents[2]) + os.sep
BIN = str(Path(__file__).parent / "bin")
HIDDEN = ("/proc", "/sys", "/dev/full", "/dev/shm")
FULL = 51  # fcntl.F_FULLFSYNC
_FILES = 256
_PYTHON = os.path.dirname(os.__file__) + os.sep
# of each module, what Python on macOS does not have
_MISSING = {
    "os": (
        "O_DIRECT", "O_NOATIME", "O_PATH", "O_TMPFILE", "copy_file_range", "eventfd", "fdatasync", "getrandom",
        "getresuid", "getxattr", "listxattr", "memfd_create", "pidfd_open", "pipe2", "posix_fadvise", "posix_fallocate",
        "removexattr", "sched_getaffinity", "sched_setaffinity", "sched_getscheduler", "setns", "setresuid", "setxattr",
        "splice", "unshare",
    ),
    "resource": ("prlimit", "RUSAGE_THREAD", "RLIMIT_NICE", "RLIMIT_SIGPENDING"),
    "signal": ("SIGPOLL", "SIGPWR", "SIGRTMAX", "SIGRTMIN", "SIGSTKFLT", "sigtimedwait", "sigwaitinfo"),
    "fcntl": ("F_SETPIPE_SZ", "F_ADD_SEALS", "F_NOTIFY"),
}  # fmt: skip


class Standin(ModuleType):
    """A module with other values under some names and none under others; what is set is set in the module itself."""

    def __init__(self, real: ModuleType, values: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        own = object.__getattribute__(self, "__dict__")
        own.update(_real=real, _values=values, _missing=_MISSING.get(real.__name__, ()))

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name in own["_values"]:
            return own["_values"][name]
        if name in own["_missing"]:
            raise AttributeError(f"module {own['_real'].__name__!r} has no attribute {name!r}", name=name)
        return getattr(own["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = object.__getattribute__(self, "__dict__")
        if name in own["_values"]:
            own["_values"][name] = value
        else:
            setattr(own["_real"], name, value)

    def __delattr__(self, name: str) -> None:
        own = object.__getattribute__(self, "__dict__")
        if own["_values"].pop(name, None) is None:
            delattr(own["_real"], name)


class MacOS:
    """The double, of this process; it stays until the process ends."""

    def __init__(self) -> None:
        self._made: dict[str, str] = {}
        self._blas = False
        self._temporary = tempfile.gettempdir() + os.sep
        self._import = builtins.__import__
        self._modules = {module.__name__: Standin(module, values) for module, values in self._values().items()}

    def install(self) -> None:
        """What our modules import from now on, and which files they find."""
        builtins.__import__ = self._imported
        for name in ("stat", "lstat", "access"):
            setattr(os, name, self._looked(getattr(os, name), name))
        sys.addaudithook(self._opened)
        os.environ["PATH"] = os.pathsep.join([BIN, *filter(None, [os.environ.get("PATH")])])
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, hard) if hard > 0 else _FILES, hard))

    def _values(self) -> dict[ModuleType, dict[str, Any]]:
        def getrusage(who: int) -> resource.struct_rusage:
            found = list(resource.getrusage(who))
            found[2] *= 1024  # ru_maxrss
            return resource.struct_rusage(found)

        def setrlimit(which: int, limits: tuple[int, int]) -> None:
            if which != resource.RLIMIT_AS:
                resource.setrlimit(which, limits)

        def control(descriptor: Any, command: int, argument: Any = 0) -> Any:
            return os.fsync(descriptor) if command == FULL else fcntl.fcntl(descriptor, command, argument)

        return {
            sys: {"platform": "darwin"},
            os: {},
            signal: {},
            resource: {"getrusage": getrusage, "setrlimit": setrlimit},
            fcntl: {"F_FULLFSYNC": FULL, "fcntl": control},
            platform: {
                "system": lambda: "Darwin", "machine": lambda: "arm64", "processor": lambda: "arm",
                "platform": lambda *args, **words: "macOS-15.5-arm64-arm-64bit", "release": lambda: "24.5.0",
                "mac_ver": lambda *args: ("15.5", ("", "", ""), "arm64"),
            },
        }  # fmt: skip

    def _imported(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """``__import__``, which gives our modules the stand-ins."""
        root = name.partition(".")[0]
        if root == "mlx" and not self._blas:
            self._blas = True
            _load_blas()
        found = self._import(name, globals, locals, fromlist, level)
        if not level and root in self._modules and (not fromlist or name == root):
            names = globals or {}
            place = names.get("__file__") or ""
            if _ours(place) or (not place and names.get("__name__") == "__main__"):  # python -c
                return self._modules[root]
        return found

    def _looked(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **words: Any) -> Any:
            if _hidden(path) and _asked_by_us():
                if name == "access":
                    return False
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return real(path, *args, **words)

        return call

    def _opened(self, event: str, args: tuple[Any, ...]) -> None:
        """Audits what is opened, listed and made."""
        if event in ("open", "os.listdir", "os.scandir"):
            if _hidden(args[0]) and _asked_by_us():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), args[0])
            if event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT:
                self._name(args[0])
        elif event == "os.mkdir":
            self._name(args[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._name(args[1])

    def _name(self, path: Any) -> None:
        """Refuses a name beside one that macOS takes for the same."""
        if isinstance(path, int):
            return
        place = os.path.join(os.getcwd(), os.fsdecode(path))
        if not place.startswith(self._temporary):
            return
        key = unicodedata.normalize("NFD", unicodedata.normalize("NFD", place).casefold())
        before = self._made.setdefault(key, place)
        if before != place and os.path.lexists(before):
            raise AssertionError(f"on macOS {place} is {before}")
        self._made[key] = place


def _load_blas() -> None:
    """As on Linux, whatever the product's module takes this system for."""
    spec = importlib.util.spec_from_file_location("doubles._blas", ROOT + "mlxgpt/blas.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    module.__file__ = __file__  # not ours
    spec.loader.exec_module(module)


def _ours(place: str) -> bool:
    """Whether a file is neither Python's own, nor a library's, nor a double."""
    return (
        bool(place)
        and not place.startswith(("<frozen", ROOT + "tests/doubles/", _PYTHON))
        and "site-packages" not in place
    )


def _hidden(path: Any) -> bool:
    if isinstance(path, int) or path is None:
        return False
    place = os.fsdecode(path)
    return place.startswith("/") and any(place == start or place.startswith(start + "/") for start in HIDDEN)


def _asked_by_us() -> bool:
    """Whether the first caller that is not Python's own is a module of this repository."""
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith(("<frozen", ROOT + "tests/doubles/", _PYTHON)):
        if "site-packages" in frame.f_code.co_filename:
            return False
        frame = frame.f_back
    return frame is not None and _ours(frame.f_code.co_filename)
