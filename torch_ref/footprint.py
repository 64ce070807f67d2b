"""Peak memory of real steps, measured: ``python -m torch_ref.footprint DEVICE`` (common/plan/worker.py)."""

import gc
import sys
from typing import Any

import numpy as np
import torch
from torch.autograd.profiler import profile

from mlxgpt.common.config import Recipe
from mlxgpt.common.plan import similar, worker
from mlxgpt.common.plan.memory import Footprint
from mlxgpt.common.plan.worker import Job
from torch_ref import engine as engines
from torch_ref import sampled


def measure(job: Job, device: str) -> dict[str, int]:
    """Bytes: ``peak`` of the steps, and ``fixed``, what is not the step's and of any size the same."""
    gc.collect()
    engine = engines.Engine(job.recipe, similar.tensors(job.recipe), device)
    where, batch = engine.device, similar.batch(job.recipe, job.rows * job.micro_batches, job.length)

    def run(first: int, last: int) -> None:
        for step in range(first, last + 1):
            engine.train_step(step, batch.split(job.rows), 1e-3)

    if where.type != "cpu":
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        sampled.PEAK.bytes = 0
        run(1, job.steps)
        peak = engine.memory()["peak"]
        del run, engine
        gc.collect()
        left = engines.devices.memory(where)["active"]  # such as a library's workspace
        return {"peak": peak - left, "fixed": left}
    kept = [*engine.model.parameters(), *engine.model.buffers(), *engine.m.values(), *engine.v.values()]
    run(1, job.steps - 1)
    with profile(profile_memory=True) as profiler:  # torch.profiler's imports torch._inductor, which takes 4 s
        run(job.steps, job.steps)
    assert profiler and profiler.kineto_results
    events: list[Any] = [each for each in profiler.kineto_results.events() if each.name() == "[memory]"]
    live = np.cumsum([each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())])
    return {"peak": sum(each.untyped_storage().nbytes() for each in kept) + int(live.max()), "fixed": 0}


def limit(device: str, size: int) -> None:
    """PyTorch's own limit, which its CPU allocator has none of."""
    found = engines.devices.use(device)
    if found.type == "cuda":
        whole = torch.cuda.get_device_properties(found).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / whole), found)
    elif found.type == "mps":
        torch.mps.set_per_process_memory_fraction(size / torch.mps.recommended_max_memory())


def footprint(recipe: Recipe, rows: int, length: int, micro_batches: int = 1, device: str = "auto") -> Footprint:
    """Of a step, from a small copy that this process measures; common/plan/measured.py has a process for it."""
    return similar.footprint(lambda job: measure(job, device), recipe, rows, length, micro_batches)


if __name__ == "__main__":
    worker.serve(lambda job: measure(job, sys.argv[1]), lambda size: limit(sys.argv[1], size), engines.devices)
