"""Head and loss in chunks of the vocabulary against whole logits: time and peak memory, gradients included.

    python -m benchmarks.head [--rounds 9] [--tokens 2048] [--chunk 1024] [--frameworks mlx,torch] [--json]

Width 512, vocabulary 32,000, per-token weights; MLX compiled, PyTorch eager. A frozen head needs the hidden states'
gradient alone. ``step`` is a whole training step of a llama of two layers around it. Memory is what is allocated at the
peak beyond the inputs (for a step: beyond its state), the gradients included.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.pairs import Contender, race, row
from benchmarks.report import Row, finish

WIDTH, VOCAB, ROW = 512, 32000, 256
FORMS = ("frozen", "trainable", "recomputed", "step")
FEWER = 5  # rounds of recomputed and step, which have no goal
GOALS = {  # time as a ratio of rates, and memory
    ("mlx", "frozen"): (">= 1", "<= 0.5"),
    ("mlx", "trainable"): (">= 0.87", "<= 0.6"),
}


def inputs(tokens: int) -> dict[str, np.ndarray]:
    """Hidden states, a head, targets and weights."""
    draw = np.random.default_rng(0)
    return {
        "hidden": draw.standard_normal((tokens, WIDTH), dtype=np.float32),
        "weight": draw.standard_normal((VOCAB, WIDTH), dtype=np.float32) * np.float32(0.05),
        "targets": draw.integers(0, VOCAB, tokens).astype(np.int32),
        "weights": draw.random(tokens, dtype=np.float32),
    }


def work(framework: str, form: str, chunk: str, tokens: str) -> Callable[[], int]:
    """A contender: one round is one gradient, or one training step; chunk 0 is the plain form."""
    if form == "step":
        return step(framework, int(chunk), int(tokens))
    return (mlx_head if framework == "mlx" else torch_head)(form, int(chunk), int(tokens))


def mlx_head(form: str, chunk: int, tokens: int) -> Callable[[], int]:
    """The compiled gradient in MLX."""
    from mlxgpt import blas, head, losses  # noqa: F401

    # isort: split
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    at = {name: mx.array(value) for name, value in inputs(tokens).items()}
    mx.eval(at)
    options = head.Options(chunk, "hidden" if form == "frozen" else "both", recompute=form == "recomputed")

    def objective(h: mx.array, w: mx.array, y: mx.array, weights: mx.array) -> mx.array:
        if chunk:
            return (head.token_losses(h, w, y, options) * weights).sum()
        return (losses.cross_entropy(head.logits(h, w), y) * weights).sum()

    gradient: Any = mx.compile(mx.value_and_grad(objective, argnums=(0,) if form == "frozen" else (0, 1)))

    def run() -> int:
        mx.eval(gradient(at["hidden"], at["weight"], at["targets"], at["weights"]))
        return tokens

    return run


def torch_head(form: str, chunk: int, tokens: int) -> Callable[[], int]:
    """The gradient in PyTorch."""
    import torch

    from torch_ref import head, losses

    at = {name: torch.tensor(value) for name, value in inputs(tokens).items()}
    at["hidden"].requires_grad_()
    at["weight"].requires_grad_(form != "frozen")
    options = head.Options(chunk, "hidden" if form == "frozen" else "both", recompute=form == "recomputed")

    def run() -> int:
        at["hidden"].grad = at["weight"].grad = None
        if chunk:
            each = head.token_losses(at["hidden"], at["weight"], at["targets"], options)
        else:
            each = losses.cross_entropy(head.logits(at["hidden"], at["weight"]), at["targets"])
        (each * at["weights"]).sum().backward()
        return tokens

    return run


def step(framework: str, chunk: int, tokens: int) -> Callable[[], int]:
    """A training step of our engine: tied llama, two layers, rows of 256 tokens."""
    import importlib

    from mlxgpt.common.batch import Batch
    from mlxgpt.common.model import params
    from mlxgpt.common.recipes import build

    model = dict(family="llama", n_layer=2, n_head=8, n_embd=WIDTH, block_size=ROW, vocab_size=VOCAB)
    recipe = build({"model": model, "train": {"batch_size": tokens // ROW, "loss_chunk": chunk}})
    package = {"mlx": "mlxgpt", "torch": "torch_ref"}[framework]
    engine = importlib.import_module(f"{package}.engine").Engine(recipe, params.init_params(recipe.model, 0), "cpu")
    rows = np.random.default_rng(0).integers(0, VOCAB, (tokens // ROW, ROW + 1)).astype(np.int32)
    batch = Batch(rows[:, :-1], rows[:, 1:], np.ones((tokens // ROW, ROW), np.float32))

    def run() -> int:
        engine.train_step(engine.t + 1, [batch], 1e-3)
        return tokens

    return run


def peak(framework: str, form: str, chunk: str, tokens: str) -> int:
    """Bytes allocated at the peak of one round beyond what was there before it."""
    run = work(framework, form, chunk, tokens)
    run()
    return (mlx_peak if framework == "mlx" else torch_peak)(run)


def mlx_peak(run: Callable[[], int]) -> int:
    """MLX counts."""
    import mlx.core as mx

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before


def torch_events(run: Callable[[], int]) -> list[Any]:
    """What PyTorch's profiler records of one round on the CPU: operations, and changes of live memory."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    profiler: Any = recorded.profiler
    return list(profiler.kineto_results.events())


def torch_peak(run: Callable[[], int]) -> int:
    """The largest sum of the profiler's allocations: resident memory says little of what is live."""
    return live_peak(torch_events(run))


def live_peak(events: list[Any]) -> int:
    """The largest sum of the changes of live memory among the events."""
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([change for _, change in changes]).max())


def measured_peak(*args: str) -> float:
    """MiB, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.head", "--peak", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return int(done.stdout) / 2**20


def compare(framework: str, form: str, chunk: int, tokens: int, rounds: int) -> list[Row]:
    """A row of time and a row of memory."""
    plain_form = "trainable" if form == "recomputed" else form
    sides = [(form, str(chunk)), (plain_form, "0")]
    pair = [Contender(f"{framework} {f} {c}", "head", "work", (framework, f, c, str(tokens))) for f, c in sides]
    race(pair, rounds)
    ours, plain = (measured_peak(framework, f, c, str(tokens)) for f, c in sides)
    speed, memory = GOALS.get((framework, form), ("", ""))
    what = f"head and loss, {framework}, {form}" if form != "step" else f"{framework} training step, 2 layers"
    against = "whole logits"
    return [
        row(f"{what}, {tokens} tokens", against, "tok/s", *pair, goal=speed),
        Row(f"{what}, {tokens} tokens", against, "MiB", ours, plain, [ours / plain], memory),
    ]


def main() -> None:
    """Runs every pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--chunk", type=int, default=1024, help="vocabulary entries in a chunk")
    parser.add_argument("--frameworks", default="mlx,torch")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    if args.peak:
        print(peak(*args.peak))
        return
    rows = []
    for framework in args.frameworks.split(","):
        for form in args.forms.split(","):
            rounds = args.rounds if form in ("frozen", "trainable") else min(args.rounds, FEWER)
            rows += compare(framework, form, args.chunk, args.tokens, rounds)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
