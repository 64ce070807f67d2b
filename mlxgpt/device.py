"""Which device MLX runs on, and what a run's environment says of it."""

import os
from importlib.metadata import version

from mlxgpt import blas

# isort: split
import mlx.core as mx

from mlxgpt.common.errors import UserError


def use(name: str = "auto") -> mx.Device:
    """Makes ``auto``, ``cpu`` or ``gpu`` MLX's default device and returns it; auto is the GPU where there is one.

    Raises:
        UserError: a device that MLX does not have here.
    """
    if name not in ("auto", "cpu", "gpu"):
        raise UserError(f"--device {name}: the mlx backend has auto, cpu and gpu")
    gpu = mx.is_available(mx.gpu)
    if name == "gpu" and not gpu:
        raise UserError("--device gpu: this machine has no GPU that MLX can use; expected auto or cpu")
    device = mx.Device(mx.gpu if gpu and name != "cpu" else mx.cpu)
    mx.set_default_device(device)
    return device


def memory() -> dict[str, int]:
    """Bytes of arrays: ``active`` now and ``peak`` since the start."""
    return {"active": mx.get_active_memory(), "peak": mx.get_peak_memory()}


def describe(device: mx.Device) -> dict[str, str]:
    """What bit-equality depends on, in words."""
    cpu = device == mx.Device(mx.cpu)
    name = "cpu" if cpu else str(mx.device_info(device).get("device_name", "gpu"))
    library = blas.describe() if cpu else {}
    return {
        "framework": "mlx",
        "version": version("mlx"),
        "device": name,
        "blas": " ".join(filter(None, (library.get("name"), library.get("core"), library.get("jit")))),
        "threads": str(library.get("threads", "")),
        "cores": str(os.cpu_count()),
    }
