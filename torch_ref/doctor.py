"""PyTorch's half of ``mlxgpt doctor``: what common/doctor/measure.py asks of a model and of a device."""

import contextlib
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from mlxgpt.common.doctor import measure
from torch_ref import device as devices  # noqa: F401
from torch_ref import engine, footprint, generate, probe  # noqa: F401  (what measure.py and speed.py ask for)
from torch_ref.layers import Array
from torch_ref.model import Model, make_cache

EXACT = True  # whether it computes in float64
COMPILE = "off"  # torch.compile takes a minute to start


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Products by one thread within, on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def put(model: Model, array: np.ndarray) -> Array:
    """An array where the model is."""
    return torch.tensor(array, device=model.device)


def exact(trained: engine.Engine) -> None:
    """Makes an engine's model compute in float64: torch's alone."""
    trained.model.double()
    trained.model._dtype = torch.float64


@torch.no_grad()
def plain(model: Model, tokens: Array) -> np.ndarray:
    """Logits (B, T, V) of one pass."""
    return model(tokens).cpu().numpy()


@torch.no_grad()
def cached(model: Model, tokens: Array, first: int) -> np.ndarray:
    """The same through a KV cache: ``first`` tokens, then half of the rest, then one by one."""
    rows, length = tokens.shape
    cache, pieces = make_cache(model, rows, length), []
    for start, stop in measure.cuts(length, first):
        pieces.append(model(tokens[:, start:stop], cache=cache))
    return torch.cat(pieces, dim=1).cpu().numpy()


def stream(device: torch.device, count: int, times: int) -> tuple[float, float]:
    """Least seconds of a copy, s a, and of a triad, s a + c, over ``count`` float32."""
    a, c = torch.rand(count, device=device), torch.rand(count, device=device)
    found = []
    for function in (lambda: torch.mul(a, 0.5, out=a), lambda: torch.add(c, a, alpha=0.5, out=a)):
        spent = []
        for _ in range(times + 1):
            start = time.perf_counter()
            function()
            a[-1].item()  # waits for the device
            spent.append(time.perf_counter() - start)
        found.append(min(spent[1:]))
    return found[0], found[1]


if __name__ == "__main__":
    sys.exit(measure.main(sys.modules[__name__], sys.argv[1:]))
