"""What a bug report needs to know of a machine, and nothing that names its owner.

Everything is read from the system's own tools; what cannot be read is None, shown as ``not readable here``.
"""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlxgpt.common import backend
from mlxgpt.common.plan import chips, machine

PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "torch", "numpy", "ml_dtypes",
            "safetensors", "tokenizers", "transformers", "mkl")  # fmt: skip
# Settings that change numbers or speed. Their values are numbers or words; a variable that may hold a path is not here.
VARIABLES = ("MLX_DISABLE_COMPILE", "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER",
             "MLX_METAL_FAST_SYNCH", "MLX_BFS_MAX_WIDTH", "MLXGPT_BLAS", "MLXGPT_DEVICE", "MLXGPT_TF32",
             "OMP_NUM_THREADS",
             "OMP_PROC_BIND", "OMP_PLACES", "MKL_NUM_THREADS", "MKL_CBWR", "OPENBLAS_NUM_THREADS",
             "VECLIB_MAXIMUM_THREADS", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
             "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ENABLE_MPS_FALLBACK", "PYTORCH_MPS_HIGH_WATERMARK_RATIO")  # fmt: skip
_PLAIN = re.compile(r"[\w.,:+-]{0,24}")
_LEVELS = {"1": "normal", "2": "warning", "4": "critical"}


def facts() -> dict[str, Any]:
    """The machine, by the keys that docs/doctor.md lists."""
    darwin = sys.platform == "darwin"
    return {
        "chip": _chip(),
        "cores": os.cpu_count(),
        "memory": machine.total(),
        "memory_free": machine.free(),
        "system": f"macOS {platform.mac_ver()[0]}" if darwin else f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "rosetta": backend.translated() if darwin else None,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "variables": {name: _value(os.environ[name]) for name in VARIABLES if name in os.environ},
        "graphics": _nvidia(),
        **pressure(),
    }


def pressure() -> dict[str, str | None]:
    """What slows a machine down: heat, low power, memory that runs out."""
    if sys.platform == "darwin":
        return {
            "thermal": _mac_thermal(),
            "memory_pressure": _LEVELS.get(_said("sysctl", "-n", "kern.memorystatus_vm_pressure_level") or ""),
            "swap": _found(r"used = ([\d.]+\w)", _said("sysctl", "-n", "vm.swapusage")),
            "power": _mac_power(),
        }
    return {"thermal": _zones(), "memory_pressure": _linux_pressure(), "swap": _linux_swap(), "power": None}


def _mac_thermal() -> str | None:
    """``pmset -g therm``: levels where there are any, and the share of its speed that the CPU may have."""
    said = _said("pmset", "-g", "therm")
    if said is None:
        return None
    levels = re.findall(r"(\w*(?:Warning|Level|Limit)\w*)\s*=\s*(\d+)", said)
    shown = ", ".join(f"{name} {value}" for name, value in levels)
    return shown or ("no warning recorded" if "No thermal warning" in said else None)


def _mac_power() -> str | None:
    """The source of power, and whether low power mode is on."""
    source = _found(r"drawing from '([\w ]+)'", _said("pmset", "-g", "batt"))
    low = _found(r"lowpowermode\s+(\d)", _said("pmset", "-g"))
    said = [*([source] if source else []), *(["low power mode"] if low == "1" else [])]
    return ", ".join(said) or None


def _zones() -> str | None:
    """The hottest of Linux' thermal zones."""
    found = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*"):
        kind, text = _text(zone / "type"), _text(zone / "temp")
        if text and text.lstrip("-").isdecimal():
            found.append((int(text) / 1000, _value(kind or "")))
    if not found:
        return None
    hottest, kind = max(found)
    return f"{hottest:.0f} C ({kind}), the hottest zone"


def _linux_pressure() -> str | None:
    """The share of the last 10 seconds in which some task waited for memory."""
    share = _found(r"some avg10=([\d.]+)", _text(Path("/proc/pressure/memory")))
    return f"{share} % of the last 10 s waited" if share else None


def _linux_swap() -> str | None:
    text = _text(Path("/proc/meminfo"))
    total, free = (_found(rf"{key}:\s+(\d+)", text) for key in ("SwapTotal", "SwapFree"))
    return f"{(int(total) - int(free)) / 1024:.0f}M" if total and free else None


def _nvidia() -> list[str] | None:
    """Name, driver, temperature and reasons for a lower clock of every card that nvidia-smi lists."""
    fields = "name,driver_version,memory.total,temperature.gpu,clocks_throttle_reasons.active"
    said = _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return [" ".join(line.split())[:160] for line in said.splitlines() if line.strip()] if said else None


def _chip() -> str:
    """On Linux, what /proc/cpuinfo says; elsewhere chips.chip_name()."""
    name = _found(r"model name\s*:\s*(.+)", _text(Path("/proc/cpuinfo"))) if sys.platform == "linux" else None
    return name or chips.chip_name()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _value(text: str) -> str:
    """A short word or number as it is; anything else could be a path or a name."""
    return text if _PLAIN.fullmatch(text) else "(set)"


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _found(pattern: str, text: str | None) -> str | None:
    found = re.search(pattern, text) if text else None
    return found[1].strip() if found else None
