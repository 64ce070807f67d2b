"""Checkpoints of a run: complete and verified, or not there.

    RUN/checkpoints/step-0000500/             a model folder (float32 weights, tokenizer files) or an adapter
        training/optimizer.safetensors        m.NAME, v.NAME (float32, our names and layout), t (int64)
        training/state.json                   the RunState below; files: sha256 of every other file; sha256: of itself
    RUN/best  RUN/last                        relative links, or files of one line; hints only

A checkpoint is written to a hidden sibling, fsynced and renamed, so a crash at any moment leaves whole ones only.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.batch import State
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.files import atomic_write, json_bytes, put, read_json, sync
from mlxgpt.common.folders import model_folder, tensors
from mlxgpt.common.folders.resolve import path_of, steps_of

FORMAT_VERSION = 1
STATE = "training/state.json"
OPTIMIZER = "training/optimizer.safetensors"
WriteWeights = Callable[[Path, dict[str, np.ndarray]], None]
"""(folder to fill, what trained by name): writes a model or an adapter."""
_BLANK = "0" * 64  # stands in state.json for its own sha256 while that is computed


@dataclass
class RunState:
    """The state of a run beside its tensors. ``recipe`` is resolved; ``environment`` is the engine's description."""

    seed: int
    data: dict[str, str]  # name -> sha256 of every shard and of the tokenizer
    recipe: dict[str, dict[str, Any]]
    framework: str
    environment: dict[str, str]
    step: int = 0  # the last completed step
    t: int = 0  # applied updates
    tokens: int = 0  # seen in training
    best: dict[str, float] | None = None  # step, loss and selecting metric of the best validation
    stale: int = 0  # validations since the best one
    evaluated: int = 0  # step of the last validation


Checkpoint = tuple[Path, RunState]
"""A checkpoint's folder and its verified state."""


def write(
    run: Path,
    snapshot: State,
    config: ModelConfig,
    tokenizer: Any,
    state: RunState,
    keep: int,
    write_weights: WriteWeights | None = None,
    stable: int = 0,
) -> tuple[Path, int]:
    """Writes the checkpoint of ``state.step``, points ``last`` and ``best`` at it, and removes those beyond ``keep``.

    ``write_weights`` fills the folder; by default with a model of ``config`` and ``tokenizer``. The checkpoint of step
    ``stable``, from which the run can be made longer, stays, and so does the one that was best then.

    Returns:
        Its folder and its size in bytes.

    Raises:
        RunError: no space left, the system refuses to write, or a weight is not finite. Nothing half-written stays.
    """
    final = path_of(run, state.step)
    arrays = {f"m.{name}": value for name, value in snapshot["m"].items()}
    arrays |= {f"v.{name}": value for name, value in snapshot["v"].items()}
    arrays["t"] = np.array(snapshot["t"], dtype=np.int64)
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise RunError(f"{final}: not written: {name} of the optimizer is not finite")
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        final.parent.mkdir(exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        check_space(run, size_of(snapshot))
        (temporary / "training").mkdir(parents=True)
        if write_weights:
            write_weights(temporary, snapshot["params"])
        else:
            model_folder.write_model(temporary, config, snapshot["params"], tokenizer=tokenizer)
        tensors.write_tensors(temporary / OPTIMIZER, arrays, {})
        write_state(temporary, state)
        sync(temporary / "training")
        put(temporary, final)
        _point(run / "last", final)
        if state.best and path_of(run, int(state.best["step"])).is_dir():
            _point(run / "best", path_of(run, int(state.best["step"])))
    except (OSError, UserError) as error:
        reason = f"{error.strerror or error}" if isinstance(error, OSError) else str(error)
        raise RunError(f"{final}: not written: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _retire(run, state, keep, stable)
    return final, sum(file.stat().st_size for file in final.rglob("*") if file.is_file())


def size_of(snapshot: State) -> int:
    """Bytes that a checkpoint of these arrays needs, with a margin for small files."""
    groups = snapshot["params"], snapshot["m"], snapshot["v"]
    return sum(value.nbytes for group in groups for value in group.values()) + 4 * 2**20


def check_space(place: Path, needed: int) -> None:
    """Raises UserError unless the file system of ``place`` has ``needed`` bytes free."""
    free = shutil.disk_usage(place).free
    if free < needed:
        reason = f"{free / 2**20:.0f} MiB free, a checkpoint needs {needed / 2**20:.0f} MiB"
        raise UserError(f"{place}: {os.strerror(errno.ENOSPC)}: {reason}")


def sweep(run: Path) -> None:
    """Removes what a killed process was writing. Call it only while holding the run's lock."""
    for leftover in sorted((run / "checkpoints").glob(".step-*")):
        whole = leftover.with_name(leftover.name.removeprefix(".").removesuffix(".old"))
        if leftover.name.endswith(".old") and not whole.exists() and (leftover / STATE).is_file():
            os.rename(leftover, whole)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in [*run.glob(".*.tmp"), *run.glob(".*.link")]:
        leftover.unlink(missing_ok=True)


def write_state(checkpoint: Path, state: RunState) -> None:
    """Writes state.json, last of all files: it holds the checksums of the others, each of which is on disk by then."""
    files = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        sync(file)
        with open(file, "rb") as opened:
            files[file.relative_to(checkpoint).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    content = {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(state),
        "files": files,
        "sha256": _BLANK,
    }
    text = json_bytes(content)
    with atomic_write(checkpoint / STATE) as file:
        file.write(text.replace(_BLANK.encode(), hashlib.sha256(text).hexdigest().encode()))


def _point(link: Path, checkpoint: Path) -> None:
    """Points ``link`` at the checkpoint, atomically; where symlinks are impossible, by a file of one line."""
    target, temporary = (
        f"checkpoints/{checkpoint.name}",
        link.with_name(f".{link.name}.link"),
    )
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
    except OSError:
        temporary.write_text(target + "\n", encoding="utf-8")
    os.replace(temporary, link)


def _retire(run: Path, state: RunState, keep: int, stable: int) -> None:
    """Removes all checkpoints but the newest ``keep``, the best, and ``stable`` with the best of that time.

    0 keeps all. What cannot be removed stays.
    """
    steps = [step for step in steps_of(run) if step <= state.step]
    held = {stable, int(state.best["step"]) if state.best else -1}
    if keep and stable in steps[:-keep]:
        with contextlib.suppress(UserError):  # a damaged one holds nothing
            best = read_json(path_of(run, stable) / STATE).get("best")
            held.add(int(best["step"]) if best else -1)
    for step in steps[:-keep] if keep else []:
        if step not in held:
            # hidden first, by a name that sweep() does not restore: half a folder must not look like a checkpoint
            hidden = path_of(run, step).with_name(f".{path_of(run, step).name}.gone")
            try:
                os.rename(path_of(run, step), hidden)
            except OSError:
                continue
            shutil.rmtree(hidden, ignore_errors=True)


def verify(checkpoint: Path) -> RunState:
    """The state of a checkpoint, after checking every file against its checksum.

    Raises:
        UserError: a file is missing, or its sha256 is not the one in state.json.
    """
    content = read_json(checkpoint / STATE)
    expected = str(content.pop("sha256", None))
    found = hashlib.sha256((checkpoint / STATE).read_bytes().replace(expected.encode(), _BLANK.encode())).hexdigest()
    if found != expected:
        raise UserError(f"{checkpoint / STATE}: damaged: sha256 {found[:12]}, expected {expected[:12]}")
    version = content.pop("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{checkpoint / STATE}: format_version {version}, expected {FORMAT_VERSION}")
    for name, expected in content.pop("files").items():
        try:
            with open(checkpoint / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{checkpoint / name}: {error.strerror}") from None
        if found != expected:
            raise UserError(
                f"{checkpoint / name}: damaged: sha256 {found[:12]}, expected {expected[:12]} by state.json"
            )
    return RunState(**content)


def newest_valid(run: Path, say: Callable[[str], None] = print, until: int | None = None) -> Checkpoint | None:
    """The newest checkpoint (``until`` a step) whose checksums match, and its state; None if there are none.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    steps, damage = [step for step in steps_of(run) if until is None or step <= until], ""
    for step in reversed(steps):
        try:
            return path_of(run, step), verify(path_of(run, step))
        except UserError as error:
            say(f"{error}; trying an older checkpoint")
            damage = str(error)
    if steps:
        raise UserError(f"{run}: every checkpoint is damaged; the oldest: {damage}")
    return None


def set_aside(run: Path, step: int, say: Callable[[str], None], why: str = "damaged") -> bool:
    """Renames the checkpoints after ``step``, out of the way of the run that resumes from there; True if any were.

    ``why`` begins their new names.
    """
    later = [each for each in steps_of(run) if each > step]
    for each in later:
        place = path_of(run, each)
        aside = place.with_name(f"{why}-{place.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(place, aside)
        say(f"{place}: {why}, renamed to {aside.name}")
    return bool(later)


def point_back(run: Path, state: RunState) -> None:
    """Points ``last`` at the checkpoint of ``state``, and ``best`` at the best one up to there."""
    best = path_of(run, int(state.best["step"]) if state.best else state.step)
    _point(run / "last", path_of(run, state.step))
    _point(run / "best", best if best.is_dir() else path_of(run, state.step))


def read_snapshot(checkpoint: Path, config: ModelConfig) -> State:
    """The snapshot in a checkpoint that is a model folder: params, m and v by name, and t.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    return read_optimizer(checkpoint, model_folder.read_params(checkpoint, config))


def read_optimizer(checkpoint: Path, trained: dict[str, np.ndarray]) -> State:
    """The snapshot of ``trained`` weights and the optimizer's state in a checkpoint.

    Raises:
        UserError: a tensor is unexpected, or t is missing.
    """
    arrays = tensors.read_tensors(checkpoint / OPTIMIZER)
    if "t" not in arrays:
        raise UserError(f"{checkpoint / OPTIMIZER}: tensor t is missing")
    t = int(arrays.pop("t"))
    moments: dict[str, dict[str, np.ndarray]] = {"m": {}, "v": {}}
    for name, array in arrays.items():
        group, _, tensor = name.partition(".")
        if group not in moments:
            raise UserError(f"{checkpoint / OPTIMIZER}: unexpected tensor {name}")
        moments[group][tensor] = array
    # a file has them by name
    m, v = ({name: own[name] for name in [*trained, *own] if name in own} for own in moments.values())
    return State(params=trained, m=m, v=v, t=t)
