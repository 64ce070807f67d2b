"""Checkpoints: what a save costs the training beside it, and writing and reading beside cp, torch.save and mx.save.

    python -m benchmarks.checkpointing [--rounds 9] [--steps 100] [--layers 8] [--json]

Training is nanoGPT's CPU size, where a step is short: 100 steps with one save by the second thread, and the wait for
it, beside 100 steps without. A checkpoint of float32 weights and moments is hashed, flushed to disk and renamed; cp
copies the same folder, torch.save and mx.save_safetensors write the same arrays, and none of them hashes or flushes;
the second cp does both, file by file, for what a save costs beyond a copy is its sha256.
Reading checks every file against its sha256 first.
"""

import argparse
import hashlib
import importlib
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pairs import Contender, race, row
from benchmarks.report import Row, finish
from benchmarks.train_step import SIZES, batch_of
from mlxgpt.common import files

WIDTH, WORDS = 512, 16000


def training(package: str, steps: str, saves: str):
    """Steps of an engine as ``train`` does them, with ``saves`` saves on the way, the first of them in the middle."""
    from mlxgpt.common.batch import Batch
    from mlxgpt.common.model import params
    from mlxgpt.common.recipes import build
    from mlxgpt.common.runs import metrics
    from mlxgpt.common.runs.checkpoint import RunState
    from mlxgpt.common.train.job import Job
    from mlxgpt.common.train.pretrain import Pretraining
    from mlxgpt.common.train.saver import Saver

    size, count = SIZES["tiny"], int(steps)
    model = {key: size[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    recipe = build({"model": model, "train": {"batch_size": size["batch"], "keep": 2}})
    engine = importlib.import_module(f"{package}.engine").Engine(recipe, params.init_params(recipe.model, 0), "cpu")
    tokens, targets = batch_of(size)
    batch = Batch(tokens, targets, np.ones(tokens.shape, np.float32))
    holder = tempfile.TemporaryDirectory(dir=".")
    state, run = RunState(0, {}, {}, package, {}), Path(holder.name)
    unused: Any = None
    kind = Pretraining(Namespace())
    kind.recipe, kind.tokenizer = recipe, None
    job = Job(run, kind, unused, engine, state, metrics.Metrics(run, []), Quiet())  # type: ignore[arg-type]

    def steps_and_saves() -> int:
        saver = Saver(job)
        for step in range(1, count + 1):
            engine.train_step(engine.t + 1, [batch], 1e-3)
            state.step += 1
            saver.check()
            if int(saves) and (step + count // 2) % count == 0:
                saver.save()
        saver.wait()
        assert holder.name
        return count

    return steps_and_saves


class Quiet:
    """A progress display that shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


def arrays(layers: str) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """A llama's config, weights and moments."""
    from mlxgpt.common.model import params
    from mlxgpt.common.recipes import build

    sizes = {"n_layer": int(layers), "n_head": 8, "n_embd": WIDTH, "vocab_size": WORDS, "block_size": 512}
    config = build({"model": {"family": "llama", **sizes}}).model
    weights = params.init_params(config, 0)
    moments = {name: np.full(array.shape, 0.25, np.float32) for name, array in weights.items()}
    return config, {"params": weights, "m": moments, "v": {name: array * 2 for name, array in moments.items()}}


def flat(groups: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """GROUP.NAME -> array."""
    return {f"{group}.{name}": array for group, named in groups.items() for name, array in named.items()}


def ours(layers: str, folder: str, reading: str = ""):
    """A checkpoint written over the one of the round before, or read."""
    from mlxgpt.common.runs import checkpoint

    config, groups = arrays(layers)
    run, state = Path(folder) / "ours", checkpoint.RunState(0, {}, {}, "none", {}, step=1)
    run.mkdir(exist_ok=True)
    snapshot: Any = {**groups, "t": 1}
    place, size = checkpoint.write(run, snapshot, config, None, state, 0)

    def write() -> float:
        shutil.rmtree(place)
        return checkpoint.write(run, snapshot, config, None, state, 0)[1] / 1e6

    def read() -> float:
        checkpoint.verify(place)
        checkpoint.read_snapshot(place, config)
        return size / 1e6

    return read if reading else write


def copy(layers: str, folder: str, sealed: str = ""):
    """cp -r of the checkpoint; ``sealed``: each file is then hashed and flushed."""
    source, target = Path(folder) / "ours" / "checkpoints" / "step-0000001", Path(folder) / f"copy{sealed}"

    def run() -> float:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        for path in target.rglob("*") if sealed else ():
            if path.is_file():
                with open(path, "rb") as file:
                    hashlib.file_digest(file, "sha256")
                    files.flush(file.fileno())
        return sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6

    return run


def torch_file(layers: str, folder: str, reading: str = ""):
    """torch.save or torch.load."""
    import torch

    path = Path(folder) / "arrays.pt"
    given = {name: torch.from_numpy(array) for name, array in flat(arrays(layers)[1]).items()}
    return _file(path, lambda: torch.save(given, path), lambda: torch.load(path), reading)


def mlx_file(layers: str, folder: str, reading: str = ""):
    """mx.save_safetensors or mx.load."""
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    path = Path(folder) / "arrays.safetensors"
    given = {name: mx.array(array) for name, array in flat(arrays(layers)[1]).items()}
    mx.eval(given)
    return _file(
        path, lambda: mx.save_safetensors(str(path), given), lambda: mx.eval(mx.load(str(path), stream=mx.cpu)), reading
    )


def _file(path: Path, write: Callable[[], Any], read: Callable[[], Any], reading: str) -> Callable[[], float]:
    write()

    def run() -> float:
        if reading:
            read()
        else:
            path.unlink()
            write()
        return path.stat().st_size / 1e6

    return run


def measure(rounds: int, steps: int, layers: int) -> list[Row]:
    """Training with and without saves, then files."""
    rows, me = [], "checkpointing"
    for package, name in (("mlxgpt", "MLX"), ("torch_ref", "torch")):
        pair = [Contender(f"{name}, {n} saves", me, "training", (package, str(steps), str(n))) for n in (1, 0)]
        race(pair, rounds)
        what = f"{name} training, a save every {steps} steps"
        rows.append(row(what, "without saves, by the clock", "steps/s", *pair, goal="median >= 0.98"))
        rows.append(row(what, "without saves, CPU time", "steps/s", *pair, goal="median >= 0.98", of="cpu"))
    # beside the repository, not in /tmp, which may be memory
    with tempfile.TemporaryDirectory(dir=".") as folder:
        given = (str(layers), folder)
        sides = [("ours", "ours"), ("cp", "copy"), ("torch.save", "torch_file"), ("mx.save_safetensors", "mlx_file")]
        writers = [Contender(name, me, function, given) for name, function in sides]
        writers.insert(2, Contender("cp, hashed and flushed", me, "copy", (*given, "sealed")))
        race(writers, rounds)
        readers = [Contender(name, me, function, (*given, "r")) for name, function in sides if name != "cp"]
        race(readers, rounds)
        size = sum(file.stat().st_size for file in (Path(folder) / "ours").rglob("*") if file.is_file()) / 1e6
    writers[1].peak = writers[2].peak = 0  # of the process that starts cp
    for peer, goal in zip(writers[1:], ("worse quartile >= 0.5", "worse quartile >= 0.5", "", ""), strict=True):
        rows.append(row(f"checkpoint written, {size:,.0f} MB", peer.name, "MB/s", writers[0], peer, goal))
    for peer in readers[1:]:
        against = peer.name.replace("save_safetensors", "load").replace("save", "load")
        rows.append(row(f"checkpoint read, {size:,.0f} MB", against, "MB/s", readers[0], peer))
    return rows


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="of training a save")
    parser.add_argument(
        "--layers", type=int, default=8, help="of the model of which a checkpoint is written; width 512"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    finish(measure(args.rounds, args.steps, args.layers), args.json)


if __name__ == "__main__":
    main()
