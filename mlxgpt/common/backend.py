"""The framework half of a command: mlxgpt or torch_ref, imported by name, for this package may import neither."""

import contextlib
import importlib
import importlib.util
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from mlxgpt.common.errors import UserError

PACKAGES = {"mlx": "mlxgpt", "torch": "torch_ref"}
_INSTALL = {"mlx": "pip install mlx (on Linux: 'mlx[cpu]')", "torch": "pip install 'mlxgpt[torch]'"}
_ROSETTA = "this Python is x86-64, translated by Rosetta; MLX needs an arm64 one, from python.org or Homebrew"


@dataclass(frozen=True)
class Backend:
    """One framework's modules; both frameworks' have the same functions and classes."""

    name: str
    engine: ModuleType
    load: ModuleType
    generate: ModuleType
    footprint: ModuleType
    batching: ModuleType
    scoring: ModuleType
    calibrate: ModuleType


def resolve(name: str | None, device: str | None = None) -> str:
    """``mlx`` or ``torch``: as asked, else MLX where it runs, else torch; which must have ``device``, if given.

    Raises:
        UserError: the one asked for does not import here, or neither does; it does not have the device.
    """
    reasons = []
    for candidate in PACKAGES if name is None else [name]:
        reason = _broken(candidate)
        if not reason:
            if _ROSETTA in reasons:
                print(f"mlxgpt: warning: {_ROSETTA}", file=sys.stderr)
            if device is not None:
                importlib.import_module(f"{PACKAGES[candidate]}.device").find(device)
            return candidate
        reasons.append(reason)
    raise UserError(f"--backend {name or 'mlx or torch'}: {'; '.join(reasons)}")


def presumed(name: str | None) -> str:
    """What ``resolve`` is likely to say, at once: the one asked for, else the first that is installed."""
    return name or next((each for each in PACKAGES if importlib.util.find_spec(each)), "mlx")


def load(name: str | None) -> Backend:
    """The modules of a backend; ``name`` as in ``resolve``."""
    name = resolve(name)
    parts = ("engine", "load", "generate", "footprint", "batching", "scoring", "calibrate")
    return Backend(name, *(importlib.import_module(f"{PACKAGES[name]}.{part}") for part in parts))


@contextlib.contextmanager
def without_signals() -> Iterator[None]:
    """Threads and processes that begin in the block never receive Ctrl-C and SIGTERM, nor do processes they start.

    A terminal sends Ctrl-C to every process of a command, so also to a compiler; killed, it takes a step with it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def device(name: str) -> tuple[str, str]:
    """What ``auto`` is: the environment's MLXGPT_DEVICE, else ``auto``; and what to call it in an error."""
    name = str(name)  # torch.device is one, too
    chosen = os.environ.get("MLXGPT_DEVICE", "") if name == "auto" else ""
    return (chosen, f"MLXGPT_DEVICE={chosen}") if chosen else (name, f"--device {name}")


# They change the bits of a CPU's products while kernels and threads read the same.
_PRODUCTS = ("MKL_ENABLE_INSTRUCTIONS", "OMP_DYNAMIC", "OMP_THREAD_LIMIT")


def variables() -> list[str]:
    """NAME=VALUE of what is set of _PRODUCTS, for the environment key."""
    return [f"{name}={os.environ[name]}" for name in _PRODUCTS if name in os.environ]


def _broken(name: str) -> str:
    """Why a framework cannot be used here and what to do, or ''."""
    if importlib.util.find_spec(name) is None:
        return _ROSETTA if name == "mlx" and translated() else f"not installed: {_INSTALL[name]}"
    try:
        # the device module imports the framework, and before MLX its BLAS; a signal amid that would leave half a module
        with without_signals():
            importlib.import_module(f"{PACKAGES[name]}.device")
    except ImportError as error:
        return f"does not import ({error}): {_INSTALL[name]}"
    return ""


def translated() -> bool:
    """Whether an x86-64 Python runs on Apple Silicon."""
    if (sys.platform, platform.machine()) != ("darwin", "x86_64"):
        return False
    answer = subprocess.run(["sysctl", "-n", "sysctl.proc_translated"], capture_output=True, text=True)
    return answer.stdout.strip() == "1"
