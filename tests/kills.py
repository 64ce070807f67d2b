"""Kills processes at random moments and holds what is left against a run that nobody disturbed.

    python tests/kills.py --kills 300 [--seed 1] [--torch-share 0.1]

After every kill -9 each file of the run must still hold its checksum (``runs check``), and the process that resumes
must arrive at the same losses, weights and shards, bit for bit. One environment key: framework, threads and machine.
Conversions get Ctrl-C by turns: what has the final name is whole, old or new, and the source is as it was.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlxgpt.commands.look import runs as runs_command
from mlxgpt.common.folders import model_folder, resolve, tensors
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build
from mlxgpt.common.runs import metrics
from mlxgpt.common.tokenizers import load as tokenizer

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40
_SETTINGS = (
    "model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.block_size=32", "data.tokenizer=char",
    "train.batch_size=4", "train.save_every=3", "train.eval_every=10", "train.eval_batches=2", "train.keep=2",
    "train.dropout=0.1", "optim.warmup=5", "sample.max_tokens=0",
)  # fmt: skip
_TUNING = (
    "adapter.rank=4", "adapter.dropout=0.1", "tune.block_size=32", "train.batch_size=4", "train.save_every=3",
    "train.eval_every=10", "train.keep=2", "optim.warmup=5", "sample.max_tokens=0",
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
    return [(line["step"], line["split"], line["loss"]) for line in metrics.read_lines(run / metrics.FILE)]


def weights(run: Path) -> dict[str, str]:
    """sha256 of the last checkpoint's tensors: a model's or an adapter's, and the optimizer's."""
    found = sorted(resolve.path_of(run, STEPS).rglob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def difference(run: Path, reference: Path, resumed: list[int]) -> str:
    """Where a run and the undisturbed one part, and the steps that it was resumed from; '' if they are equal.

    A fault of a resume shows from such a step on, other bits of the same computation anywhere.
    """
    found, pairs = [], [[*metrics.read_lines(each / metrics.FILE)] for each in (run, reference)]
    if len(pairs[0]) != len(pairs[1]):
        found.append(f"{len(pairs[0])} lines, expected {len(pairs[1])}")
    keys = ("step", "split", "loss", "grad_norm")
    lines = [[[line.get(key) for key in keys] for line in own] for own in pairs]
    if apart := [pair for pair in zip(*lines, strict=False) if pair[0] != pair[1]]:
        found.append(f"first {keys} apart: {apart[0][0]}, expected {apart[0][1]}")
    places = [resolve.path_of(each, STEPS) for each in (run, reference)]
    for path in sorted(places[1].rglob("*.safetensors")):
        own, other = (tensors.read_tensors(place / path.relative_to(places[1])) for place in places)
        bad = {name: np.abs(own[name] - other[name]).max() for name in other if (own[name] != other[name]).any()}
        if bad:
            name = max(bad, key=lambda each: bad[each])
            found.append(f"{path.name}: {len(bad)} of {len(other)} tensors differ, most {name}, by {bad[name]:.2g}")
    return "; ".join([*found, f"resumed from {resumed}"]) if found else ""


def train(place: Path, backend: str, kills: int, draw: random.Random, say: Callable[[str], None]) -> Counter:
    """Kills trainings until ``kills`` are done, each run resumed until it is finished and compared."""
    (place / "corpus.txt").write_text(text(1))
    settings = [part for setting in (*_SETTINGS, "data.source=corpus.txt") for part in ("--set", setting)]
    recipe = place / "r.toml"
    recipe.write_text("[model]\n")
    return _stopped(place, ["train", "./r.toml", *settings], backend, kills, draw, say)


def tune(place: Path, backend: str, kills: int, draw: random.Random, say: Callable[[str], None]) -> Counter:
    """The same of a fine-tuning, whose checkpoints are adapters; the base must stay byte for byte."""
    words = [line.split() for line in text(3, 6_000).split("\n\n")]
    spelled = tokenizer.train_tokenizer("bpe", [" ".join(line) for line in words], 300)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": spelled.n_vocab}
    config = build({"model": {"family": "llama", **sizes}}).model
    model_folder.write_model(place / "base", config, params.init_params(config, 1), tokenizer=spelled)
    rows = ({"prompt": " ".join(line[:4]), "completion": " ".join(line[4:7])} for line in words)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [part for setting in _TUNING for part in ("--set", setting)]
    before = digests(place / "base")
    new = ["finetune", "--model", "base", "--data", "rows.jsonl", "--method", "dora", *settings]
    counted = _stopped(place, new, backend, kills, draw, say)
    if digests(place / "base") != before:
        raise Damage("base: not what it was")
    return counted


def _stopped(
    place: Path, new: list[str], backend: str, kills: int, draw: random.Random, say: Callable[[str], None]
) -> Counter:
    """Kills runs that ``new`` begins, at random, until each is finished and compared."""
    verb, new = new[0], [*new, "--backend", backend, "--steps", str(STEPS), "--out"]
    finish([*new, "reference"], place)
    seconds = finish([*new, "again"], place)
    expected, bits = losses(place / "reference"), weights(place / "reference")
    if (losses(place / "again"), weights(place / "again")) != (expected, bits):
        where = difference(place / "again", place / "reference", [])
        raise Damage(f"two undisturbed runs differ, so nothing can be compared: {where}")
    counted, number = Counter(), 0
    while counted["kills"] < kills:
        run, number = place / f"run-{number}", number + 1
        arguments, done, resumed = [*new, run.name], False, []
        while not done and counted["kills"] < kills + 50:
            done = not killed(arguments, place, draw.uniform(0.2, 1.0) * seconds)
            counted["kills"] += not done
            begun = (run / "recipe.toml").exists() and (verb == "train" or resolve.steps_of(run))
            if not begun:
                shutil.rmtree(run, ignore_errors=True)
                counted["before there was anything to go on from"] += not done
                continue
            damage, _ = runs_command.find_damage(run)
            if damage:
                raise Damage(f"{run.name} after {counted['kills']} kills: {damage}")
            counted["while a checkpoint was being written"] += bool(list((run / "checkpoints").glob(".step-*")))
            arguments = [verb, "--resume", run.name, "--backend", backend]
            if not done:
                resumed.append(max(resolve.steps_of(run), default=0))
        if losses(run) != expected or weights(run) != bits:
            where = difference(run, place / "reference", resumed)
            raise Damage(f"{run.name}: another curve or other weights than the undisturbed run: {where}")
        counted["runs finished, bit-equal"] += 1
        shutil.rmtree(run)
        say(f"{verb}, {backend}: {counted['kills']} kills, {counted['runs finished, bit-equal']} runs bit-equal")
    return counted


def prepare(place: Path, kills: int, draw: random.Random, say: Callable[[str], None]) -> Counter:
    """Kills ``data prepare`` at random; whatever is left, the next one ends with the same shards."""
    (place / "corpus.txt").write_text(text(2, 600_000))
    arguments = ["data", "prepare", "corpus.txt", "--vocab-size", "300", "--workers", "2", "--out"]
    finish([*arguments, "reference"], place)
    seconds = finish([*arguments, "again"], place)

    expected = list(digests(place / "reference").values())
    if list(digests(place / "again").values()) != expected:
        raise Damage("two undisturbed preparations differ: nothing can be compared")
    counted = Counter()
    while counted["kills"] < kills:
        out = place / "shards"
        counted["kills"] += killed([*arguments, out.name], place, draw.uniform(0.1, 1.0) * seconds)
        if out.exists():
            counted["complete already"] += 1
        else:
            finish([*arguments, out.name], place)
        if list(digests(out).values()) != expected:
            raise Damage(f"shards after {counted['kills']} kills: {digests(out)}, expected {expected}")
        shutil.rmtree(out)
        counted["shards equal"] += 1
    say(f"data prepare: {counted['kills']} kills, {counted['shards equal']} times the same shards")
    return counted


_ROUTES = (
    ("", "hf", "--max-shard", "20MB"), ("", "mlx-lm"), ("", "mlx-lm", "--bits", "4"), ("", "npz"), ("", "gguf"),
    ("", "gguf", "--bits", "8"), (".pt", "hf", "--n-head", "4"),
)  # fmt: skip
_WAYS = ("kills", "interruptions")


def convert(
    place: Path, kills: int, draw: random.Random, say: Callable[[str], None], ways: tuple[str, ...] = _WAYS
) -> Counter:
    """Kills and interrupts ``convert``, half of them over an earlier result; the next one ends as if undisturbed."""
    config = build({"model": dict(family="gpt2", n_layer=2, n_head=4, n_embd=256, vocab_size=32768)}).model
    for seed, name in ((1, "source"), (2, "earlier")):
        model_folder.write_model(place / name, config, params.init_params(config, seed))
    counted = Counter()
    while counted["kills"] + counted["interruptions"] < kills:
        kind, to, *options = draw.choice(_ROUTES)
        if not (place / f"source{kind}").exists():
            for name in ("source", "earlier"):
                finish(["convert", name, f"{name}{kind}", "--to", "mingpt"], place)
        source = digests(place / f"source{kind}")
        out = place / (to + ".gguf" * (to == "gguf"))
        arguments = ["convert", f"source{kind}", out.name, "--to", to, *options]
        seconds = finish(arguments, place)
        new, old = digests(out), {}
        _clear(out)
        over, stop = draw.random() < 0.5, draw.choice(ways)
        if over:
            finish(["convert", f"earlier{kind}", *arguments[2:]], place)
            old = digests(out)
        stopped = (killed if stop == "kills" else interrupted)(
            arguments + ["--force"] * over, place, draw.uniform(0.3, 1.0) * seconds
        )
        counted[stop] += stopped
        left = _hidden(place)
        counted["while it was being written"] += bool(left) or (stopped and stop == "interruptions")
        found, aside = digests(out), digests(out.with_name(f".{out.name}.old"))
        between = not found and list(aside.values()) == list(old.values())  # two renames; the next one puts it back
        if found not in (old, new) and not between:
            raise Damage(f"{out.name} after {stop}: neither the old nor the new result, nor nothing: {sorted(found)}")
        if digests(place / f"source{kind}") != source:
            raise Damage(f"{out.name} after {stop}: the source is not what it was")
        if left and stop == "interruptions":
            raise Damage(f"{out.name}: an interruption left {left}")
        finish([*arguments, "--force"], place)
        if digests(out) != new or _hidden(place):
            raise Damage(f"{out.name}: another result than undisturbed, or left over: {_hidden(place)}")
        counted["results equal"] += 1
        counted[f"from {kind.strip('.') or 'hf'} to {' '.join([to, *options])}"] += stopped
        _clear(out)
    stops = ", ".join(f"{counted[way]} {way}" for way in ways)
    say(f"convert: {stops}, {counted['results equal']} results equal")
    return counted


def interrupted(arguments: list[str], cwd: Path, after: float) -> bool:
    """Whether the process lived for ``after`` seconds and got Ctrl-C, which it must say in one line and exit 130."""
    process = start(arguments, cwd)
    try:
        said, _ = process.communicate(timeout=after)
        done = True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
        done = process.returncode == 0  # it was over before the signal came
    # Ctrl-C inside exec(str), as dataclasses use it, makes Python end by the signal: a shell sees 130 as well
    if process.returncode not in ((0,) if done else (130, -signal.SIGINT)) or "Traceback" in said:
        raise Damage(f"{' '.join(arguments)}: interrupted: exit {process.returncode}: {said.strip()[-500:]}")
    return not done


def _hidden(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name.startswith("."))


def _clear(out: Path) -> None:
    """Removes a result and what belongs to it."""
    for path in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def digests(place: Path) -> dict[str, str]:
    """sha256 of a result's files, but for when it was made; {} where there is none."""
    files = sorted(place.rglob("*")) if place.is_dir() else [place] if place.exists() else []
    found = {}
    for path in files:
        if path.is_file():
            content = re.sub(rb'"date": "[^"]*"', b"", path.read_bytes())
            found[path.relative_to(place.parent).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--torch-share", type=float, default=0.1)
    parser.add_argument("--prepare-share", type=float, default=0.15)
    parser.add_argument("--convert-share", type=float, default=0.15)
    parser.add_argument("--tune-share", type=float, default=0.15)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    shares = (args.torch_share, args.prepare_share, args.convert_share, args.tune_share)
    torch, prepared, converted, tuned = (round(args.kills * share) for share in shares)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("prepare", "mlx", "torch", "convert", "tune")]
        for place in places:
            place.mkdir()
        if prepared:
            found["data prepare"] = prepare(places[0], prepared, draw, print)
        found["train, MLX"] = train(places[1], "mlx", args.kills - torch - prepared - converted - tuned, draw, print)
        if torch:
            found["train, PyTorch"] = train(places[2], "torch", torch, draw, print)
        if converted:
            found["convert"] = convert(places[3], converted, draw, print)
        if tuned:
            found["finetune, MLX"] = tune(places[4], "mlx", tuned, draw, print)
    print(json.dumps({name: dict(counted) for name, counted in found.items()}, indent=2))
    total = sum(counted["kills"] + counted["interruptions"] for counted in found.values())
    print(f"{total} kills: nothing lost, nothing corrupted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
