"""Arrays to the device and back, so that neither side waits for the other where it need not."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from torch_ref import fast
from torch_ref.layers import Array

ALIGNED = 4  # elements: an array begins at a multiple of 16 bytes, which kernels like


def pinned(elements: int) -> torch.Tensor:
    """Host memory, int32, that a CUDA device copies from and to by itself."""
    return torch.empty(elements, dtype=torch.int32, pin_memory=True)


def put(arrays: Sequence[np.ndarray | None], device: torch.device) -> list[Any]:
    """Host arrays of 4-byte elements as tensors, None as None; to CUDA in one copy from pinned memory, only started."""
    if fast.kind(device) != "cuda":
        return [None if each is None else torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in arrays]
    sizes = [0 if each is None else -(-each.size // ALIGNED) * ALIGNED for each in arrays]
    host = pinned(sum(sizes))
    pieces = zip(arrays, host.split(sizes), strict=True)
    for array, piece in pieces:
        if array is not None:
            piece[: array.size].numpy()[:] = np.ravel(array).view(np.int32)
    made: list[Any] = []
    for array, piece in zip(arrays, host.to(device, non_blocking=True).split(sizes), strict=True):
        if array is None:
            made.append(None)
            continue
        kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
        made.append(piece[: array.size].view(kind).reshape(array.shape))
    return made


def fetch(tensor: Array) -> Callable[[], np.ndarray]:
    """Starts a copy to the host. What is returned waits for it, and not for what the device is given later."""
    if fast.kind(tensor.device) != "cuda":
        return lambda: tensor.numpy(force=True)
    host = pinned(tensor.numel()).view(tensor.dtype).reshape(tensor.shape)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait
