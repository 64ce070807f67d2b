"""What a resumed run may change, and which changes end bit-equality; everything else is refused."""

import contextlib
import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxgpt.common import tf32
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.runs.checkpoint import Checkpoint, RunState
from mlxgpt.common.train import schedule, tasks

# Cadence, paths and memory. Checksums identify the data, so a path or a tokenizer's name may change.
ACCEPTED = {
    "data.source", "data.tokenizer", "data.workers",
    "train.micro_batch_size", "train.checkpoint_activations", "train.loss_chunk", "train.compile",
    "train.deterministic", "train.tf32",
    "train.memory_limit", "train.cache_limit", "train.clear_cache", "train.wired_limit",
    "train.eval_every", "train.tasks", "train.task_limit", "train.sample_every", "train.save_every", "train.keep",
    "train.background", "train.early_stop", "train.log_every", "train.tensorboard", "train.wandb", "tune.model",
    "tune.source", "tune.test", "rl.rewards", "rl.replay", "rl.seconds",
}  # fmt: skip
# Of these, what reorders floating-point additions.
ROUNDING = {
    "train.micro_batch_size",
    "train.checkpoint_activations",
    "train.loss_chunk",
    "train.compile",
    "train.deterministic",
    "train.tf32",
}

Sections = dict[str, dict[str, Any]]


def may_change(key: str) -> str:
    """Whether a resumed run may change a key: ``free``, ``longer only`` or ``fixed``."""
    free = key in ACCEPTED or key.startswith("sample.")
    return "free" if free else "longer only" if key == "train.steps" else "fixed"


def check_run(run: Path) -> None:
    """Refuses a folder that is not a run.

    Raises:
        UserError: says what the folder is instead.
    """
    if not run.is_dir():
        raise UserError(
            f"{run}: {'not a folder' if run.exists() else 'no such folder'}; expected a run of mlxgpt train or finetune"
        )
    if (run / checkpoint.STATE).is_file():
        owner = run.resolve().parent.parent
        raise UserError(f"{run}: a checkpoint; --resume takes the run it belongs to: {owner}")
    if not resolve.is_run(run):
        missing = "recipe.toml" if not (run / "recipe.toml").is_file() else "checkpoints"
        raise UserError(f"{run}: not a run of mlxgpt train or finetune: {missing} is missing")


def changes(before: Sections, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """section.key -> (before, after) of every field that differs."""
    found = {}
    for section, values in dataclasses.asdict(after).items():
        for key, value in (values or {}).items():
            old = (before.get(section) or {}).get(key)
            if old != value:
                found[f"{section}.{key}"] = (old, value)
    return found


def check_recipe(run: Path, before: Sections, after: Recipe, say: Callable[[str], None]) -> list[str]:
    """Compares the recipe of a resumed run with the one that it was trained with.

    Returns:
        The accepted changes that alter rounding, described.

    Raises:
        UserError: names the first key that may not change.
    """
    rounding = []
    for key, (old, new) in changes(before, after).items():
        if key == "train.steps":
            _check_steps(run, after, int(old), say)
        elif may_change(key) == "fixed":
            raise UserError(
                f"{run}: {key} was {old!r} and is {new!r}: a resumed run keeps its recipe; "
                f"--init-from {run} starts a new one from its weights"
            )
        else:
            say(f"changed: {key} from {old!r} to {new!r}")
        if key in ROUNDING:
            rounding.append(f"{key} {old!r} -> {new!r}")
    return rounding


def _check_steps(run: Path, after: Recipe, old: int, say: Callable[[str], None]) -> None:
    name, new = after.optim.schedule, after.train.steps
    was = f"{run}: train.steps was {old} and is {new}"
    if new < old:
        raise UserError(f"{was}: expected no fewer; --stop-after {new} ends it sooner")
    if name not in ("constant", "wsd"):
        start = ["--init-from", str(run)]
        if after.tune:
            full = not after.adapter or after.adapter.method == "full"
            start = ["--model", str(run)] if full else ["--model", after.tune.model, "--adapter", str(run)]
        raise UserError(
            f"{was}: a {name} schedule is a function of its length, only constant and wsd can be made longer; "
            f"{shlex.join(start)} starts a new run from its weights"
        )
    say(f"changed: train.steps from {old} to {new}")


def before_decay(
    run: Path, before: Recipe, after: Recipe, newest: RunState, say: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint from which a longer wsd run goes on, if that is not the newest: one before the rate decayed.

    From there the curve is that of a run which was this long from the start. None where the newest is one, or where
    the run has none, as one of an earlier version: then the rate returns to its peak, which is said.
    """
    old, new = before.train.steps, after.train.steps
    stable = schedule.last_stable(after.optim, old)
    if new <= old or not stable or newest.step <= stable:
        return None
    found = None
    with contextlib.suppress(UserError):
        found = checkpoint.newest_valid(run, say, until=stable)
    if found:
        say(
            f"steps {found[1].step + 1} to {newest.step} are repeated: their learning rate decayed toward the end at "
            f"{old}; so the curve is that of a run of {new} steps from the start"
        )
        return found
    rates = schedule.rate(after.optim, newest.step, old), schedule.rate(after.optim, newest.step + 1, new)
    say(f"the learning rate had begun to decay: it returns from {rates[0]:.3g} to {rates[1]:.3g}")
    return None


def check_data(run: Path, before: dict[str, str], after: dict[str, str]) -> None:
    """Refuses data that differs from what the run began with, and other questions under a task's name.

    Raises:
        UserError: names the first file whose sha256 differs.
    """
    tasks.expect_same(before, after)
    for name in [*before, *after]:
        if name.startswith(tasks.DIGEST):
            continue  # one that came or went changes no number of the others
        old, new = before.get(name), after.get(name)
        if old != new:
            raise UserError(
                f"{run}: the data changed: {name} has sha256 {_short(new)}, the run began with {_short(old)}; "
                "to take data to another machine, or another Python for pydocs: mlxgpt data export"
            )


def _short(digest: str | None) -> str:
    return f"{digest[:12]}..." if digest else "(no such file)"


def say_environment(
    state: RunState, environment: dict[str, str], rounding: list[str], say: Callable[[str], None]
) -> None:
    """One line if the resumed run cannot be bit-equal to an uninterrupted one.

    Raises:
        UserError: nobody knows whether products are TF32 now.
    """
    now = tf32.judged(environment.get("tf32", "off"))
    before, after = (
        {"tf32": "off", **each} if each.get("device") == "cpu" else each  # checkpoints did not always say so
        for each in (state.environment, environment)
    )
    differ = [
        f"{key} {before.get(key, '-')} -> {after.get(key, '-')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and (key != "base" or key in before)  # earlier versions did not say it
    ]
    near = "but within 2e-5 of its losses (float32 on CPU)"
    if now or before.get("tf32") == "on":
        near = f"and {now or 'up to here TF32 was on'}"
    if differ or rounding:
        say(
            f"another environment than at step {state.step} ({', '.join(differ + rounding)}): not bit-equal to an "
            f"uninterrupted run, {near}"
        )
