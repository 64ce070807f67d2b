"""What the verbs train and finetune share: checks before a run, and the loop with its files and display around it."""

import contextlib
import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from mlxgpt.common import adapters, chips, metrics, params, run_folder, schedule, trainer
from mlxgpt.common import backend as backends
from mlxgpt.common.backend import Backend
from mlxgpt.common.batch import Source
from mlxgpt.common.checkpoint import RunState
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.progress import Progress
from mlxgpt.common.tokenizer import Tokenizer


def check_settings(recipe: Recipe, args: Namespace) -> None:
    """What can be judged without data and framework."""
    steps = recipe.train.steps
    if args.stop_after and args.stop_after > steps:
        raise UserError(f"--stop-after {args.stop_after}: expected at most train.steps = {steps}")
    metrics.check_sinks(recipe.train.tensorboard, recipe.train.wandb)
    schedule.check(recipe.optim, steps)


def open_backend(args: Namespace) -> Backend:
    """The framework's modules, its device chosen: what is not there is said before the data is prepared."""
    backend = backends.load(args.backend)
    backend.engine.devices.use(args.device)
    return backend


def fresh(recipe: Recipe, digests: dict[str, str], environment: dict[str, str]) -> RunState:
    """The state before step 1."""
    return RunState(recipe.train.seed, digests, dataclasses.asdict(recipe), environment["framework"], environment)


def run(
    args: Namespace,
    run: Path,
    recipe: Recipe,
    engine: Any,
    source: Source,
    tokenizer: Tokenizer | None,
    state: RunState,
    **more: Any,
) -> int:
    """The loop, with its files and its display around it; ``more`` are fields of trainer.Job."""
    environment = engine.describe()
    names = (environment[key] for key in ("framework", "version", "device"))
    total = params.count(recipe.model)
    own = adapters.count(recipe)
    size = f"{total:,} parameters" if own == total else f"{own:,} parameters train beside {total:,}"
    print(f"{run}: {size}, {recipe.train.steps:,} steps; {' '.join(names)}")
    for line in engine.unused_limits:
        print(line)
    display = Progress(
        run.name, recipe.train.steps, state.step, recipe.train.log_every, chips.training_flops(recipe.model),
        chips.peak_flops(environment["device"]), engine.memory,
    )  # fmt: skip
    sinks = metrics.open_sinks(
        run, recipe.train.tensorboard, recipe.train.wandb, dataclasses.asdict(recipe), state.step
    )
    with run_folder.awake(), contextlib.closing(metrics.Metrics(run, sinks)) as lines, display:
        more |= {"stop_after": args.stop_after or 0}
        return trainer.train(trainer.Job(run, recipe, engine, source, tokenizer, state, lines, display, **more))
