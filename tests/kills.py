"""Kills processes at random moments and holds what is left against a run that nobody disturbed.

    python tests/kills.py --kills 300 [--seed 1] [--torch-share 0.1]

After every kill -9 each file of the run must still hold its checksum (``runs check``), and the process that goes on
must arrive at the same losses, weights and shards, bit for bit. One environment key: framework, threads and machine.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mlxgpt.common import checkpoint, metrics, runs

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40
_SETTINGS = (
    "model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.block_size=32", "data.tokenizer=char",
    "train.batch_size=4", "train.save_every=3", "train.eval_every=10", "train.eval_batches=2", "train.keep=2",
    "train.dropout=0.1", "optim.warmup=5", "sample.max_tokens=0",
)  # fmt: skip


class Damage(AssertionError):
    """Something was lost or corrupted."""


def text(seed: int, size: int = 60_000) -> str:
    """Lines of made-up words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 8))) for _ in range(200)]
    return "\n\n".join(" ".join(draw.choices(words, k=12)) for _ in range(size // 60))


def start(arguments: list[str], cwd: Path) -> subprocess.Popen:
    """The command line in a process group of its own, so that its workers die with it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mlxgpt", *arguments], cwd=cwd, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(arguments: list[str], cwd: Path) -> float:
    """Runs to the end; returns its seconds."""
    began = time.perf_counter()
    process = start(arguments, cwd)
    said = process.communicate()[0]
    if process.returncode:
        raise Damage(f"{' '.join(arguments)}: exit {process.returncode}: {said.strip()[-500:]}")
    return time.perf_counter() - began


def killed(arguments: list[str], cwd: Path, after: float) -> bool:
    """Whether the process lived for ``after`` seconds and was killed; False where it was done by then.

    Raises:
        Damage: it failed by itself.
    """
    process = start(arguments, cwd)
    try:
        said, _ = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return True
    if process.returncode:
        raise Damage(f"{' '.join(arguments)}: exit {process.returncode}: {said.strip()[-500:]}") from None
    return False


def losses(run: Path) -> list[tuple[int, str, float]]:
    """What metrics.jsonl says, without what depends on the clock."""
    return [(line["step"], line["split"], line["loss"]) for line in metrics.read(run / metrics.FILE)]


def weights(run: Path) -> dict[str, str]:
    """sha256 of the last checkpoint's tensors."""
    place = checkpoint.path_of(run, STEPS)
    names = ("model.safetensors", checkpoint.OPTIMIZER)
    return {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in names}


def train(place: Path, backend: str, kills: int, draw: random.Random, say: Callable[[str], None]) -> Counter:
    """Kills trainings until ``kills`` are done, each run resumed until it is finished and compared."""
    (place / "corpus.txt").write_text(text(1))
    settings = [part for setting in (*_SETTINGS, "data.source=corpus.txt") for part in ("--set", setting)]
    recipe = place / "r.toml"
    recipe.write_text("[model]\n")
    new = ["train", "./r.toml", "--backend", backend, "--steps", str(STEPS), *settings, "--out"]
    finish([*new, "reference"], place)
    seconds = finish([*new, "again"], place)
    expected, bits = losses(place / "reference"), weights(place / "reference")
    if (losses(place / "again"), weights(place / "again")) != (expected, bits):
        raise Damage("two undisturbed runs differ: nothing can be compared")
    counted, number = Counter(), 0
    while counted["kills"] < kills:
        run, number = place / f"run-{number}", number + 1
        arguments, done = [*new, run.name], False
        while not done and counted["kills"] < kills + 50:
            done = not killed(arguments, place, draw.uniform(0.2, 1.0) * seconds)
            counted["kills"] += not done
            if not run.exists() or not (run / "recipe.toml").exists():
                shutil.rmtree(run, ignore_errors=True)
                counted["before the run's first file"] += not done
                continue
            damage, _ = runs.check(run)
            if damage:
                raise Damage(f"{run.name} after {counted['kills']} kills: {damage}")
            counted["while a checkpoint was being written"] += bool(list((run / "checkpoints").glob(".step-*")))
            arguments = ["train", "--resume", run.name, "--backend", backend]
        if losses(run) != expected or weights(run) != bits:
            raise Damage(f"{run.name}: another curve or other weights than the undisturbed run")
        counted["runs finished, bit-equal"] += 1
        shutil.rmtree(run)
        say(f"{backend}: {counted['kills']} kills, {counted['runs finished, bit-equal']} runs bit-equal")
    return counted


def prepare(place: Path, kills: int, draw: random.Random, say: Callable[[str], None]) -> Counter:
    """Kills ``data prepare`` at random; whatever is left, the next one ends with the same shards."""
    (place / "corpus.txt").write_text(text(2, 600_000))
    arguments = ["data", "prepare", "corpus.txt", "--vocab-size", "300", "--workers", "2", "--out"]
    finish([*arguments, "reference"], place)
    seconds = finish([*arguments, "again"], place)

    def digests(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    expected = digests(place / "reference")
    if digests(place / "again") != expected:
        raise Damage("two undisturbed preparations differ: nothing can be compared")
    counted = Counter()
    while counted["kills"] < kills:
        out = place / "shards"
        counted["kills"] += killed([*arguments, out.name], place, draw.uniform(0.1, 1.0) * seconds)
        if out.exists():
            counted["complete already"] += 1
        else:
            finish([*arguments, out.name], place)
        if digests(out) != expected:
            raise Damage(f"shards after {counted['kills']} kills: {digests(out)}, expected {expected}")
        shutil.rmtree(out)
        counted["shards equal"] += 1
    say(f"data prepare: {counted['kills']} kills, {counted['shards equal']} times the same shards")
    return counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--torch-share", type=float, default=0.1)
    parser.add_argument("--prepare-share", type=float, default=0.15)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    torch, prepared = round(args.kills * args.torch_share), round(args.kills * args.prepare_share)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("prepare", "mlx", "torch")]
        for place in places:
            place.mkdir()
        if prepared:
            found["data prepare"] = prepare(places[0], prepared, draw, print)
        found["train, MLX"] = train(places[1], "mlx", args.kills - torch - prepared, draw, print)
        if torch:
            found["train, PyTorch"] = train(places[2], "torch", torch, draw, print)
    print(json.dumps({name: dict(counted) for name, counted in found.items()}, indent=2))
    print(f"{sum(counted['kills'] for counted in found.values())} kills: nothing lost, nothing corrupted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
