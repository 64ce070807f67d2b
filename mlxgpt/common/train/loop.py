"""THE loop: whatever is trained, in whichever framework, passes through ``train``.

A step is: batch, rate, update, its line in metrics.jsonl, guards; then, where they are due, validation, save, samples.
Everything that decides is in RunState, which a checkpoint holds, so a run that was stopped anywhere resumes as if it
had never stopped. The loss of step s is the one before update s.
"""

import contextlib
import math
import re
import time
from collections.abc import Iterator

from mlxgpt.common.batch import StepStats
from mlxgpt.common.config import Recipe
from mlxgpt.common.failures import CompilerFailed, doing
from mlxgpt.common.model import adapters
from mlxgpt.common.runs import samples
from mlxgpt.common.runs.checkpoint import RunState
from mlxgpt.common.train import guards, schedule, tasks
from mlxgpt.common.train.job import Job
from mlxgpt.common.train.saver import Saver
from mlxgpt.common.train.signals import Signals


def train(job: Job) -> int:
    """Runs a job to the end of its schedule or until it is stopped; its last step is then saved.

    Returns:
        0: the end, ``stop_after`` or early stopping; 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        RunError: three steps in a row were not finite, a tensor does not train, memory lacked, or a checkpoint cannot
            be written.
    """
    saver = Saver(job)
    with Signals(job.kind.ends_at_second) as signals, saver:
        try:
            _steps(job, signals, saver)
        except CompilerFailed:
            # the signal reached a compiler too, in the middle of a step: the engine's state is not whole
            if not signals.came():
                raise
            job.state.step = saver.step
        else:
            saver.save()
        saver.wait()
        done = bool(finished(job.recipe, job.state))
        if done and not signals.received:
            _sample(job, signals)
            with _stopped_whole(signals), doing("scores after the last step"):
                job.kind.finish(job)
    return 0 if done else signals.exit_code


def _steps(job: Job, signals: Signals, saver: Saver) -> None:
    """Steps until the end, ``stop_after``, early stopping or a signal."""
    settings, state, engine, progress = job.recipe.train, job.state, job.engine, job.progress
    first, finite = state.step + 1, guards.Finite()
    watch = guards.FirstUpdates(engine, adapters.trainable(job.recipe))
    compiling = ", compilation included" if engine.describe().get("compiled") == "True" else ""
    stopped_early = False
    if not job.kind.seeded:
        saver.save()
    if _unvalidated(job):
        # the run was stopped between a step and the validation that follows it
        stopped_early = _validate(job, signals, saver)

    last = min(settings.steps, job.stop_after or settings.steps)
    while state.step < last and not signals.received and not stopped_early:
        step, start = state.step + 1, time.perf_counter()
        batch = job.kind.source.batch(step)
        if step == 1:
            progress.say(guards.describe_targets(batch))
        rate = schedule.rate(job.recipe.optim, step, settings.steps)
        with doing(f"step {step}"):
            if batch.idle:
                stats = StepStats(0.0, batch.weight, 0.0, True)
            else:
                stats = engine.train_step(step, batch.split(settings.micro_batch_size), rate)
        now = time.perf_counter()

        loss, tokens = stats.loss_sum / stats.weight, batch.tokens.size
        state.step, state.t, state.tokens = step, engine.t, state.tokens + tokens
        line = {"step": step, "split": "train", "loss": loss, "lr": rate, "grad_norm": stats.grad_norm}
        line |= job.kind.figures(step, stats.sums | {"weight": stats.weight})
        line |= {"tokens": state.tokens, "seconds": round(now - start, 6), "memory": engine.memory()["peak"]}
        if batch.idle:
            line["idle"] = batch.idle
        if not stats.finite:
            line["skipped"] = True
        job.metrics.write(**line)
        progress.step(step, loss, rate, stats.grad_norm, tokens, now - start, now)
        if step == first:
            progress.say(f"first step: {now - start:.2f} s{compiling}")
        if message := finite.check(step, stats, batch):
            progress.say(message)
        elif not batch.idle and (stats.grad_norm or not job.recipe.rl):  # clipped ratios may leave no gradient
            watch.check(stats, rate)
        saver.check()

        if _unvalidated(job):
            stopped_early = _validate(job, signals, saver)
        stable = step == schedule.last_stable(job.recipe.optim, settings.steps)
        if (_due(settings.save_every, step) or stable) and not finite.streak:
            saver.save()
        if _due(settings.sample_every, step) and step < settings.steps:
            _sample(job, signals)


@contextlib.contextmanager
def _stopped_whole(signals: Signals) -> Iterator[None]:
    """Ends a block that changes no weights where a signal stopped a compiler in it: the state is as before."""
    try:
        yield
    except CompilerFailed:
        if not signals.came():
            raise


def _sample(job: Job, signals: Signals) -> None:
    """Shows what the model writes now, and keeps it in samples.jsonl."""
    found = None
    with (
        _stopped_whole(signals),
        doing(f"sample at step {job.state.step}", "a smaller sample.max_tokens, or 0, would fit"),
    ):
        found = job.kind.sample(job)
    if found is None:
        return
    text, parts = (found, {}) if isinstance(found, str) else (samples.joined(found), found)
    samples.append(job.run, job.state.step, text, parts)
    shown = re.sub(r"\n\s*\n", "\n\n", text.strip())  # samples.jsonl has it as it is
    job.progress.say(f"sample at step {job.state.step}:\n{shown}")


def finished(recipe: Recipe, state: RunState) -> str:
    """Why the run is finished, or '' while it is not."""
    if recipe.train.eval_every and state.step == recipe.train.steps and state.evaluated < state.step:
        return ""
    if state.step >= recipe.train.steps:
        return f"all {state.step} steps are done"
    if recipe.train.early_stop and state.stale >= recipe.train.early_stop:
        return (
            f"stopped early at step {state.step}: {state.stale} validations without a better {selection_metric(recipe)}"
        )
    return ""


def _unvalidated(job: Job) -> bool:
    """Whether the validation after the state's step has not been done yet."""
    every, step = job.recipe.train.eval_every, job.state.step
    return job.state.evaluated < step and (_due(every, step) or (every > 0 and step == job.recipe.train.steps))


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _validate(job: Job, signals: Signals, saver: Saver) -> bool:
    """Scores the validation split and saves a new best checkpoint; True if the run should stop early.

    A signal interrupts it and leaves no trace: a resumed run validates again.
    """
    state, start = job.state, time.perf_counter()
    scored = None
    with _stopped_whole(signals), doing(f"validation after step {state.step}"):
        scored = _scored(job, signals)
    if scored is None:
        job.progress.status("")
        return False
    found, targets, asked = scored
    seconds = round(time.perf_counter() - start, 6)
    more = {"tasks": asked} if asked else {}
    job.metrics.write(step=state.step, split="val", **found, targets=targets, **more, seconds=seconds)
    state.evaluated = state.step
    name = selection_metric(job.recipe)
    better = is_better(name, found, state.best)
    if better:
        state.best, state.stale = {"step": state.step, "loss": found["loss"], name: found[name]}, 0
    else:
        state.stale += 1
    job.progress.status("")
    job.progress.validation(state.step, found, name, state.best, tasks.shown(asked))
    if better:
        saver.save()
    early_stop = job.recipe.train.early_stop
    return bool(early_stop and state.stale >= early_stop)


def _scored(job: Job, signals: Signals) -> tuple[dict[str, float], int, tasks.Scores] | None:
    """Metrics of the validation split, its count of targets, and those of tasks; None if a signal came."""
    settings = job.recipe.train
    total: dict[str, float] = {}
    for number, batch in enumerate(job.kind.source.validation(), start=1):
        if signals.received:
            return None
        job.progress.status(f"validating {number}")
        for part in batch.split(settings.micro_batch_size):
            for name, value in job.engine.evaluate(part).items():
                total[name] = total.get(name, 0.0) + value
    found = {"loss": total["loss"] / total["weight"]} | job.kind.score(job, total)
    asked: tasks.Scores = {}
    if job.kind.tasks:
        try:
            asked = job.kind.tasks.score(job.backend, job.engine.model, job.progress.status, lambda: signals.received)
        except tasks.Stopped:
            return None
    return found, round(total["weight"]), asked


def selection_metric(recipe: Recipe) -> str:
    """The metric that selects the best checkpoint: the loss, where less is better, or another, where more is."""
    return recipe.tune.keep_best if recipe.tune else "loss"


def is_better(name: str, found: dict[str, float], best: dict[str, float] | None) -> bool:
    """Whether a validation beats the best so far; one that is not finite never does."""
    if not math.isfinite(found[name]):
        return False
    sign = -1 if name == "loss" else 1
    return best is None or sign * found[name] > sign * best[name]
