"""metrics.jsonl: one JSON object a line, a line a step or validation; and its optional copies elsewhere.

A line has step, split (train or val) and loss, and what else was measured; a number that is not finite is null. The
file is a function of the run, not of how often it was stopped: resuming cuts it to the checkpoint's step.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.files import atomic_write

FILE = "metrics.jsonl"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, one after the other; a last line that a crash cut short is left out.

    Raises:
        UserError: the file is missing, or a line before the last is not JSON.
    """
    try:
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115  (closed below, by the generator's end)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file:
        damage = ""
        for number, line in enumerate(file, start=1):
            if damage:
                raise UserError(f"{path}, {damage}")
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if line.endswith("\n") and isinstance(entry, dict) and type(entry.get("step")) is int:
                yield entry
            else:
                damage = f"line {number}: found {line.strip()[:40]!r}, expected a JSON object with step"


def cut(path: Path, step: int) -> int:
    """Drops every line after ``step``, and a half-written one; atomically. A missing file is made.

    Returns:
        The last step that is left, 0 where none is.

    Raises:
        UserError: a line before ``step`` is damaged.
    """
    kept: list[dict[str, Any]] = []
    try:
        for entry in read_lines(path) if path.exists() else []:
            if entry["step"] > step:
                break
            kept.append(entry)
    except UserError:
        # what is damaged after the step would go anyway
        if not kept or kept[-1]["step"] < step:
            raise
    with atomic_write(path) as file:
        file.write("".join(map(_line, kept)).encode())
    return kept[-1]["step"] if kept else 0


def _line(entry: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


class Sink(Protocol):
    """Where lines are copied to as well."""

    def write(self, entry: dict[str, Any]) -> None:
        """Takes one line."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class Metrics:
    """Appends to a run's metrics.jsonl and hands each line on to the sinks."""

    def __init__(self, run: Path, sinks: list[Sink]):
        self._path, self._sinks = run / FILE, sinks
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)

    def write(self, **entry: Any) -> None:
        """Writes a line; the system has it when this returns, so a killed process loses none.

        Raises:
            RunError: it cannot be written, such as with no space left.
        """
        try:
            self._file.write(_line(entry))
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self._path}: {error.strerror}") from None
        for sink in self._sinks:
            sink.write(entry)

    def sync(self) -> None:
        """Returns when the lines so far are on disk: before the checkpoint that stands for them is."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"{self._path}: {error.strerror}") from None

    def close(self) -> None:
        """Closes the file and the sinks; a buffer that cannot be written is dropped, for write has said so."""
        with contextlib.suppress(OSError):
            self._file.close()
        for sink in self._sinks:
            sink.close()


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """What of a line is plotted, as ``split/name``."""
    split = entry["split"]
    return {
        f"{split}/{key}": float(value)
        for key, value in entry.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoard:
    """Events in RUN/tensorboard, by TensorBoard's own writer; purges what an earlier segment wrote after ``step``."""

    def __init__(self, run: Path, step: int):
        events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._event, sessions = events.Event, events.SessionLog
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        writers = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._writer = writers.EventFileWriter(str(run / "tensorboard"))
        if step:
            start = sessions(status=sessions.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, entry: dict[str, Any]) -> None:
        """A scalar a number."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in numbers(entry).items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=entry["step"], summary=summary))

    def close(self) -> None:
        """Flushes."""
        self._writer.close()


class WandB:
    """A Weights & Biases run with the folder's name; resuming continues it."""

    def __init__(self, run: Path, project: str, recipe: dict[str, Any]):
        name = run.resolve().name
        self._run = importlib.import_module("wandb").init(
            project=project, name=name, id=name, resume="allow", dir=str(run), config=recipe
        )

    def write(self, entry: dict[str, Any]) -> None:
        """The line's numbers at its step."""
        self._run.log(numbers(entry), step=entry["step"])

    def close(self) -> None:
        """Uploads what is left."""
        self._run.finish()


def check_sinks(tensorboard: bool, wandb: str) -> None:
    """Refuses to start a run whose copies cannot be written.

    Raises:
        UserError: the extra is not installed; says how to install it.
    """
    for wanted, key, package in ((tensorboard, "tensorboard", "tensorboard"), (bool(wandb), "wandb", "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{key}: {package} is not installed; pip install 'mlxgpt[{package}]'")


def open_sinks(run: Path, tensorboard: bool, wandb: str, recipe: dict[str, Any], step: int) -> list[Sink]:
    """The copies that the recipe asks for; ``step`` is where the run goes on from, 0 for a new one."""
    sinks: list[Sink] = [TensorBoard(run, step)] if tensorboard else []
    return sinks + ([WandB(run, wandb, recipe)] if wandb else [])
