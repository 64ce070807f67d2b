"""What one framework computes on one device, as arrays by name; ``python -m mlxgpt.doctor`` writes them.

A process of its own for each framework, so that a kernel that ends its process is a finding and not the end of
``doctor``. Names are ``RUNG/PROBLEM/ARRAY``; ``RUNG/PROBLEM/error`` says in one line why there is none.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import numpy as np

from mlxgpt.common.config import Recipe, SampleConfig
from mlxgpt.common.doctor import problems as posed
from mlxgpt.common.doctor import speed
from mlxgpt.common.doctor.problems import Problem
from mlxgpt.common.inference import probe as probing

Arrays = Iterator[tuple[str, np.ndarray]]
RUNGS = ("logits", "gradients", "training", "cache", "lora", "quantized", "bf16")
DRAWN = 24  # tokens drawn greedily
PROMPT = 8


def cuts(length: int, first: int) -> list[tuple[int, int]]:
    """Where tokens are cut that a cache is given: ``first``, half of the rest, at most 32 single ones, what is left."""
    middle = first + (length - first) // 2
    last = min(length, middle + 32)
    made = [(0, first), (first, middle), *((at, at + 1) for at in range(middle, last)), (last, length)]
    return [(start, stop) for start, stop in made if stop > start]


def forward(half: ModuleType, problem: Problem, recipe: Recipe, device: str, exact: bool = False) -> Arrays:
    """Logits, the residual stream by layer, and gradients by name, without dropout."""
    trained = half.engine.Engine(recipe, posed.weights(recipe), device)
    if exact:
        half.exact(trained)
    batch = posed.batch(recipe, problem.rows, 0)
    tokens, targets = (half.put(trained.model, array) for array in (batch.tokens, batch.targets))
    yield from half.probe.activations(trained.model, tokens)
    for name, array in half.probe.gradients(trained.model, tokens, targets):
        yield f"gradient.{name}", array


def train(half: ModuleType, problem: Problem, device: str) -> Arrays:
    """The mean loss of every step; dropout, where the problem has it, draws the same masks everywhere."""
    recipe = problem.changed(compile=half.COMPILE)
    trained, losses = half.engine.Engine(recipe, posed.weights(recipe, 1.0), device), []
    for step in range(1, problem.steps + 1):
        stats = trained.train_step(step, [posed.batch(recipe, problem.rows, step)], posed.RATE)
        losses.append(stats.loss_sum / stats.weight)
    yield "losses", np.array(losses)


def decode(half: ModuleType, problem: Problem, device: str) -> Arrays:
    """Logits with a cache and without, and what is drawn greedily with its margins."""
    recipe = problem.recipe
    model = half.engine.Engine(recipe, posed.weights(recipe), device).model
    ids = posed.batch(recipe, 2, 1).tokens
    yield "with", half.cached(model, half.put(model, ids), PROMPT)
    yield "without", half.plain(model, half.put(model, ids))
    prompt, sample = ids[0, :PROMPT].tolist(), SampleConfig(temperature=0.0, max_tokens=DRAWN)
    drawn = half.generate.generate(model, None, [prompt], sample)[0].tokens
    yield "tokens", np.array(drawn, np.int32)
    again = half.plain(model, half.put(model, np.array([(prompt + drawn)[:-1]], np.int32)))
    yield "margins", probing.margins(again[0, -len(drawn) :])


def rungs(half: ModuleType, problem: Problem, device: str, exact: bool = False) -> dict[str, Callable[[], Arrays]]:
    """Rung -> what computes its arrays; ``exact`` is for the floor, in float64."""

    def base(**train: Any) -> Arrays:
        return forward(half, problem, problem.changed(**train), device, exact)

    def tuned(**adapter: Any) -> Arrays:
        return forward(half, problem, problem.changed(adapter), device, exact)

    made: dict[str, Callable[[], Arrays]] = {"logits": base}
    if problem.steps and not exact:
        made["training"] = lambda: train(half, problem, device)
        made["cache"] = lambda: decode(half, problem, device)
    if problem.steps:
        made["lora"] = tuned
    if problem.steps and not exact:
        # the quantized product itself, which a CPU would go round by dequantizing once
        made["quantized"] = lambda: tuned(bits=4, dequantize="never")
        made["bf16"] = lambda: base(compute_dtype="bfloat16")
    return made


def ladder(half: ModuleType, device: str, quick: bool, long: bool = True, exact: bool = False) -> Arrays:
    """Every array of every rung and problem; an exception ends its rung of its problem alone."""
    for problem in posed.problems(quick, long):
        for rung, compute in rungs(half, problem, device, exact).items():
            where = f"{rung}/{problem.name}"
            try:
                for name, array in compute():
                    yield f"{where}/{name}", array
            except Exception as error:  # whatever a framework raises on this device is what the rung has to say
                yield f"{where}/error", np.array(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def write_ladder(half: ModuleType, out: Path, device: str, quick: bool) -> None:
    """A file an array, so that what is on disk stays if the process ends.

    By one thread, for the models are small, and a busy machine's threads wait for one another.
    """
    cpu = half.devices.describe(half.devices.use(device))["device"] == "cpu"
    jobs = [("tested", device, False), *[("cpu", "cpu", False)] * (not cpu), *[("exact", "cpu", True)] * half.EXACT]
    for place, where, exact in jobs:
        (out / place).mkdir()
        with half.one_thread():
            for name, array in ladder(half, where, quick, not cpu, exact):
                np.save(out / place / quote(name, safe=""), array)


def write_speed(half: ModuleType, out: Path, device: str, until: float) -> None:
    """A line a size."""
    steps = speed.steps(half, device, speed.room(half, device), until)
    rows = {"speed": steps, "bandwidth": speed.bandwidth(half, device, until)}
    for kind, found in rows.items():
        with (out / f"{kind}.jsonl").open("w") as file:
            for row in found:
                print(json.dumps(row), file=file, flush=True)


def main(half: ModuleType, argv: list[str]) -> int:
    """The process of one framework: writes its ladder into --out and, unless --quick, its speed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    args = parser.parse_args(argv)
    until = time.perf_counter() + speed.WHOLE
    write_ladder(half, args.out, args.device, args.quick)
    if not args.quick:
        write_speed(half, args.out, args.device, until)
    return 0
