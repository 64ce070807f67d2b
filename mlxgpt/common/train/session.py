"""What the verbs train and finetune share: checks before a run, and the loop with its files and display around it."""

import contextlib
import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from mlxgpt.common import backend as backends
from mlxgpt.common.backend import Backend
from mlxgpt.common.batch import Source, State
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import resolve
from mlxgpt.common.model import adapters, params
from mlxgpt.common.plan import chips
from mlxgpt.common.plan.gate import Gate
from mlxgpt.common.recipes import build
from mlxgpt.common.runs import checkpoint, metrics, run_folder, samples
from mlxgpt.common.runs.checkpoint import RunState
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.train import loop, resume, schedule
from mlxgpt.common.train.progress import Progress


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


def find(
    args: Namespace, run: Path, recipe: Recipe, stored: dict[str, Any]
) -> tuple[tuple[Path, RunState] | None, list[str]] | None:
    """The newest checkpoint of a stopped run and what of the changed recipe rounds otherwise; None: it is finished.

    Raises:
        UserError: the recipe changes what may not change, or there is nothing to do up to --stop-after.
    """
    found = checkpoint.find_newest_valid(run)
    before = dataclasses.asdict(build(found[1].recipe if found else stored, str(run / "recipe.toml")))
    step = found[1].step if found else 0
    rounding = resume.check_recipe(run, before, recipe, step, print)
    if found and (why := loop.finished(recipe, found[1])):
        print(f"{run}: nothing to do: {why}; model: {resolve.resolve_model(run)}")
        return None
    if args.stop_after and args.stop_after <= step:
        raise UserError(f"--stop-after {args.stop_after}: the run is at step {step} already; expected a later one")
    check_settings(recipe, args)
    return found, rounding


def go_on(
    run: Path, found: tuple[Path, RunState], snapshot: State, recipe: Recipe, engine: Any, rounding: list[str]
) -> RunState:
    """Gives the engine what a checkpoint holds; returns the state that the run goes on from."""
    place, state = found
    engine.load_state(snapshot)
    environment = engine.describe()
    resume.say_environment(state, environment, rounding, print)
    print(f"{run}: goes on from step {state.step} ({place.name}, written by {state.framework})")
    checkpoint.set_aside(run, state.step, print)
    return dataclasses.replace(
        state, recipe=dataclasses.asdict(recipe), framework=environment["framework"], environment=environment
    )


def clear(run: Path, recipe: Recipe, environment: dict[str, Any], step: int) -> None:
    """Makes a stopped run as it was after ``step``, and notes that a segment begins."""
    checkpoint.check_space(run, space(recipe))
    checkpoint.sweep(run)
    # a run that took moments along has no lines of the steps before it
    if (metrics.cut(run / metrics.FILE, step) or run_folder.first_step(run)) != step:
        print(f"{run / metrics.FILE}: the lines up to step {step} are not all there any more")
    samples.cut(run, step)
    run_folder.note(run, recipe, environment, step)


def space(recipe: Recipe) -> int:
    """Bytes that a checkpoint takes: what trains and two moments of it, and small files."""
    return 12 * adapters.count(recipe) + 4 * 2**20


def run(
    args: Namespace,
    gate: Gate,
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
    for line in [*engine.unused_limits, engine.note]:
        if line:
            print(line)
    # a frozen weight has no gradient of its own: 4 FLOPs a token, not 6
    flops = chips.training_flops(recipe.model) * (1 if own == total else 2 / 3)
    display = Progress(
        run.name, recipe.train.steps, state.step, recipe.train.log_every, flops,
        chips.peak_flops(environment["device"]), engine.memory,
    )  # fmt: skip
    sinks = metrics.open_sinks(
        run, recipe.train.tensorboard, recipe.train.wandb, dataclasses.asdict(recipe), state.step
    )
    with run_folder.awake(), contextlib.closing(metrics.Metrics(run, sinks)) as lines, display:
        more |= {"stop_after": args.stop_after or 0, "outcome": lambda: gate.finish(run, engine)}
        return loop.train(loop.Job(run, recipe, engine, source, tokenizer, state, lines, display, **more))
