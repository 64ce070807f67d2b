"""Which device PyTorch runs on, and what a run's environment says of it."""

import os
import resource
import sys
from collections.abc import Callable

import torch

from mlxgpt.common import backend, tf32
from mlxgpt.common.config import TrainConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.plan import machine
from torch_ref import fast, sampled

_MIB = 2**20


def find(name: str = "auto") -> torch.device:
    """The device ``auto``, ``cpu``, ``mps``, ``cuda``, ``cuda:N`` or ``gpu``.

    auto is what MLXGPT_DEVICE says, else CUDA, else MPS, else the CPU.

    Raises:
        UserError: a device that PyTorch does not have here.
    """
    name, asked = backend.device(name)
    cards = max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 0
    here = ["cuda", *(f"cuda:{n}" for n in range(cards))] if cards else []
    here += [*(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name == "auto" or (name == "gpu" and len(here) > 1):
        name = here[0]
    if name not in here:
        raise UserError(f"{asked}: PyTorch has {', '.join(here)} on this machine; expected auto or one of these")
    return torch.device(name)


def use(name: str = "auto") -> torch.device:
    """The device of ``find``, its TF32 on or off; PyTorch has no default device that matters here.

    Raises:
        UserError: a device that PyTorch does not have here.
    """
    device = find(name)
    # also over a user's own values; "high" and "medium" would reach the CPU's products as well
    torch.set_float32_matmul_precision("highest")
    tf32.override(tf32.asked())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32.asked()
    return device


def is_gpu(array: torch.Tensor) -> bool:
    """Whether what is made of the array is computed on a GPU."""
    return fast.kind(array.device) in ("cuda", "mps")


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of tensors: ``active`` now and ``peak`` since the start; on the CPU, of the whole process."""
    if device.type == "cuda":
        return {"active": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device)}
    if device.type == "mps":
        return {"active": sampled.PEAK.look(), "peak": sampled.PEAK.bytes}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"active": peak, "peak": peak}


def capacity(device: torch.device) -> dict[str, int]:
    """Bytes: what the device says of its memory beyond the machine's; its own on CUDA, ``recommended`` on MPS."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"total": total, "free": free}
    if device.type == "mps":
        return {"recommended": torch.mps.recommended_max_memory()}
    return {}


def room(device: torch.device) -> Callable[[], int] | None:
    """Says how many bytes a CPU can have now, for quantize_base.py; None of another device."""
    return machine.free if device.type == "cpu" else None


def limit(device: torch.device, train: TrainConfig) -> list[str]:
    """Sets the limits that ``train`` asks for, in MiB; returns a line for each that has no effect here."""
    unused = []
    if train.memory_limit and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, train.memory_limit * _MIB / whole), device)
    elif train.memory_limit and device.type == "mps":
        torch.mps.set_per_process_memory_fraction(train.memory_limit * _MIB / torch.mps.recommended_max_memory())
    elif train.memory_limit:
        unused.append("train.memory_limit: no effect in PyTorch on a CPU")
    if train.cache_limit:
        unused.append("train.cache_limit: no effect in PyTorch, which has train.clear_cache alone")
    if train.clear_cache and device.type == "cpu":
        unused.append("train.clear_cache: no effect in PyTorch on a CPU, where nothing is kept")
    if train.wired_limit:
        unused.append("train.wired_limit: no effect in PyTorch")
    if train.tf32:
        tf32.override(True)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if tf32_state(device) == "on":
        unused.append(tf32.NOTE)
    elif train.tf32:
        unused.append(f"train.tf32: no effect in PyTorch on {device.type}")
    return unused


def trim(device: torch.device, train: TrainConfig) -> None:
    """Gives back what PyTorch keeps for reuse, if that is more than train.clear_cache."""
    if not train.clear_cache or device.type == "cpu":
        return
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        release = torch.cuda.empty_cache
    else:
        kept = torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory()
        release = torch.mps.empty_cache
    if kept > train.clear_cache * _MIB:
        release()


def tf32_state(device: torch.device) -> str:
    """``on`` or ``off``: whether the device may round the operands of float32 products."""
    return "on" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "off"


def describe(device: torch.device) -> dict[str, str]:
    """What bit-equality depends on, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    mkl = f"mkl {torch.backends.cpu.get_cpu_capability()}, CBWR {os.environ.get('MKL_CBWR', 'OFF')}"
    products = [*([mkl] if torch.backends.mkl.is_available() else []), *backend.variables()]
    return {
        "framework": "torch",
        "version": torch.__version__,
        "device": name,
        "blas": " ".join(products),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "tf32": tf32_state(device),
    }
