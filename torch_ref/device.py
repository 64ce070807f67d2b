"""Which device PyTorch runs on, and what a run's environment says of it."""

import os
import resource
import sys

import torch

from mlxgpt.common.errors import UserError


def use(name: str = "auto") -> torch.device:
    """The device ``auto``, ``cpu``, ``mps``, ``cuda``, ``cuda:N`` or ``gpu``; auto is CUDA, else MPS, else the CPU.

    Raises:
        UserError: a device that PyTorch does not have here.
    """
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name in ("auto", "gpu"):
        if name == "gpu" and best == "cpu":
            raise UserError("--device gpu: this machine has no GPU that PyTorch can use; expected auto or cpu")
        return torch.device(best)
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "mps", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device {name}: the torch backend has auto, cpu, gpu, mps, cuda and cuda:N")
    count = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}[kind]
    if int(index or 0) >= count:
        raise UserError(f"--device {name}: PyTorch finds {count} {kind} devices here; expected auto or cpu")
    return torch.device(name)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of tensors: ``active`` now and ``peak`` since the start; on the CPU, of the whole process."""
    if device.type == "cuda":
        return {"active": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device)}
    if device.type == "mps":
        now = torch.mps.current_allocated_memory()
        return {"active": now, "peak": now}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"active": peak, "peak": peak}


def describe(device: torch.device) -> dict[str, str]:
    """What bit-equality depends on, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "framework": "torch",
        "version": torch.__version__,
        "device": name,
        "blas": f"mkl {torch.backends.cpu.get_cpu_capability()}" if torch.backends.mkl.is_available() else "",
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
    }
