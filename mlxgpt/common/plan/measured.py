"""Footprints from real steps of similar copies, which one subprocess runs."""

import contextlib
import functools
import json
import pickle
import selectors
import subprocess
import sys
import time
from typing import Any, NamedTuple

from mlxgpt.common import backend as backends
from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.plan import closed, memory, similar, worker
from mlxgpt.common.plan.memory import Footprint, Piece
from mlxgpt.common.plan.worker import Job

BUDGET = 100e9  # FLOPs of a plan, all measurements together
FIRST, LATER = 12e9, 2e9  # of a measurement: the step that was asked for, and others
MANY = 5  # steps at most
SLOW = 4  # FLOPs count so many times where a CPU multiplies bfloat16 or quantized matrices, 10 times as slowly or more
PATIENCE = 4.2  # seconds from the start of the subprocess that plan waits for measurements
LEAST = 1.7  # seconds of them once the framework is imported, however long that took


class Measured:
    """Calls are a plan's ``Measure``. Use it in ``with``, which ends the subprocess.

    Args:
        backend: mlx or torch.
        device: as ``--device`` has it.
        cpu: whether that is a CPU.
        limit: bytes that the subprocess may take.
        patience: seconds after which what is left is computed (closed form); None: as long as it takes.
        whole: measure the true size, whatever it takes.
    """

    def __init__(
        self,
        backend: str,
        device: str,
        cpu: bool,
        limit: int,
        patience: float | None = None,
        whole: bool = False,
        process: "Process | None" = None,
    ):
        self.backend, self.cpu, self.limit, self.whole = backend, cpu, limit, whole
        self.process = process or Process(backend, device)
        self.ends = None if patience is None else time.monotonic() + patience
        self.late = f"measuring takes over {patience:.1f} s" if patience else ""
        if backend == "mlx" and cpu:
            self.late += ", as long as MLX has kernels to compile"  # by g++, once each, 0.3 s and more
        self.begin()

    def begin(self) -> None:
        """Begins a plan: nothing is spent or known."""
        self.broken = False  # nothing more can be measured
        self.spent = 0.0  # FLOPs
        self.steps = 0
        self.notes: list[str] = []
        self.ratio: float | None = None  # measured / closed form
        self.found: dict[bytes, int] = {}

    def __enter__(self) -> "Measured":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()

    def __call__(self, recipe: Recipe, rows: int, length: int, micro_batches: int = 1) -> Footprint:
        """See memory.Measure. Of the first call, half the tokens are measured too, which tells what grows with them."""
        first = not self.found
        if not first and self.ends and self.backend == "torch" and recipe.train.checkpoint_activations:
            return self._closed(
                recipe, rows, length, micro_batches
            )  # PyTorch would import its compiler, which takes 5 s
        count = min(micro_batches, 2)  # the second finds the first one's gradients, as any other does
        job = self._job(recipe, rows, length, count, first)
        peak = job and self._ask(job, recipe)
        if not job or not peak:
            return self._closed(recipe, rows, length, micro_batches)
        if first:
            self.ratio = peak / self._by_formula(recipe, rows, length, micro_batches).peak
        half = None
        if first and job.length > 1:
            half = self._ask(job._replace(length=job.length // 2, steps=similar.STEPS), recipe)
        formula = self._by_formula(recipe, rows, length, micro_batches)
        return Footprint(peak, pieces(similar.state(recipe, not self.cpu), formula, peak, half))

    def _job(self, recipe: Recipe, rows: int, length: int, count: int, first: bool) -> Job | None:
        """The copy to measure; None where none is cheap enough."""
        if self.whole and first:
            return Job(recipe, rows, length, count, 1, similar.STEPS + 1)
        share = min(FIRST if first else LATER, BUDGET - self.spent)
        scale = similar.smallest_scale(recipe, rows, length, count, share / self._slowness(recipe), not self.cpu)
        if scale is None:
            self._note("a measurement would take too long")
            return None
        copy, tokens = similar.similar(recipe, rows, length, scale, not self.cpu)
        steps = similar.STEPS if first else 1
        if first and scale == 1:  # how far MLX runs ahead of what it computes differs from step to step
            each = self._slowness(recipe) * similar.flops(copy, rows, tokens, count)
            steps = max(similar.STEPS, min(MANY, int(share / each)))
        return Job(copy, rows, tokens, count, scale, steps)

    def _slowness(self, recipe: Recipe) -> int:
        quantized = recipe.adapter and recipe.adapter.bits and recipe.adapter.dequantize == "never"
        return SLOW if self.cpu and (recipe.train.compute_dtype == "bfloat16" or quantized) else 1

    def _note(self, why: str) -> None:
        if self.ratio is None:
            note = f"memory is from a closed form, to about 25%: {why}; --measure waits, for the true size"
        else:
            note = "layers, rows or lengths other than the recipe's: from a closed form, corrected by what was measured"
        if not self.notes:
            self.notes.append(note)

    def _by_formula(self, recipe: Recipe, rows: int, length: int, micro_batches: int) -> Footprint:
        return closed.footprint(recipe, rows, length, micro_batches, self.backend, not self.cpu)

    def _closed(self, recipe: Recipe, rows: int, length: int, micro_batches: int) -> Footprint:
        """The closed form, corrected by what was measured, if anything was."""
        found = self._by_formula(recipe, rows, length, micro_batches)
        ratio = self.ratio or 1.0
        return Footprint(
            int(found.peak * ratio), [piece._replace(size=int(piece.size * ratio)) for piece in found.pieces]
        )

    def _ask(self, job: Job, recipe: Recipe) -> int | None:
        """Bytes of the true size; None if it could not be measured."""
        key = pickle.dumps(job)
        if key in self.found:
            return self.found[key]
        left = None if self.ends is None else self.ends - time.monotonic()
        if self.broken or (left is not None and left <= 0):
            self._note(self.late)
            return None
        answer = self._answer(key, left)
        if "error" in answer:
            self._note(answer["error"])
            return None
        self.spent += job.steps * similar.flops(job.recipe, job.rows, job.length, job.micro_batches)
        self.steps += job.steps
        self.found[key] = similar.grown(recipe, job, answer, not self.cpu)
        return self.found[key]

    def _answer(self, job: bytes, left: float | None) -> dict[str, Any]:
        """What the subprocess says to a pickled job within ``left`` seconds."""
        try:
            line = self.process.ask(job, self.limit, left)
        except OSError as error:
            line, late = None, f"no process could be started or asked ({error.strerror})"
        else:
            late = self.late
        if line:
            return json.loads(line)
        self.broken = True
        self.process.close()
        return {"error": late if line is None else "the process that measures ended, out of memory perhaps"}


class Process:
    """The subprocess, in a group of its own: Ctrl-C reaches the parent alone, which then ends the group.

    The parent need not import the framework, which takes PyTorch seconds: the subprocess tells what the device is. Use
    it in ``with``, which ends it.
    """

    def __init__(self, backend: str, device: str):
        self.command = [sys.executable, "-m", f"{PACKAGES[backend]}.footprint", device]
        self.running: subprocess.Popen | None = None
        self.started = time.monotonic()
        self.limited = False  # told its limit

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def patience(self) -> float:
        """Seconds that a plan which shall take less than five may still wait."""
        return max(LEAST, PATIENCE - (time.monotonic() - self.started))

    def close(self) -> None:
        """Ends the subprocess; a compiler that it runs finishes its kernel, half of which would break later runs."""
        process, self.running = self.running, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()

    def begin(self) -> dict[str, Any] | None:
        """Starts it, and returns what it says of the device (worker.introduce); None if it ended instead.

        Raises:
            OSError: no process could be started.
        """
        self.close()
        self.limited = False
        self.running = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        assert self.running.stdout
        line = self.running.stdout.readline()
        return json.loads(line) if line else None

    def ask(self, job: bytes, limit: int, left: float | None) -> bytes | None:
        """The line that answers a pickled Job; None if it takes more than ``left`` seconds, empty if it ended.

        Args:
            limit: bytes that the subprocess may take; told once.

        Raises:
            OSError: no process could be started or asked.
        """
        if self.running is None and self.begin() is None:
            return b""
        assert self.running and self.running.stdin and self.running.stdout
        self.running.stdin.write(job if self.limited else pickle.dumps(limit) + job)
        self.running.stdin.flush()
        self.limited = True
        with selectors.DefaultSelector() as ready:
            ready.register(self.running.stdout, selectors.EVENT_READ)
            return self.running.stdout.readline() if ready.select(left) else None


def pieces(state: dict[str, int], formula: Footprint, peak: int, half: int | None) -> list[Piece]:
    """A peak by component: weights and moments are known, activations and logits grow with the tokens.

    Args:
        state: bytes of weights and moments.
        formula: the closed form's footprint, which has a share of logits in what grows.
        half: the peak of half the tokens, if it was measured.
    """
    rest = max(0, peak - sum(state.values()))
    growing = rest if half is None else min(rest, max(0, 2 * (peak - half)))
    parts = {piece.label: piece.size for piece in formula.pieces}
    wide = parts.get("logits", 0) / (parts.get("logits", 0) + parts.get("activations", 0) or 1)
    logits = int(growing * wide)
    made = state | {"gradients": rest - growing, "logits": logits, "activations": growing - logits}
    made["weights"] += peak - sum(made.values())
    return [Piece(name, (), size) for name, size in made.items()]


class Here(NamedTuple):
    """This machine's device, as a framework describes it: its name, whether it is a CPU, devices.capacity of it."""

    backend: str
    device: str
    cpu: bool
    capacity: dict[str, int]


def look(name: str | None, device: str) -> tuple[Process, Here]:
    """A process that measures on ``device`` with the framework ``name`` (None: the one that is here); what it is.

    Raises:
        UserError: no such framework, or no such device.
    """
    chosen = backends.presumed(name)
    process = Process(chosen, device)
    try:
        found = process.begin()
    except OSError:
        found = None
    except BaseException:  # Ctrl-C
        process.close()
        raise
    if found is None:  # the framework does not import, or no process can be started: this one is told why
        process.close()
        devices = backends.load(name).engine.devices
        found = worker.introduce(device, devices)
        chosen = backends.resolve(name)
        process = Process(chosen, device)
    if "refused" in found:
        process.close()
        raise UserError(found["refused"])
    return process, Here(chosen, **found)


def computed(backend: str, gpu: bool) -> memory.Measure:
    """The closed form as a Measure, for chips that are not here, and where dozens of models are tried."""
    return functools.partial(closed.footprint, backend=backend, gpu=gpu)
