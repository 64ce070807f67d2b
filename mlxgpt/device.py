"""Which device MLX runs on, and what a run's environment says of it."""

import os
import re
from collections.abc import Callable
from importlib.metadata import version

from mlxgpt import blas

# isort: split
import mlx.core as mx

from mlxgpt.common import backend, tf32
from mlxgpt.common.config import TrainConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.plan import machine

_MIB = 2**20


def find(name: str = "auto") -> mx.Device:
    """The device ``auto``, ``cpu`` or ``gpu``; MLX's default device stays what it is.

    auto is what MLXGPT_DEVICE says, else the GPU where there is one.

    Raises:
        UserError: a device that MLX does not have here.
    """
    name, asked = backend.device(name)
    here = ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]
    if name == "auto":
        name = here[0]
    if name not in here:
        other = "; --backend torch has cuda and mps" if name.startswith(("cuda", "mps")) else ""
        raise UserError(f"{asked}: MLX has {', '.join(here)} on this machine; expected auto or one of these{other}")
    return mx.Device(mx.gpu if name == "gpu" else mx.cpu)


def use(name: str = "auto") -> mx.Device:
    """Makes the device of ``find`` MLX's default device and returns it.

    Raises:
        UserError: a device that MLX does not have here.
    """
    device = find(name)
    mx.set_default_device(device)
    if device == mx.Device(mx.cpu):
        # on a CPU, the thread that begins here starts g++ whenever MLX needs a kernel
        with backend.without_signals():
            mx.synchronize()
    return device


def is_gpu(array: mx.array) -> bool:
    """Whether what is made of the array is computed on a GPU."""
    return mx.default_device() != mx.Device(mx.cpu)


def memory() -> dict[str, int]:
    """Bytes of arrays: ``active`` now and ``peak`` since the start."""
    return {"active": mx.get_active_memory(), "peak": mx.get_peak_memory()}


def capacity(device: mx.Device) -> dict[str, int]:
    """Bytes: what the device says of its memory beyond the machine's.

    Metal has a ``recommended`` working set, CUDA memory of its own, ``total`` and ``free``.
    """
    if device == mx.Device(mx.cpu):
        return {}
    info = mx.device_info(device)
    if "total_memory" in info:
        return {"total": int(info["total_memory"]), "free": int(info.get("free_memory", info["total_memory"]))}
    return {"recommended": int(info.get("max_recommended_working_set_size", 0))}


def room(device: mx.Device) -> Callable[[], int] | None:
    """Says how many bytes a CPU can have now, for quantize_base.py; None of another device."""
    return machine.free if device == mx.Device(mx.cpu) else None


def limit(device: mx.Device, train: TrainConfig) -> list[str]:
    """Sets the limits that ``train`` asks for, in MiB; returns a line for each that has no effect here."""
    gpu, unused = device == mx.Device(mx.gpu), []
    if train.cache_limit:
        mx.set_cache_limit(train.cache_limit * _MIB)
    for name, set_limit in (("memory_limit", mx.set_memory_limit), ("wired_limit", mx.set_wired_limit)):
        asked = getattr(train, name)
        if asked and gpu:
            set_limit(asked * _MIB)
        elif asked:
            unused.append(f"train.{name}: no effect in MLX on a CPU")
    if tf32_state(device) == "on":
        unused.append(tf32.NOTE)
    elif train.tf32 and gpu and blas.precision() != "on":
        raise UserError(f"train.tf32 = true: MLX was imported without it; set {tf32.VARIABLE}=1 before Python starts")
    elif train.tf32:
        unused.append(f"train.tf32: no effect in MLX on a {'Metal GPU before the M5' if gpu else 'CPU'}")
    return unused


def trim(device: mx.Device, train: TrainConfig) -> None:
    """Gives back what MLX keeps for reuse, if that is more than train.clear_cache."""
    if train.clear_cache and mx.get_cache_memory() > train.clear_cache * _MIB:
        mx.clear_cache()


def tf32_state(device: mx.Device) -> str:
    """``on``, ``off`` or ``unknown``: whether the device may round the operands of float32 products.

    On Metal nothing before the M5 (architecture applegpu_g17) does.
    """
    if device == mx.Device(mx.cpu):
        return "off"
    metal = re.match(r"applegpu_g(\d+)", str(mx.device_info(device).get("architecture", "")))
    return "off" if metal and int(metal[1]) < 17 else blas.precision()


def describe(device: mx.Device) -> dict[str, str]:
    """What bit-equality depends on, in words."""
    cpu = device == mx.Device(mx.cpu)
    name = "cpu" if cpu else str(mx.device_info(device).get("device_name", "gpu"))
    library = blas.describe() if cpu else {}
    products = [library.get("name"), library.get("core"), library.get("jit"), *(backend.variables() if cpu else [])]
    return {
        "framework": "mlx",
        "version": version("mlx"),
        "device": name,
        "blas": " ".join(filter(None, products)),
        "threads": str(library.get("threads", "")),
        "cores": str(os.cpu_count()),
        "tf32": tf32_state(device),
    }
