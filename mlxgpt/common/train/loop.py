"""THE loop: whatever is trained, in whichever framework, passes through ``train``.

A step is: batch, rate, update, its line in metrics.jsonl, guards; then, where they are due, validation, save, samples.
Everything that decides is in RunState, which a checkpoint holds, so a run that was stopped anywhere goes on as if it
had not been. The loss of step s is the one before update s.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.common.batch import Engine, Source
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import RunError
from mlxgpt.common.folders import resolve
from mlxgpt.common.model import adapters
from mlxgpt.common.runs import checkpoint, samples
from mlxgpt.common.runs.checkpoint import RunState
from mlxgpt.common.runs.metrics import Metrics
from mlxgpt.common.train import guards, schedule
from mlxgpt.common.train.progress import Progress
from mlxgpt.common.train.saver import Writer
from mlxgpt.common.train.signals import Signals
from mlxgpt.common.units import duration


@dataclass
class Job:
    """All that the loop works with. ``recipe`` is resolved; ``state`` is where it starts from."""

    run: Path
    recipe: Recipe
    engine: Engine
    source: Source
    tokenizer: Any  # common.tokenizer.Tokenizer, or None
    state: RunState
    metrics: Metrics
    progress: Progress
    sample: Callable[[], str] | None = None
    stop_after: int = 0
    save_first: bool = False  # the weights came from elsewhere: a seed cannot make them again
    verb: str = "train"  # what resumes it
    score: Callable[[dict[str, float]], dict[str, float]] | None = None  # of a validation's sums, more to judge by
    write_adapter: checkpoint.WriteAdapter | None = None  # what a checkpoint holds in place of a model folder
    finish: Callable[["Job"], None] | None = None  # at the end of the whole run
    outcome: Callable[[], str] | None = None  # a line about the plan and what happened, before the last one


def train(job: Job) -> int:
    """Runs a job to the end of its schedule, or until it is stopped; the newest checkpoint is then of its last step.

    Returns:
        0: the end, ``stop_after`` or early stopping; 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        RunError: three steps in a row were not finite, a tensor does not train, or a checkpoint cannot be written.
    """
    settings, state, engine, progress = job.recipe.train, job.state, job.engine, job.progress
    began, first = time.perf_counter(), state.step + 1
    saver, finite = Saver(job), guards.Finite()
    watch = guards.FirstUpdates(engine, adapters.trainable(job.recipe))
    compiling = ", compilation included" if engine.describe().get("compiled") == "True" else ""
    stopped_early = False
    with Signals() as signals, saver:
        if job.save_first:
            saver.save()
        if _unvalidated(job):
            # it was stopped between a step and the validation that follows it
            stopped_early = _validate(job, signals, saver)

        last = min(settings.steps, job.stop_after or settings.steps)
        while state.step < last and not signals.received and not stopped_early:
            step, start = state.step + 1, time.perf_counter()
            batch = job.source.batch(step)
            if step == 1:
                progress.say(guards.targets(batch))
            rate = schedule.rate(job.recipe.optim, step, settings.steps)
            stats = engine.train_step(step, batch.split(settings.micro_batch_size), rate)
            now = time.perf_counter()

            loss, tokens = stats.loss_sum / stats.weight, batch.tokens.size
            state.step, state.t, state.tokens = step, engine.t, state.tokens + tokens
            line = {"step": step, "split": "train", "loss": loss, "lr": rate, "grad_norm": stats.grad_norm}
            line |= {name: value / stats.weight for name, value in stats.sums.items()}
            line |= {"tokens": state.tokens, "seconds": round(now - start, 6), "memory": engine.memory()["peak"]}
            if not stats.finite:
                line["skipped"] = True
            job.metrics.write(**line)
            progress.step(step, loss, rate, stats.grad_norm, tokens, now - start, now)
            if step == first:
                progress.say(f"first step: {now - start:.2f} s{compiling}")
            if message := finite.check(step, stats, batch):
                progress.say(message)
            else:
                watch.check(stats, rate)
            saver.check()

            if _unvalidated(job):
                stopped_early = _validate(job, signals, saver)
            if _due(settings.save_every, step) and not finite.streak:
                saver.save()
            if job.sample and _due(settings.sample_every, step) and step < settings.steps:
                _sample(job)

        saver.save()
        saver.wait()
        done = bool(finished(job.recipe, state))
        if done and job.sample and not signals.received:
            _sample(job)
        if done and job.finish and not signals.received:
            job.finish(job)
    if job.outcome:
        progress.say(job.outcome())
    if done:
        progress.say(_verdict(job, time.perf_counter() - began))
    else:
        reason = {0: "as asked", 130: "by Ctrl-C", 143: "by SIGTERM"}[signals.exit_code]
        progress.say(
            f"stopped {reason} and saved at step {state.step}; goes on with: mlxgpt {job.verb} --resume {job.run}"
        )
    return 0 if done else signals.exit_code


def _sample(job: Job) -> None:
    """Shows what the model writes now, and keeps it in samples.jsonl."""
    assert job.sample
    text = job.sample()
    samples.append(job.run, job.state.step, text)
    job.progress.say(f"sample at step {job.state.step}:\n{text}")


def finished(recipe: Recipe, state: RunState) -> str:
    """Why there is nothing left to do, or ''."""
    if recipe.train.eval_every and state.step == recipe.train.steps and state.evaluated < state.step:
        return ""
    if state.step >= recipe.train.steps:
        return f"all {state.step} steps are done"
    if recipe.train.early_stop and state.stale >= recipe.train.early_stop:
        return f"stopped early at step {state.step}: {state.stale} validations without a better {judged_by(recipe)}"
    return ""


def _unvalidated(job: Job) -> bool:
    """Whether the validation that follows the state's step is still to be done."""
    every, step = job.recipe.train.eval_every, job.state.step
    return job.state.evaluated < step and (_due(every, step) or (every > 0 and step == job.recipe.train.steps))


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _validate(job: Job, signals: Signals, saver: "Saver") -> bool:
    """Scores the validation split and keeps the best checkpoint; True where the run should stop early.

    A signal breaks it off without a trace: resuming does it again.
    """
    state, settings, start = job.state, job.recipe.train, time.perf_counter()
    total: dict[str, float] = {}
    for number, batch in enumerate(job.source.validation(), start=1):
        if signals.received:
            job.progress.status("")
            return False
        job.progress.status(f"validating {number}")
        for part in batch.split(settings.micro_batch_size):
            for name, value in job.engine.evaluate(part).items():
                total[name] = total.get(name, 0.0) + value
    found = {"loss": total["loss"] / total["weight"]}
    if job.score:
        job.progress.status("answering")
        found |= job.score(total)
    seconds = round(time.perf_counter() - start, 6)
    job.metrics.write(step=state.step, split="val", **found, targets=round(total["weight"]), seconds=seconds)
    state.evaluated = state.step
    name = judged_by(job.recipe)
    better = is_better(name, found, state.best)
    if better:
        state.best, state.stale = {"step": state.step, "loss": found["loss"], name: found[name]}, 0
    else:
        state.stale += 1
    job.progress.status("")
    job.progress.validation(state.step, found, name, state.best)
    if better:
        saver.save()
    return bool(settings.early_stop and state.stale >= settings.early_stop)


def judged_by(recipe: Recipe) -> str:
    """What the best validation is best by: the loss, where less is better, or a metric, where more is."""
    return recipe.tune.keep_best if recipe.tune else "loss"


def is_better(name: str, found: dict[str, float], best: dict[str, float] | None) -> bool:
    """Whether a validation beats the best so far; one that is not finite never does."""
    if not math.isfinite(found[name]):
        return False
    sign = -1 if name == "loss" else 1
    return best is None or sign * found[name] > sign * best[name]


def _verdict(job: Job, seconds: float) -> str:
    """The last line: how good it is, where it is, and what to do with it."""
    state, settings = job.state, job.recipe.train
    parts = [f"done in {duration(seconds)}"]
    if state.step < settings.steps:
        parts[0] += f", {finished(job.recipe, state)}"
    if state.best:
        name = judged_by(job.recipe)
        parts.append(f"best validation {name} {state.best[name]:.4f} at step {int(state.best['step'])}")
    model = resolve.resolve_model(job.run)
    trial = f"classify --model {job.run} --text" if job.recipe.model.labels else f"generate --model {job.run} --prompt"
    return "; ".join([*parts, f"model: {model}", f"try: mlxgpt {trial} TEXT"])


class Saver:
    """Checkpoints from the loop's side. On every way out it waits for the save that is in flight."""

    def __init__(self, job: Job):
        self._job, self._writer = job, Writer(job.recipe.train.background)
        there = resolve.path_of(job.run, job.state.step).is_dir()
        self._saved = dataclasses.replace(job.state) if there else None
        self._written: list[str] = []
        self._announced = False

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        failure = None
        try:
            self._writer.wait()
        except Exception as other:
            failure = other
        if isinstance(error, RunError):
            good = resolve.follow(self._job.run, "last")
            where = f"the last good checkpoint is {good}" if good else "no checkpoint had been saved"
            also = "" if failure is None or failure is error else f" ({failure})"
            raise RunError(f"{error}; the run stops; {where}{also}") from None

    def save(self) -> None:
        """Copies the state on this thread and writes it on the other, unless just this state is saved already."""
        job = self._job
        if self._saved == job.state:
            return
        self._writer.wait()
        snapshot, state = job.engine.snapshot(), dataclasses.replace(job.state)
        self._saved = state

        def write() -> None:
            start = time.perf_counter()
            job.metrics.sync()
            place, size = checkpoint.write(
                job.run, snapshot, job.recipe.model, job.tokenizer, state, job.recipe.train.keep, job.write_adapter
            )
            seconds = time.perf_counter() - start
            self._written.append(f"first save: {place}, {size / 2**20:.1f} MiB in {seconds:.2f} s")

        self._writer.submit(write)
        self._announce()

    def check(self) -> None:
        """Says that the first save is done; raises what a save raised."""
        self._writer.check()
        self._announce()

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._writer.wait()
        self._announce()

    def _announce(self) -> None:
        if self._written and not self._announced:
            self._announced = True
            self._job.progress.say(self._written[0])
