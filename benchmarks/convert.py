"""How long conversions take and how much memory they need, against cp, a sha256 pass and mlx_lm.convert.

    python -m benchmarks.convert [--rounds 9] [--megabytes 1000] [--json] [--memory | --timed | --matrix]

The folder is a llama of random bfloat16 weights. Each conversion is a process of its own, timed from its start to its
end; what it wrote is removed and the disk is idle before the next begins. --memory: the peak of each conversion with
arithmetic. --matrix: every pair of formats there and back, see tests/matrix.py. Children are started by a thin parent:
the peak that Linux reports for a process begins with its parent's.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import Row, finish

# sha256sum of coreutils takes four times as long where it was built without the processor's instructions
SHA256 = "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"
CONVERT = [sys.executable, "-m", "mlxgpt", "convert"]
PEAK = "<= 2.5 x largest tensor + 200 MB"
# what is made, and with which arguments, from each source
ARITHMETIC = {
    "llama": (
        ("f32", "--dtype", "float32"),
        ("q4", "--to", "mlx-lm", "--bits", "4"),
        ("q8", "--to", "mlx-lm", "--bits", "8"),
        ("llama.gguf",),
        ("q8.gguf", "--bits", "8"),
        ("llama.bin",),
    ),
    "q4": (("from-q4",),),
    "q8.gguf": (("from-q8",),),
    "llama.gguf": (("from-gguf",),),
    "llama.bin": (("from-bin",),),
    "gpt2": (
        ("gpt2-npz", "--to", "npz"),
        ("gpt2-bf16", "--to", "mlx-lm", "--dtype", "bfloat16"),
        ("gpt2.gguf",),
        ("ckpt.pt",),
    ),
    "gpt2-npz": (("from-npz",),),
    "ckpt.pt": (("from-nanogpt",),),
}


class Run(NamedTuple):
    """One process and its children: wall and CPU seconds, peak resident bytes of the largest."""

    seconds: float
    cpu: float
    peak: int


def once(*commands: list[str]) -> Run:
    """Runs all of them at the same time, to the end of the last."""
    start, cpu, peak = time.perf_counter(), 0.0, 0
    with open(os.devnull, "w") as nowhere:
        # spawned, not forked: a child counts the pages of the parent that it was forked from
        actions = [(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)]
        running = [os.posix_spawnp(each[0], each, os.environ, file_actions=actions) for each in commands]
        for process, command in zip(running, commands, strict=True):
            _, status, usage = os.wait4(process, 0)
            if status:
                raise SystemExit(f"{' '.join(command)}: exit status {status}")
            cpu += usage.ru_utime + usage.ru_stime
            peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return Run(time.perf_counter() - start, cpu, peak)


def make(place: str, family: str, megabytes: str) -> None:
    """A model of random weights of about that size, with a tokenizer that mlx-lm loads; to be called in a child."""
    import numpy as np

    from mlxgpt.common.folders import model_folder
    from mlxgpt.common.model import params
    from mlxgpt.common.recipes import build
    from mlxgpt.common.tokenizers.load import train_tokenizer

    wide = int(megabytes) >= 300
    sizes = dict(n_embd=1536 if wide else 512, n_head=12 if wide else 8, vocab_size=32000 if wide else 8000)
    more = {"n_hidden": sizes["n_embd"] * 8 // 3} if family == "llama" else {"activation": "gelu"}
    width = 2 if family == "llama" else 4
    one, two = (params.count(build({"model": dict(family=family, n_layer=n, **sizes, **more)}).model) for n in (1, 2))
    blocks = max(1, round((int(megabytes) * 1e6 / width - (2 * one - two)) / (two - one)))
    config = build({"model": dict(family=family, n_layer=blocks, block_size=1024, **sizes, **more)}).model
    draw, dtype = np.random.default_rng(1), "bfloat16" if family == "llama" else "float32"
    weights = {
        name: (draw.standard_normal(param.shape, np.float32) * np.float32(0.02)).astype(model_folder.DTYPES[dtype])
        for name, param in params.table(config).items()
    }
    tokenizer = train_tokenizer("bpe", ["some text to learn a few merges from " * 20], 270)
    model_folder.write_model(place, config, weights, dtype=dtype, tokenizer=tokenizer)


def made(place: Path, family: str, megabytes: int) -> Path:
    """That model, made if it is not there."""
    if not place.exists():
        code = f"from benchmarks.convert import make; make({str(place)!r}, {family!r}, {str(megabytes)!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
    return place


def timed(place: Path, megabytes: int, rounds: int) -> list[Row]:
    """Conversions that only move bytes, in turns with their peers; one round before is not counted."""
    source = made(place / "llama", "llama", megabytes)
    out, weights = place / "out", source / "model.safetensors"
    copy, digest = ["cp", "-r", str(source), str(out)], [sys.executable, "-c", SHA256, str(weights)]
    shards = ["--max-shard", f"{max(1, megabytes // 5)}MB"]

    def ours(*args: str) -> list[str]:
        return [*CONVERT, str(source), str(out), *args]

    contenders = {
        "cp and a sha256 pass beside it": (copy, digest),
        "cp": (copy,),
        "mlx_lm.convert": ([sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source),
                            "--mlx-path", str(out)],),
        "hf -> hf, resharded": (ours(*shards),),
        "hf -> mlx-lm": (ours("--to", "mlx-lm"),),
        "hf -> hf, resharded, --no-hash": (ours(*shards, "--no-hash"),),
        "hf -> mlx-lm, --no-hash": (ours("--to", "mlx-lm", "--no-hash"),),
    }  # fmt: skip
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, commands in contenders.items():
            os.sync()
            found = once(*commands)
            shutil.rmtree(out)
            runs[name] += [found] if i else []

    def row(what: str, against: str, part: str, unit: str, scale: float, goal: str) -> Row:
        pairs = [(getattr(a, part), getattr(b, part)) for a, b in zip(runs[what], runs[against], strict=True)]
        ours, peer = (statistics.median(pair[i] for pair in pairs) * scale for i in (0, 1))
        return Row(f"{what}, {part}", against, unit, ours, peer, [a / b for a, b in pairs], goal)

    rows = []
    for what, against, goal in (
        ("hf -> hf, resharded", "cp and a sha256 pass beside it", "median <= 2"),
        ("hf -> mlx-lm", "cp and a sha256 pass beside it", "median <= 2"),
        ("hf -> hf, resharded, --no-hash", "cp", "median <= 1.5"),
        ("hf -> mlx-lm, --no-hash", "cp", "median <= 1.5"),
        ("hf -> mlx-lm", "mlx_lm.convert", "median <= 0.2"),
    ):
        rows += [row(what, against, "seconds", "s", 1, goal), row(what, against, "cpu", "s", 1, "")]
    for what in ("hf -> hf, resharded", "hf -> mlx-lm"):
        rows.append(row(what, "mlx_lm.convert", "peak", "MB", 1e-6, "ours <= 200 MB"))
    return rows


def memory(place: Path, megabytes: int) -> list[Row]:
    """The peak of each conversion, beside what it may be: once, for it does not depend on what else runs."""
    rows = []
    for name, family, size in (("tenth", "llama", megabytes // 10), ("llama", "llama", megabytes)):
        peak = once([*CONVERT, str(made(place / name, family, size)), str(place / "out"), "--to", "mlx-lm"]).peak / 1e6
        rows.append(Row(f"hf -> mlx-lm, {size} MB", "200 MB", "MB", peak, 200, [peak / 200], "ours <= 200 MB"))
        shutil.rmtree(place / "out")
    made(place / "gpt2", "gpt2", megabytes // 2)
    for source, conversions in ARITHMETIC.items():
        for out, *args in conversions:
            peak = once([*CONVERT, str(place / source), str(place / out), *args]).peak / 1e6
            bound = 2.5 * largest(place / source, place / out) / 1e6 + 200
            what = f"{source} -> {out} {' '.join(args)}".strip()
            rows.append(Row(what, "its bound", "MB", peak, bound, [peak / bound], PEAK))
    return rows


def largest(*places: Path) -> int:
    """Bytes of the largest tensor on either side as it is stored, or float32 where it is read from int8 or 4 bits."""
    code = (
        "import math, sys; from convert import open_model; print(max(math.prod(t.shape) * t.dtype.itemsize"
        " for place in sys.argv[1:] for t in open_model(place).tensors.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, places)], check=True, stdout=subprocess.PIPE)
    return int(done.stdout)


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--memory", action="store_true", help="only the memory of each conversion")
    parser.add_argument("--timed", action="store_true", help="only the times of those that move bytes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--matrix", action="store_true", help="only every pair of formats there and back")
    args = parser.parse_args()
    if args.matrix:
        tests = Path(__file__).parents[1] / "tests"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
        sys.exit(subprocess.run([sys.executable, str(tests / "matrix.py")], env=environment).returncode)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = [] if args.memory else timed(place, args.megabytes, args.rounds)
        rows += [] if args.timed else memory(place, args.megabytes)
        finish(rows, args.json)


if __name__ == "__main__":
    main()
