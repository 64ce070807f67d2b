"""Step speed, memory bandwidth and peak memory of a framework on a device, at three sizes.

A step's FLOPs are counted first (common/plan/compute.py), so that a slow machine leaves out what it has no time for.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import Recipe
from mlxgpt.common.model import params
from mlxgpt.common.plan import chips, compute, machine, similar
from mlxgpt.common.plan.chips import Chip
from mlxgpt.common.plan.worker import Job
from mlxgpt.common.recipes import build

SECONDS = 12.0  # that all steps of a framework may take
WHOLE = 40.0  # seconds of a framework's process after which nothing more is begun
BUSY = f"over {WHOLE:.0f} s have passed: a busy or slow machine"
LEAST, MOST = 2, 8  # steps that are timed, after one that is not
MEMORY = (0.95, 1.10)  # predicted / measured, the gate of docs/planning.md
MIB = 2**20
STREAMS = {True: (16, 64, 256), False: (64, 256, 1024)}  # MiB of an array, on a CPU or not

Row = dict[str, Any]


def _sized(sizes: str, rows: int, dtype: str = "float32", **model: Any) -> Recipe:
    n_layer, n_head, n_embd, block_size, vocab_size = map(int, sizes.split())
    model |= {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    train = {"batch_size": rows, "compute_dtype": dtype}
    return build({"model": {"family": "llama", "vocab_size": vocab_size, **model}, "train": train})


def sizes(cpu: bool) -> list[Recipe]:
    """Layers, heads, width, context and vocabulary; rows of a step. On a GPU the last is GPT-2's size, also in bf16."""
    if cpu:
        return [_sized("2 4 128 128 1024", 4), _sized("4 4 256 256 2048", 2), _sized("6 6 384 256 4096", 1)]
    large = [_sized("12 12 768 1024 50304", 2, dtype, family="gpt2") for dtype in ("float32", "bfloat16")]
    return [_sized("4 4 256 256 4096", 8), _sized("6 8 512 512 8192", 8), *large]


def random_batch(recipe: Recipe) -> Batch:
    """Random tokens: speed does not depend on them."""
    rows, size = recipe.train.batch_size, recipe.model.block_size
    drawn = rng.integers(0, "speed", count=rows * (size + 1), high=recipe.model.vocab_size)
    tokens = drawn.astype(np.int32).reshape(rows, size + 1)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((rows, size), np.float32))


def described(recipe: Recipe) -> Row:
    """What identifies a size."""
    model, train = recipe.model, recipe.train
    return {
        "model": f"{model.family} {model.n_layer}x{model.n_embd}",
        "parameters": params.count(model),
        "rows": train.batch_size,
        "length": model.block_size,
        "dtype": train.compute_dtype,
    }


def steps(half: ModuleType, device: str, limit: int, until: float) -> Iterator[Row]:
    """A row a size: speed, share of the chip's peak, memory predicted and measured; or ``note``: why not."""
    where = half.devices.use(device)
    name = half.devices.describe(where)["device"]
    chip, rate, left = chips.chip_of(name), 0.0, SECONDS
    for recipe in sizes(name == "cpu"):
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, compile=half.COMPILE))
        row, tokens = described(recipe), recipe.train.batch_size * recipe.model.block_size
        flops = compute.flops(recipe, recipe.model.block_size, recipe.train.batch_size).exact * tokens
        if time.perf_counter() > until:
            yield {**row, "verdict": "left out", "note": BUSY}
            continue
        expected = flops / rate if rate else 0.0
        if expected * (LEAST + 1) > left:
            yield {**row, "verdict": "left out", "note": f"about {expected:.0f} s a step at the rate above"}
            continue
        predicted = half.footprint.footprint(recipe, recipe.train.batch_size, recipe.model.block_size, 1, device).peak
        if predicted > limit:
            note = f"{predicted / 2**30:.1f} GiB predicted, {limit / 2**30:.1f} GiB free"
            yield {**row, "verdict": "left out", "note": note}
            continue
        began = time.perf_counter()
        seconds = _timed(half, recipe, device, left)
        measured = _peak(half, recipe, device)
        left -= time.perf_counter() - began
        rate = flops / seconds
        yield {
            **row,
            "verdict": "ok" if MEMORY[0] <= predicted / measured <= MEMORY[1] else "memory off",
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tflops": rate / 1e12,
            "peak_share": rate / chip.flops(recipe.train.compute_dtype) if chip else None,
            "memory_predicted": predicted,
            "memory_measured": measured,
        }


def _timed(half: ModuleType, recipe: Recipe, device: str, left: float) -> float:
    """Median seconds of a step."""
    trained = half.engine.Engine(recipe, params.init_params(recipe.model, recipe.train.seed), device)
    batch, spent, began = random_batch(recipe), [], time.perf_counter()
    while len(spent) <= LEAST or (len(spent) <= MOST and time.perf_counter() - began < min(1.0, left / 3)):
        start = time.perf_counter()
        trained.train_step(len(spent) + 1, [batch], 1e-4)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def _peak(half: ModuleType, recipe: Recipe, device: str) -> int:
    """Bytes at the peak of some steps, as the plan measures those of its copy."""
    job = Job(recipe, recipe.train.batch_size, recipe.model.block_size, 1, 1, similar.STEPS)
    return half.footprint.measure(job, device)["peak"]


def bandwidth(half: ModuleType, device: str, until: float) -> Iterator[Row]:
    """A row a size: GB/s of a copy (an array read and one written) and of a triad (two read, one written)."""
    where = half.devices.use(device)
    name = half.devices.describe(where)["device"]
    chip = chips.chip_of(name)
    for size in STREAMS[name == "cpu"]:
        if time.perf_counter() > until:
            yield {"mib": size, "verdict": "left out", "note": BUSY}
            continue
        if 3 * size * MIB > machine.free() / 4:
            yield {"mib": size, "verdict": "left out", "note": "more than a quarter of the free memory"}
            continue
        copy, triad = half.stream(where, size * MIB // 4, 3 if size >= 256 else 5)
        found = {"copy": 2 * size * MIB / copy / 1e9, "triad": 3 * size * MIB / triad / 1e9}
        yield {"mib": size, "verdict": "ok", **found, "bandwidth_share": _share(max(found.values()), chip)}


def _share(rate: float, chip: Chip | None) -> float | None:
    return rate / chip.bandwidth if chip and chip.bandwidth else None


def room(half: ModuleType, device: str) -> int:
    """Bytes that a step may take: three quarters of what is free, or of the device's own."""
    found = half.devices.capacity(half.devices.use(device))
    free = found.get("free", machine.free())
    return int(0.75 * min(free, found.get("recommended") or free))
