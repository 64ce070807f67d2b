"""MLX's half of ``mlxgpt doctor``: what common/doctor/measure.py asks of a model and of a device."""

import contextlib
import sys
import time

from mlxgpt import blas

# isort: split
import mlx.core as mx
import numpy as np

from mlxgpt import device as devices  # noqa: F401
from mlxgpt import engine, footprint, generate, probe  # noqa: F401  (what measure.py and speed.py ask for)
from mlxgpt.common.doctor import measure
from mlxgpt.common.errors import UserError
from mlxgpt.layers import Array
from mlxgpt.model import Model, make_cache

EXACT = False  # whether it computes in float64
COMPILE = "auto"


def one_thread() -> contextlib.AbstractContextManager:
    """Products by one thread within, on a CPU."""
    return blas.one_thread()


def put(model: Model, array: np.ndarray) -> Array:
    """An array where the model is."""
    return mx.array(array)


def exact(trained: engine.Engine) -> None:
    """Makes an engine's model compute in float64: torch's alone."""
    raise UserError("float64 is of the torch backend alone")


def plain(model: Model, tokens: Array) -> np.ndarray:
    """Logits (B, T, V) of one pass."""
    return np.array(model(tokens))


def cached(model: Model, tokens: Array, first: int) -> np.ndarray:
    """The same through a KV cache: ``first`` tokens, then half of the rest, then one by one."""
    rows, length = tokens.shape
    cache, pieces = make_cache(model, rows, length), []
    for start, stop in measure.cuts(length, first):
        pieces.append(model(tokens[:, start:stop], cache=cache))
    return np.array(mx.concatenate(pieces, axis=1))


def stream(device: mx.Device, count: int, times: int) -> tuple[float, float]:
    """Least seconds of a copy, s a, and of a triad, s a + c, over ``count`` float32; on MLX's default device."""
    a, c = mx.random.uniform(shape=(count,)), mx.random.uniform(shape=(count,))
    found = []
    for function in (mx.compile(lambda a, c: a * 0.5), mx.compile(lambda a, c: a * 0.5 + c)):
        spent = []
        for _ in range(times + 1):
            start = time.perf_counter()
            a = function(a, c)  # written where it was read: a new array's pages would be what is measured
            mx.eval(a)
            spent.append(time.perf_counter() - start)
        found.append(min(spent[1:]))
    return found[0], found[1]


if __name__ == "__main__":
    sys.exit(measure.main(sys.modules[__name__], sys.argv[1:]))
