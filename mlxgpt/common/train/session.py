"""Begins or resumes a run of any kind: everything that can be wrong is found before a folder is made or a run touched.

A kind (job.Kind) says what is particular to it; the order of the steps is here, once.
"""

import contextlib
import dataclasses
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from mlxgpt.common import backend as backends
from mlxgpt.common import failures
from mlxgpt.common.backend import Backend
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.failures import doing
from mlxgpt.common.folders import resolve
from mlxgpt.common.model import adapters, params
from mlxgpt.common.plan import chips, machine
from mlxgpt.common.plan import gate as plan_gate
from mlxgpt.common.plan.gate import Gate
from mlxgpt.common.recipes import build, read_toml
from mlxgpt.common.runs import checkpoint, metrics, run_folder, samples
from mlxgpt.common.runs.checkpoint import Checkpoint, RunState
from mlxgpt.common.train import loop, resume, schedule, tasks
from mlxgpt.common.train.job import Job, Kind
from mlxgpt.common.train.progress import Progress
from mlxgpt.common.units import duration


def run(kind: Kind) -> int:
    """Begins a run, or resumes the one of --resume.

    Returns:
        0, or 130 and 143 after a signal.

    Raises:
        UserError: wrong usage or input; nothing was written.
        RunError: the run broke.
    """
    return _resume(kind) if kind.args.resume else _begin(kind)


def _begin(kind: Kind) -> int:
    """A new run."""
    args = kind.args
    out = run_folder.unused(*kind.read_settings())
    tasks.read(kind.recipe.train)  # before a corpus is prepared
    backend = backends.load(args.backend)
    kind.open_model()
    _check_limits(kind, backend)
    kind.open_source()
    recipe = kind.recipe
    kind.tasks = tasks.prepare(recipe, kind.spells, print)
    check_settings(recipe, args)
    checkpoint.check_space(run_folder.existing(out), _checkpoint_bytes(recipe))
    gate = plan_gate.gate(recipe, backend, args)
    engine = _engine(kind, backend, kind.weights(None))
    environment = engine.describe()
    state = first_state(kind, environment)
    kind.set_first_state(engine, state)
    run_folder.make(out)
    with run_folder.locked(out):
        run_folder.begin(
            out, recipe, environment | {"data": kind.describe_source()}, kind.init_from, state.step, kind.reasons
        )
        return _train(kind, out, backend, engine, gate, state)


def _resume(kind: Kind) -> int:
    """A run that was stopped, from its newest valid checkpoint."""
    args, out = kind.args, Path(kind.args.resume)
    for name in kind.begin_only:
        if value := getattr(args, name):
            flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise UserError(f"{flag}: not with --resume: a resumed run keeps its folder, its settings and its weights")
    resume.check_run(out)
    with run_folder.locked(out):
        stored = read_toml(out / "recipe.toml")
        verb = "rl" if "rl" in stored else "finetune" if "tune" in stored else "train"
        if verb != kind.verb:
            raise UserError(f"{out}: a run of mlxgpt {verb}: mlxgpt {verb} --resume {out} resumes it")
        _check_own(kind, out)
        kind.read_stored(out, stored)
        newest = checkpoint.newest_valid(out)
        before = build(newest[1].recipe if newest else stored, str(out / "recipe.toml"))
        step = newest[1].step if newest else 0
        rounding = resume.check_recipe(out, dataclasses.asdict(before), kind.recipe, print)
        aside = "damaged"
        if newest and (stable := resume.before_decay(out, before, kind.recipe, newest[1], print)):
            newest, aside, step = stable, "decayed", stable[1].step
        if newest and (why := loop.finished(kind.recipe, newest[1])):
            print(f"{out}: nothing to do: {why}; model: {resolve.resolve_model(out)}")
            return 0
        if args.stop_after and args.stop_after <= step:
            raise UserError(f"--stop-after {args.stop_after}: the run is at step {step} already; expected a later one")
        check_settings(kind.recipe, args)
        if newest is None and not kind.seeded:
            again = f" with --init-from {kind.init_from}" if kind.init_from else ""
            raise UserError(
                f"{out}: no checkpoint: it was stopped before its first weights were saved; "
                f"remove it and start again{again}"
            )
        backend = backends.load(args.backend)
        _check_limits(kind, backend)
        kind.reopen_source(out, newest)
        kind.tasks = tasks.prepare(kind.recipe, kind.spells, print)
        if newest:
            resume.check_data(out, newest[1].data, digests(kind))
        gate = plan_gate.gate(kind.recipe, backend, args)
        if newest:
            engine = _restored_engine(kind, backend, newest[0])
            state = _restored_state(kind, out, newest, engine.describe(), rounding, aside)
        else:
            print(f"{out}: no checkpoint yet: starts from step 1")
            engine = _engine(kind, backend, kind.weights(None))
            state = first_state(kind, engine.describe())
        _rewind(kind, out, engine.describe(), state.step)
        return _train(kind, out, backend, engine, gate, state)


def _check_own(kind: Kind, out: Path) -> None:
    """Refuses to go on without the source or objective that a program began the run with, or with other ones."""
    segments = run_folder.segments(out)
    data = segments[0].get("data") if segments else None
    began = data.get("own") if isinstance(data, dict) else None
    before, now = sorted(began or ()), sorted(kind.own)
    if before != now:
        described = ", ".join(f"{name} {began[name]}" for name in before) if began else "the recipe's data and loss"
        raise UserError(
            f"{out}: began with {described}, not with {' and '.join(now) or 'those of the recipe'}"
            f"{'' if now else ': the program that has them resumes it, with Trainer.train()'}"
        )


def check_settings(recipe: Recipe, args: Namespace) -> None:
    """Refuses what can be judged without data and framework."""
    steps = recipe.train.steps
    if args.stop_after and args.stop_after > steps:
        raise UserError(f"--stop-after {args.stop_after}: expected at most train.steps = {steps}")
    metrics.check_sinks(recipe.train.tensorboard, recipe.train.wandb)
    schedule.check_schedule(recipe.optim, steps)


def first_state(kind: Kind, environment: dict[str, str]) -> RunState:
    """The state before step 1."""
    recipe = kind.recipe
    return RunState(recipe.train.seed, digests(kind), dataclasses.asdict(recipe), environment["framework"], environment)


def digests(kind: Kind) -> dict[str, str]:
    """Name -> sha256 of data and questions."""
    return kind.digests() | (kind.tasks.digests if kind.tasks else {})


def _check_limits(kind: Kind, backend: Backend) -> None:
    """Refuses memory settings above what the device has, before any work."""
    devices = backend.engine.devices
    machine.check_limits(kind.recipe.train, devices.capacity(devices.find(kind.args.device)))


def _engine(kind: Kind, backend: Backend, weights: Any) -> Any:
    """The engine with ``weights`` on the device.

    Raises:
        OutOfMemory: they do not fit.
    """
    with doing("weights and moments on the device", failures.ADVICE[kind.verb]):
        own = {"objective": kind.objective} if kind.objective else {}
        return backend.engine.Engine(kind.recipe, weights, device=kind.args.device, **own)


def _restored_engine(kind: Kind, backend: Backend, place: Path) -> Any:
    """The engine with the weights and the optimizer's state of the checkpoint ``place``."""
    weights = kind.weights(place)
    trained = {name: weights[name] for name in adapters.trainable(kind.recipe)}
    engine = _engine(kind, backend, weights)
    engine.load_state(checkpoint.read_optimizer(place, trained))
    return engine


def _restored_state(
    kind: Kind, out: Path, newest: Checkpoint, environment: dict[str, str], rounding: list[str], aside: str
) -> RunState:
    """The state that the run resumes from; checkpoints after it are renamed, to begin with ``aside``."""
    place, state = newest
    resume.say_environment(state, environment, rounding, print)
    print(f"{out}: resumes from step {state.step} ({place.name}, written by {state.framework})")
    if checkpoint.set_aside(out, state.step, print, aside):
        checkpoint.point_back(out, state)
    return dataclasses.replace(
        state,
        data=digests(kind),
        recipe=dataclasses.asdict(kind.recipe),
        framework=environment["framework"],
        environment=environment,
    )


def _rewind(kind: Kind, out: Path, environment: dict[str, Any], step: int) -> None:
    """Makes a stopped run as it was after ``step``, and notes that a segment begins."""
    checkpoint.check_space(out, _checkpoint_bytes(kind.recipe))
    checkpoint.sweep(out)
    # a run that took moments along has no lines of the steps before it
    if (metrics.cut(out / metrics.FILE, step) or run_folder.first_step(out)) != step:
        print(f"{out / metrics.FILE}: the lines up to step {step} are not all there any more")
    samples.cut(out, step)
    run_folder.note(out, kind.recipe, environment | {"data": kind.describe_source()}, step)


def _checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of a checkpoint: what trains and two moments of it, and small files."""
    return 12 * adapters.count(recipe) + 4 * 2**20


def _train(kind: Kind, out: Path, backend: Backend, engine: Any, gate: Gate, state: RunState) -> int:
    """The loop, with its files and its display around it."""
    recipe, environment = kind.recipe, engine.describe()
    names = (environment[key] for key in ("framework", "version", "device"))
    total, own = params.count(recipe.model), adapters.count(recipe)
    size = f"{total:,} parameters" if own == total else f"{own:,} parameters train beside {total:,}"
    print(f"{out}: {size}, {recipe.train.steps:,} steps; {' '.join(names)}")
    for line in [*engine.unused_limits, engine.note]:
        if line:
            print(line)
    # a frozen weight has no gradient of its own: 4 FLOPs a token, not 6
    flops = chips.training_flops(recipe.model) * (1 if own == total else 2 / 3)
    display = Progress(
        out.name, recipe.train.steps, state.step, recipe.train.log_every, flops,
        chips.peak_flops(environment["device"]), engine.memory,
    )  # fmt: skip
    sinks = metrics.open_sinks(
        out, recipe.train.tensorboard, recipe.train.wandb, dataclasses.asdict(recipe), state.step
    )
    with run_folder.awake(), contextlib.closing(metrics.Metrics(out, sinks)) as lines, display:
        job = Job(out, kind, backend, engine, state, lines, display, kind.args.stop_after or 0)
        began = time.perf_counter()
        kind.begun(job)
        code = loop.train(job)
        display.end()
        display.say(gate.finish(out, engine))
        display.say(_last_line(job, code, time.perf_counter() - began))
        return code


def _last_line(job: Job, code: int, seconds: float) -> str:
    """How good the model is, where it is and what to do with it; or why the run stopped and how to resume it."""
    state, recipe, run = job.state, job.recipe, job.run
    why = loop.finished(recipe, state)
    if not why:
        resume = f"resume with: {job.kind.again(run)}"
        reason = {0: "as asked", 130: "by Ctrl-C", 143: "by SIGTERM"}[code]
        where = f"and saved at step {state.step}" if resolve.follow(run, "last") else "before the first step was done"
        return f"stopped {reason} {where}; {resume}"
    parts = [f"done in {duration(seconds)}"]
    if state.step < recipe.train.steps:
        parts[0] += f", {why}"
    if state.best:
        name = loop.selection_metric(recipe)
        parts.append(f"best validation {name} {state.best[name]:.4f} at step {int(state.best['step'])}")
    if job.kind.reasons and recipe.optim.schedule == "wsd":
        parts.append(f"longer: {job.kind.again(run)} --steps {2 * recipe.train.steps}")
    return "; ".join([*parts, f"model: {resolve.resolve_model(run)}", f"try: mlxgpt {job.kind.trial(run)}"])
