"""``mlxgpt train`` with the framework of fake_run.py: what a run left behind, and a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_run

from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import metrics

Go = Callable[..., int]


def losses(run: str, split: str = "train") -> dict[int, float]:
    """Step -> loss; a step that is there twice fails."""
    found: dict[int, float] = {}
    for entry in metrics.read_lines(Path(run) / metrics.FILE):
        if entry["split"] == split:
            assert entry["step"] not in found, f"step {entry['step']} is there twice"
            found[entry["step"]] = entry["loss"]
    return found


def weights(run: str, step: int) -> bytes:
    """The bytes of weights and moments after ``step``."""
    place = resolve.path_of(Path(run), step)
    return b"".join((place / name).read_bytes() for name in ("model.safetensors", "training/optimizer.safetensors"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(*argv: str, **environment: str) -> "subprocess.Popen[str]":
    """The same in a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = [sys.executable, "-u", fake_run.__file__, *argv]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
