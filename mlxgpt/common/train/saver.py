"""Checkpoints beside the loop: a second thread writes them, and its failure is not lost."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from mlxgpt.common import failures
from mlxgpt.common.errors import RunError
from mlxgpt.common.folders import resolve
from mlxgpt.common.plan import advice, gate
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.train import schedule
from mlxgpt.common.train.job import Job
from mlxgpt.common.units import size


class Writer:
    """Runs saves, on a second thread where ``background``; at most one is in flight, and a failure surfaces."""

    def __init__(self, background: bool):
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, save: Callable[[], None]) -> None:
        """Starts ``save`` when the one before is done."""
        self.wait()
        if not self._background:
            save()
            return
        self._thread = threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, save: Callable[[], None]) -> None:
        try:
            save()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raises what a save that has ended raised; never waits."""
        if self._thread and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is in flight; raises what the save raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error


class Saver:
    """Saves a job's checkpoints. On every way out it waits for the save that is in flight."""

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
        failure, job = None, self._job
        if known := failures.meaning(error):
            line = f"after step {job.state.step}: {known.line}"
            error = known.kind(line)
        try:
            self._writer.wait()
        except Exception as other:
            failure = other
        if isinstance(error, RunError):
            good = resolve.follow(job.run, "last")
            where = f"the last good checkpoint is {good}" if good else "no checkpoint had been saved"
            also = "" if failure is None or failure is error else f" ({failure})"
            cure = f"; {self._cure(error)}" if isinstance(error, failures.OutOfMemory) else ""
            raise RunError(f"{error}; the run stops; {where}{also}{cure}") from None

    def _cure(self, error: failures.OutOfMemory) -> str:
        """How a run that ran out of memory goes on."""
        job = self._job
        resume = job.kind.again(job.run)
        if error.advised:
            return f"{resume} continues it"
        try:
            device = job.backend.engine.devices.use(job.kind.args.device)
            limit = gate.room(job.backend, device)["limit"] + job.engine.memory()["active"]
            gpu = job.engine.describe()["device"] != "cpu"
            settings, need = advice.smaller(job.recipe, job.backend.name, gpu, limit)
        except Exception:
            # what is said must not depend on a device that has just failed
            return f"{resume} --set train.micro_batch_size=1 --set train.checkpoint_activations=true needs the least"
        if not settings:
            return (
                "its micro-batch is one row and activations are recomputed already: expected a smaller model or "
                f"shorter rows, in a new run; {resume} continues this one where more memory is free"
            )
        fits = f"would fit, with {size(need)} predicted" if need else "needs the least, and may still be too much"
        return f"{resume} {advice.as_flags(settings)} {fits}"

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 before the first."""
        return self._saved.step if self._saved else 0

    def save(self) -> None:
        """Copies the state on this thread and writes it on the other, unless this very state is saved already."""
        job = self._job
        if self._saved == job.state:
            return
        self._writer.wait()
        snapshot, state, recipe = job.engine.snapshot(), dataclasses.replace(job.state), job.recipe
        self._saved = state

        def write() -> None:
            start = time.perf_counter()
            job.metrics.sync()
            stable = schedule.last_stable(recipe.optim, recipe.train.steps)
            place, size = checkpoint.write(
                job.run, snapshot, recipe.model, None, state, recipe.train.keep, job.kind.write_weights, stable
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
