"""Peak memory of real steps, measured: ``python -m mlxgpt.footprint DEVICE`` (common/plan/worker.py)."""

import contextlib
import gc
import sys
from collections.abc import Iterator

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt import engine as engines
from mlxgpt import fast
from mlxgpt.common.config import Recipe
from mlxgpt.common.plan import similar, worker
from mlxgpt.common.plan.memory import Footprint
from mlxgpt.common.plan.worker import Job

# what the code chooses by, and the power of the scale that the copy's sizes are divided by
SIZES = ((fast, "TILE", 1), (fast, "MANY", 2), (fast, "SCORES", 2))


@contextlib.contextmanager
def divided(scale: int) -> Iterator[None]:
    """The code chooses for a copy what it chooses for what is copied."""
    kept = [(place, name, getattr(place, name)) for place, name, _ in SIZES]
    try:
        for place, name, power in SIZES:
            setattr(place, name, max(1, getattr(place, name) // scale**power))
        yield
    finally:
        for place, name, value in kept:
            setattr(place, name, value)


def measure(job: Job, device: str) -> dict[str, int]:
    """Bytes: ``peak`` of the steps, and ``fixed``, what is not the step's and of any size the same."""
    with divided(job.scale):
        gc.collect()
        before = mx.get_active_memory()
        engine = engines.Engine(job.recipe, similar.tensors(job.recipe), device)
        batch = similar.batch(job.recipe, job.rows * job.micro_batches, job.length)
        mx.reset_peak_memory()
        for step in range(1, job.steps + 1):
            engine.train_step(step, batch.split(job.rows), 1e-3)
        return {"peak": mx.get_peak_memory() - before, "fixed": 0}


def limit(device: str, size: int) -> None:
    """MLX's own limit, which its CPU backend has none of."""
    if engines.devices.use(device) == mx.Device(mx.gpu):
        mx.set_memory_limit(size)


def footprint(recipe: Recipe, rows: int, length: int, micro_batches: int = 1, device: str = "auto") -> Footprint:
    """Of a step, from a small copy that this process measures; common/plan/measured.py has a process for it."""
    return similar.footprint(lambda job: measure(job, device), recipe, rows, length, micro_batches)


if __name__ == "__main__":
    worker.serve(lambda job: measure(job, sys.argv[1]), lambda size: limit(sys.argv[1], size), engines.devices)
