"""metrics.jsonl: one JSON object per step or validation, on a line each; and optional copies elsewhere.

A line has step, split (train or val), loss and further metrics; a number that is not finite is null. The file does
not depend on how often the run was stopped: resuming truncates it to the checkpoint's step.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.files import atomic_write, flush

FILE = "metrics.jsonl"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash truncated is skipped.

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
    """Drops every line after ``step`` and an incomplete one, atomically. A missing file is created.

    Returns:
        The last remaining step, 0 if there is none.

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
        # damage after the step is dropped anyway
        if not kept or kept[-1]["step"] < step:
            raise
    with atomic_write(path) as file:
        file.write("".join(map(_line, kept)).encode())
    return kept[-1]["step"] if kept else 0


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(_finite(entry), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(entry: dict[str, Any]) -> dict[str, Any]:
    """A line with what is inside others named by the way to it: ``tasks/quiz/acc``."""
    found: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            found |= {f"{key}/{name}": each for name, each in flat(value).items()}
        else:
            found[key] = value
    return found


class Sink(Protocol):
    """A further destination of the lines."""

    def write(self, entry: dict[str, Any]) -> None:
        """Takes one line."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class Metrics:
    """Appends to a run's metrics.jsonl and passes each line to the sinks."""

    def __init__(self, run: Path, sinks: list[Sink]):
        self._path, self._sinks = run / FILE, sinks
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)

    def write(self, **entry: Any) -> None:
        """Writes a line and hands it to the system, so a killed process loses none.

        Raises:
            RunError: it cannot be written, for example because the disk is full.
        """
        try:
            self._file.write(_line(entry))
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self._path}: {error.strerror}") from None
        for sink in self._sinks:
            sink.write(entry)

    def sync(self) -> None:
        """Returns when the lines so far are on disk; call it before their checkpoint is written."""
        try:
            flush(self._file.fileno())
        except OSError as error:
            raise RunError(f"{self._path}: {error.strerror}") from None

    def close(self) -> None:
        """Closes the file and the sinks; drops a buffer that cannot be written, since write has raised for it."""
        with contextlib.suppress(OSError):
            self._file.close()
        for sink in self._sinks:
            sink.close()


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line that are plotted, as ``split/name``."""
    split = entry["split"]
    return {
        f"{split}/{key}": float(value)
        for key, value in flat(entry).items()
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
    """Refuses a run whose sinks cannot be opened.

    Raises:
        UserError: the package is not installed; names the extra.
    """
    for wanted, key, package in ((tensorboard, "tensorboard", "tensorboard"), (bool(wandb), "wandb", "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{key}: {package} is not installed; pip install 'mlxgpt[{package}]'")


def open_sinks(run: Path, tensorboard: bool, wandb: str, recipe: dict[str, Any], step: int) -> list[Sink]:
    """The sinks that the recipe asks for; ``step`` is where the run resumes from, 0 for a new one."""
    sinks: list[Sink] = [TensorBoard(run, step)] if tensorboard else []
    return sinks + ([WandB(run, wandb, recipe)] if wandb else [])
