"""A run as its folder shows it, read without a framework: curves, status, settings, environment, samples.

Nothing here writes or trusts the folder: a run that is training, was killed or is damaged is reported as such.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import resolve
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build, read_toml
from mlxgpt.common.runs import checkpoint, metrics, run_folder
from mlxgpt.common.runs.samples import Sample, read_samples

Columns = dict[str, np.ndarray]
"""Name -> values by line, float64; NaN where a line lacks the name or has null."""


@dataclass
class Run:
    """One run on disk."""

    path: Path
    name: str
    status: str  # running, finished, stopped, damaged
    why: str  # the reason for the status
    train: Columns
    val: Columns
    skipped: int  # skipped updates
    recipe: dict[str, dict[str, Any]]
    segments: list[dict[str, Any]]
    state: dict[str, Any]  # training/state.json of the newest checkpoint; {} if there is none
    plan: dict[str, Any] = field(
        default_factory=dict
    )  # plan.json: what was predicted and measured; {} if there is none
    samples: list[Sample] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    size: int = 0  # bytes of the folder
    changed: float = 0.0  # seconds since the epoch: its newest line

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return int(self.train["step"][-1]) if len(self.train["step"]) else 0

    @property
    def steps(self) -> int:
        """The length of its schedule."""
        return int(self.recipe.get("train", {}).get("steps", 0))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best validation."""
        losses = self.val.get("loss", np.array([]))
        if not np.isfinite(losses).any():
            return None
        at = int(np.nanargmin(losses))
        return int(self.val["step"][at]), float(losses[at])

    @property
    def bits_a_byte(self) -> float:
        """What a loss in nats a token is multiplied by for bits a byte of validation text; NaN where nobody counted."""
        data = self.segments[-1].get("data") if self.segments else None
        tokens, size = (data.get(key) if isinstance(data, dict) else None for key in ("val_tokens", "val_bytes"))
        return tokens / size / math.log(2) if _number(tokens) and _number(size) and size else math.nan

    @property
    def aligned(self) -> bool:
        """Whether its loss is not one of tokens: it trains on preferences or rewards."""
        return any(self.recipe.get(section) for section in ("prefer", "rl"))

    @property
    def framework(self) -> str:
        """The framework of its newest segment."""
        return str(self.segments[-1].get("framework", "")) if self.segments else ""

    @property
    def parameters(self) -> int:
        """Number of parameters; 0 if the recipe cannot be read."""
        try:
            return params.count(build(self.recipe, str(self.path)).model)
        except UserError:
            return 0


def read_run(path: Path) -> Run:
    """A run of ``train`` or ``finetune``.

    Raises:
        UserError: ``path`` is no run, or a line of metrics.jsonl other than the last is damaged.
    """
    if not resolve.is_run(path):
        raise UserError(f"{path}: not a run (recipe.toml, metrics.jsonl); expected the --out of a training")
    lines = list(metrics.read_lines(path / metrics.FILE)) if (path / metrics.FILE).exists() else []
    train = [line for line in lines if line.get("split") == "train"]
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    newest = path / metrics.FILE if (path / metrics.FILE).exists() else path / "recipe.toml"
    run = Run(
        path=path,
        name=path.resolve().name,
        status="",
        why="",
        train=columns(train),
        val=columns([line for line in lines if line.get("split") == "val"]),
        skipped=sum(bool(line.get("skipped")) for line in train),
        recipe=read_toml(path / "recipe.toml"),
        segments=run_folder.segments(path),
        state=_state(path),
        plan=_plan(path),
        samples=read_samples(path),
        checkpoints=resolve.steps_of(path),
        size=sum(file.stat().st_size for file in files),
        changed=newest.stat().st_mtime,
    )
    run.status, run.why = _status(run)
    return run


def columns(lines: list[dict[str, Any]]) -> Columns:
    """The numbers of the lines, by ``metrics.flat``, as arrays of one length; ``step`` is always there."""
    lines = [metrics.flat(line) for line in lines]
    names = dict.fromkeys(["step", *(key for line in lines for key, value in line.items() if _number(value))])
    return {
        name: np.array([float(line[name]) if _number(line.get(name)) else math.nan for line in lines]) for name in names
    }


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _state(run: Path) -> dict[str, Any]:
    """The state in the newest readable checkpoint; checksums are not verified here."""
    for step in reversed(resolve.steps_of(run)):
        try:
            return read_json(resolve.path_of(run, step) / checkpoint.STATE)
        except UserError:
            continue
    return {}


def _plan(run: Path) -> dict[str, Any]:
    """What ``train`` predicted for the run and measured at its end; {} if plan.json cannot be read."""
    try:
        return read_json(run / "plan.json")
    except UserError:
        return {}


def _status(run: Run) -> tuple[str, str]:
    if held_by := run_folder.holder(run.path):
        return "running", f"process {held_by}"
    if run.steps and run.step >= run.steps:
        return "finished", f"all {run.steps} steps"
    patience = int(run.recipe.get("train", {}).get("early_stop", 0))
    if patience and int(run.state.get("stale", 0)) >= patience:
        return "finished", f"stopped early at step {run.step}"
    if not run.checkpoints:
        return "stopped", "no checkpoint"
    if not run.state:
        return "damaged", "no checkpoint can be read"
    return "stopped", f"at step {run.state.get('step', 0)}"


def age(run: Run, now: float | None = None) -> str:
    """How long ago its last line was written: ``40 s``, ``12 min``, ``3 h`` or ``5 d``."""
    seconds = max(0.0, (time.time() if now is None else now) - run.changed)
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
