"""What the run that begins says of every answer: log-probabilities, kept in the run and never computed again.

    RUN/reference.safetensors    SPLIT (N,) float32 a split, in the order of its examples; for kto also "SPLIT kl"

The model that is asked is the run's own before step 1: with the adapter that it began from and whatever else trains,
without dropout. Its sha256 is among the digests of every checkpoint.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlxgpt.common.align.source import PairSource
from mlxgpt.common.batch import Batch, Engine
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders import tensors
from mlxgpt.common.sft import pack

FILE = "reference.safetensors"
DIGEST = "reference"  # among the digests of a run


def logps(engine: Engine, batch: Batch, micro_batch_size: int) -> np.ndarray:
    """Log-probabilities (B,) float64 of the answers in a batch's rows, in micro-batches."""
    return np.concatenate([engine.logps(part) for part in batch.split(micro_batch_size)]).astype(np.float64)


def measure(
    source: PairSource, splits: tuple[str, ...], ask: Callable[[Batch], np.ndarray], status: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Log-probabilities of every example of the splits, by name as in the file.

    Raises:
        RunError: one is not finite.
    """
    lists = {name: source.examples[name] for name in splits}
    if source.single:
        lists |= {f"{name} kl": source.mismatched(name, range(len(source.examples[name]))) for name in splits}
    made, done, total = {}, 0, sum(map(len, lists.values()))
    rows = source.train.batch_size * source.together
    for name, examples in lists.items():
        made[name] = np.zeros(len(examples), np.float32)
        lengths = np.array([len(example) for example in examples], np.int64)
        for plan in pack.padded_plan(lengths, np.arange(len(examples)), rows):
            places = [row for (row,) in plan]
            status(f"reference {done:,}/{total:,}")
            made[name][places] = ask(source.padded(examples, places))
            done += len(places)
        bad = np.flatnonzero(~np.isfinite(made[name]))
        if len(bad):
            raise RunError(
                f"{examples[bad[0]].where}: its log-probability is {made[name][bad[0]]} before the first step: "
                "expected finite weights"
            )
    return made


def write(run: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the file of a run, whole or not at all."""
    tensors.write_tensors(run / FILE, arrays, {})


def digest(run: Path) -> str:
    """sha256 of a run's file, or '' where there is none."""
    path = run / FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def check(run: Path, expected: str) -> None:
    """Refuses a file that is not the one that the run wrote.

    Raises:
        UserError: it is missing or another one.
    """
    found = digest(run)
    if found != expected:
        what = f"sha256 {found[:12]}" if found else "missing"
        raise UserError(
            f"{run / FILE}: {what}: expected sha256 {expected[:12]}, what the run began with, "
            "which the trained weights cannot give again: expected the file from a copy of the run, or a new run"
        )


def read(run: Path, source: PairSource) -> dict[str, np.ndarray]:
    """The arrays of a run's file.

    Raises:
        UserError: it is damaged, or of other examples.
    """
    arrays = tensors.read_tensors(run / FILE)
    for name, examples in source.examples.items():
        for key in (name, f"{name} kl") if source.single else (name,):
            if key in arrays and arrays[key].shape != (len(examples),):
                raise UserError(
                    f"{run / FILE}: {key}: {arrays[key].shape}: expected one number for each of {len(examples)} answers"
                )
    return arrays


def told(arrays: dict[str, np.ndarray], began: float) -> Iterator[str]:
    """A line about what was measured since ``began`` (time.perf_counter)."""
    count = sum(map(len, arrays.values()))
    mean = math.fsum(float(array.sum(dtype=np.float64)) for array in arrays.values()) / max(count, 1)
    seconds = time.perf_counter() - began
    yield f"reference: {count:,} answers by the model as it begins, mean log-probability {mean:.2f}, {seconds:.1f} s"
