"""A run's folder beside its checkpoints: its name, its lock, recipe.toml, environment.json."""

import contextlib
import fcntl
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import mlxgpt
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import atomic_write, write_json
from mlxgpt.common.folders import resolve
from mlxgpt.common.plan import chips
from mlxgpt.common.recipes import to_toml

ENVIRONMENT = "environment.json"


def unused(out: Path | None, name: str) -> Path:
    """The folder for a new run: ``out``, or the first free one of runs/NAME, runs/NAME-2 and so on.

    Raises:
        UserError: it exists, or cannot be made.
    """
    if out is None:
        out, number = Path("runs") / name, 2
        while out.exists():
            out, number = Path("runs") / f"{name}-{number}", number + 1
    elif out.exists() or out.is_symlink():
        hint = f"; --resume {out} resumes it" if resolve.is_run(out) else ""
        raise UserError(f"{out}: exists; expected a folder that does not{hint}")
    parent = existing(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made: {parent} is {'read-only' if parent.is_dir() else 'not a folder'}")
    return out


def existing(place: Path) -> Path:
    """The nearest parent of ``place`` that exists."""
    parent = place.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def make(out: Path) -> None:
    """Makes an empty run folder.

    Raises:
        UserError: the system refuses, or another process made it first.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.mkdir()
        (out / "checkpoints").mkdir()
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}") from None


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Locks the run against other processes; the system releases the lock when this one ends.

    Raises:
        UserError: another process holds it.
    """
    with open(run / ".lock", "a+", encoding="utf-8") as file:
        for patience in (*[0.05] * 4, 0):  # a process that only looks at the lock holds it for an instant
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience:
                    time.sleep(patience)
                    continue
                file.seek(0)
                raise UserError(f"{run}: in use by process {file.read().strip() or '(unknown)'}") from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def holder(run: Path) -> str:
    """The process that holds the run's lock; '' if none does."""
    try:
        with open(run / ".lock", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "(unknown)"
    except OSError:
        pass
    return ""


def begin(
    out: Path,
    recipe: Recipe,
    environment: dict[str, Any],
    init_from: str | None,
    step: int = 0,
    reasons: Sequence[str] = (),
) -> None:
    """Writes the first files of a new run; if that fails, removes the folder."""
    try:
        note(out, recipe, environment, step, init_from, reasons)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def note(
    run: Path,
    recipe: Recipe,
    environment: dict[str, Any],
    step: int,
    init_from: str | None = None,
    reasons: Sequence[str] = (),
) -> None:
    """Writes recipe.toml, under ``reasons`` or its comments, and this segment's entry in environment.json."""
    head = [f"# {line}" for line in reasons] or _comments(run / "recipe.toml")
    with atomic_write(run / "recipe.toml") as file:
        file.write("\n".join([*head, *[""] * bool(head), to_toml(recipe)]).encode())
    segment = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "mlxgpt": mlxgpt.__version__,
        **environment,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "chip": chips.chip_name(),
        **_commit(),
        "init_from": init_from,
        "command": sys.argv[1:],
    }
    write_json(run / ENVIRONMENT, [*segments(run), segment])


def _comments(path: Path) -> list[str]:
    """The comments that a file begins with."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = path.read_text(encoding="utf-8").splitlines()
        return list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    return []


def segments(run: Path) -> list[dict[str, Any]]:
    """The entries of environment.json; none if the file cannot be read."""
    try:
        found = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [segment for segment in found if isinstance(segment, dict)] if isinstance(found, list) else []


def first_step(run: Path) -> int:
    """The step after which the run began: 0 unless it started with an optimizer state."""
    found = segments(run)
    step = found[0].get("from_step") if found else 0
    return step if type(step) is int else 0


def _commit() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this code runs from; None outside a checkout."""
    root = Path(mlxgpt.__file__).parent.parent
    made: dict[str, Any] = {"commit": None, "dirty": None}
    if not (root / ".git").exists():
        return made
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        for key, command in (("commit", ["rev-parse", "HEAD"]), ("dirty", ["status", "--porcelain", "-uno"])):
            # without the lock that status takes to refresh the index: a run that is killed would leave it behind
            git = ["git", "--no-optional-locks", "-C", str(root), *command]
            done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
            made[key] = bool(done.stdout) if key == "dirty" else done.stdout.strip()
    return made


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keeps a Mac from idle sleep while it trains."""
    tool = shutil.which("caffeinate") if sys.platform == "darwin" else None
    process = subprocess.Popen([tool, "-i", "-w", str(os.getpid())]) if tool else None
    try:
        yield
    finally:
        if process:
            process.terminate()
            process.wait()
