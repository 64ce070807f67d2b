"""The planner against reality: peak memory of training steps, predicted and measured; hours, predicted and measured.

    python -m benchmarks.planning [--backend mlx|torch] [--random N] [--seed S] [--json]
    python -m benchmarks.planning --closed ...
    python -m benchmarks.planning --hours [--steps 200] [--recipe NAME]

Measured is, over the first three steps, the peak of mx.get_peak_memory in MLX; in PyTorch on the CPU the peak of live
bytes in torch.profiler's memory events of steps 2 and 3, on top of weights and moments. Resident memory is beside it.
Nothing of the prediction was fitted to a measurement; ``--random`` draws new settings.
"""

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Row, finish
from mlxgpt.common.plan import closed, machine, measured, similar
from mlxgpt.common.plan.measured import Measured

Setting = dict[str, dict[str, Any]]
GATE = (0.95, 1.10)  # of predicted / measured
CLOSED = (0.75, 1.25)  # of the closed form / measured
PACKAGES = {"mlx": "mlxgpt", "torch": "torch_ref"}


def _s(family: str, sizes: str, batch: int = 4, train: dict[str, Any] | None = None, **more: Any) -> Setting:
    """A setting: ``sizes`` are layers, heads, key-value heads, width, context, vocabulary."""
    names = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size")
    model = dict(zip(names, map(int, sizes.split()), strict=True), family=family) | more.pop("model", {})
    more |= {"tune": {"source": "rows.jsonl"}} if "adapter" in more else {}
    return {"model": model, "train": {"batch_size": batch, **(train or {})}, **more}


_OF_2017 = {"activation": "relu", "placement": "post_add", "position": "sinusoidal"}
_NANOCHAT = {"activation": "relu2", "norm": "rms", "norm_weight": False, "position": "rope", "qk_norm": "head"}
_NANOCHAT |= {"embed_norm": True, "fused_qkv": False, "tied": False}
SETTINGS = [
    _s("gpt2", "4 4 4 128 64 65", 12),
    _s("gpt2", "6 6 6 192 256 1000", 4),
    _s("gpt2", "2 8 8 512 128 300", 2),
    _s("gpt2", "12 4 4 128 64 500", 8),
    _s("gpt2", "4 4 4 128 128 8000", 4),
    _s("gpt2", "4 4 4 128 128 8000", 4, {"loss_chunk": 0}),
    _s("gpt2", "4 4 4 128 128 50257", 1),
    _s("gpt2", "4 4 4 128 128 3000", 4, {"dropout": 0.2}),
    _s("gpt2", "8 4 4 128 128 3000", 8, {"checkpoint_activations": True}),
    _s("gpt2", "4 4 4 128 128 500", 8, {"micro_batch_size": 2}),
    _s("gpt2", "4 4 4 256 32 500", 4, {"micro_batch_size": 1}),
    _s("gpt2", "4 4 4 128 128 500", 4, {"compute_dtype": "bfloat16"}),
    _s("llama", "6 6 3 192 256 4096", 2),
    _s("llama", "4 4 4 256 64 500", 2, optim={"name": "muon"}),
    _s("llama", "4 4 2 128 512 500", 2),
    _s("llama", "4 4 2 128 1024 100", 1, {"checkpoint_activations": True}),
    _s("llama", "4 4 4 128 128 2000", 4, {"label_smoothing": 0.1, "z_loss": 1e-4}),
    _s("mistral", "4 4 2 128 128 500", 4, model={"window": 32}),
    _s("qwen2", "4 4 2 128 128 500", 4, {"compute_dtype": "bfloat16"}),
    _s("qwen3", "4 4 2 128 128 500", 4),
    _s("gemma", "3 4 1 128 128 1500", 4),
    _s("gemma2", "4 4 2 128 128 1500", 4),
    _s("gemma3_text", "6 4 1 128 128 1500", 2, model={"window": 32}),
    _s("gpt_neox", "4 4 4 128 128 500", 4),
    _s("phi", "4 4 4 128 128 500", 4),
    _s("phi3", "4 4 2 128 128 500", 4),
    _s("olmo2", "4 4 4 128 128 500", 4, {"dropout": 0.1}),
    _s("smollm3", "4 4 2 128 128 2500", 4, {"checkpoint_activations": True}),
    _s("llama", "4 4 2 256 128 3000", 4, adapter={"method": "lora", "rank": 8}),
    _s("llama", "4 4 2 256 128 3000", 4, {"checkpoint_activations": True}, adapter={"method": "lora", "rank": 16}),
    _s("qwen3", "4 4 2 256 64 2000", 2, adapter={"method": "dora", "rank": 4}),
    _s("gpt2", "4 4 4 256 128 2000", 4, adapter={"method": "lora", "rank": 8, "dropout": 0.05}),
    _s("llama", "4 4 2 256 128 3000", 4, adapter={"method": "lora", "bits": 4, "dequantize": "never"}),
    _s("gemma3_text", "4 4 2 256 64 3000", 4, adapter={"method": "full"}),
    _s(
        "mlxgpt",
        "4 4 4 128 128 500",
        4,
        model={"activation": "relu", "placement": "post_add", "position": "sinusoidal"},
    ),
    _s(
        "mlxgpt", "4 4 2 128 128 500", 4, model={"activation": "relu2", "norm": "rms", "norm_weight": False} | _NANOCHAT
    ),
    _s("mlxgpt", "4 4 4 128 512 500", 1, model={"position": "alibi", "embed_norm": True}),
    _s("mlxgpt", "4 4 4 128 128 500", 4, model={"position": "alibi", "activation": "relu2", "gated": True}),
]


def draw(dice: random.Random) -> Setting:
    """A random setting that a small machine can measure."""
    from mlxgpt.common.model.family.table import FAMILIES

    family, heads = dice.choice(list(FAMILIES)), dice.choice([1, 2, 4, 6, 8])
    kv = heads if family == "gpt_neox" else dice.choice([n for n in (1, 2, 4, 6, 8) if heads % n == 0])
    width, length = heads * dice.choice([16, 32, 64]), dice.choice([32, 64, 128, 256, 512, 1024, 2048])
    rows = dice.choice([1, 2, 3, 4, 8, 16])
    while rows > 1 and rows * length > 4096:
        rows //= 2
    layers = dice.choice([1, 2, 3, 4, 6, 8] if rows * length * width < 200_000 else [1, 2, 3])
    vocabulary = dice.choice([65, 300, 1000, 1500, 5000, 16000, 50257] if rows * length < 1100 else [65, 300, 1500])
    if rows * length * heads * length > 2e7:
        rows, heads, kv, layers = 1, min(heads, 2), 1 if family != "gpt_neox" else min(heads, 2), 1
        width = heads * 32
    train: dict[str, Any] = {"loss_chunk": dice.choice([1024, 1024, 0, 512])}
    for key, value, odds in (("checkpoint_activations", True, 0.25), ("dropout", 0.1, 0.2), ("z_loss", 1e-4, 0.1),
                             ("label_smoothing", 0.1, 0.1), ("compute_dtype", "bfloat16", 0.15),
                             ("micro_batch_size", 1, 0.2)):  # fmt: skip
        if dice.random() < odds:
            train[key] = value
    optim = {"name": dice.choice(["adamw", "adamw", "adamw", "muon"])}
    return _s(family, f"{layers} {heads} {kv} {width} {length} {vocabulary}", rows, train, optim=optim)


def recipe_of(setting: Setting) -> Any:
    """The recipe of a setting."""
    from mlxgpt.common.recipes import build

    return build(setting, "benchmark")


def predict(measure: Measured, recipe: Any) -> int:
    """Bytes, as the planner says."""
    rows = recipe.train.micro_batch_size or recipe.train.batch_size
    measure.begin()
    return measure(recipe, rows, recipe.model.block_size, -(-recipe.train.batch_size // rows)).peak


def closed_form(backend: str, recipe: Any) -> int:
    """Bytes by arithmetic alone."""
    rows = recipe.train.micro_batch_size or recipe.train.batch_size
    count = -(-recipe.train.batch_size // rows)
    return closed.footprint(recipe, rows, recipe.model.block_size, count, backend).peak


def measure_mlx(recipe: Any) -> int:
    """Peak bytes of three steps, without what earlier settings left behind."""
    from mlxgpt import engine as engines

    # isort: split
    import mlx.core as mx

    gc.collect()
    before = mx.get_active_memory()
    engine = engines.Engine(recipe, similar.tensors(recipe), "cpu")
    batch = similar.batch(recipe, recipe.train.batch_size, recipe.model.block_size)
    mx.reset_peak_memory()
    for step in (1, 2, 3):
        engine.train_step(step, batch.split(recipe.train.micro_batch_size), 1e-3)
    return mx.get_peak_memory() - before


def measure_torch(recipe: Any) -> int:
    """Peak live bytes of steps 2 and 3."""
    from torch.profiler import ProfilerActivity, profile

    from torch_ref import engine as engines

    gc.collect()
    engine = engines.Engine(recipe, similar.tensors(recipe), "cpu")
    batch = similar.batch(recipe, recipe.train.batch_size, recipe.model.block_size)
    kept = [*engine.model.parameters(), *engine.model.buffers(), *engine.m.values(), *engine.v.values()]
    engine.train_step(1, batch.split(recipe.train.micro_batch_size), 1e-3)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for step in (2, 3):
            engine.train_step(step, batch.split(recipe.train.micro_batch_size), 1e-3)
    assert profiler.profiler and profiler.profiler.kineto_results
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept) + int(live.max())


def serve(backend: str, form: bool) -> None:
    """Measures the settings on stdin, one JSON a line; answers in kind. ``form``: the closed form is the prediction."""
    from benchmarks.pairs import peak_memory

    out, sys.stdout = sys.stdout, sys.stderr
    measure = {"mlx": measure_mlx, "torch": measure_torch}[backend]
    with Measured(backend, "cpu", True, machine.free()) as planner:
        for line in sys.stdin:
            recipe = recipe_of(json.loads(line))
            predicted = closed_form(backend, recipe) if form else predict(planner, recipe)
            found = {"predicted": predicted, "measured": measure(recipe), "resident": peak_memory()}
            found |= {"closed": closed_form(backend, recipe), "flops": planner.spent, "notes": planner.notes}
            print(json.dumps(found), file=out, flush=True)


def compare(backend: str, settings: list[Setting], gflop: float, form: bool) -> Iterator[dict[str, Any]]:
    """Predicted and measured of each setting, from a process of its own for the framework."""
    command = [sys.executable, "-m", "benchmarks.planning", "--serve", backend, "--gflop", str(gflop)]
    command += ["--closed"] * form
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        for setting in settings:
            process.stdin.write(json.dumps(setting) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{backend}: the process that measures ended at {setting}")
            yield {"backend": backend, "setting": setting, **json.loads(line)}


def describe(setting: Setting) -> str:
    """A setting in a few words."""
    model, train = setting["model"], setting["train"]
    sizes = "{n_layer}x{n_embd} T{block_size} V{vocab_size}".format(**model)
    more = [key if value is True else f"{key}={value}" for key, value in train.items() if key != "batch_size"]
    if adapter := setting.get("adapter"):
        more += [adapter["method"], *(f"{key}={value}" for key, value in adapter.items() if key != "method")]
    more += [setting["optim"]["name"]] if setting.get("optim", {}).get("name") == "muon" else []
    return f"{model['family']} {sizes} B{train['batch_size']} {' '.join(more)}".strip()


def as_row(backend: str, rows: list[dict[str, Any]]) -> Row:
    """A line of make bench: all settings of a framework, totals and the ratios one by one."""
    own = [row for row in rows if row["backend"] == backend]
    predicted, measured = (sum(row[key] for row in own) / 2**20 for key in ("predicted", "measured"))
    what = f"planned peak memory, {backend}, {len(own)} settings"
    return Row(what, "measured", "MiB", predicted, measured, [row["ratio"] for row in own], "each 0.95 to 1.10")


def hours(backends: list[str], recipe: str, steps: int, sets: list[str]) -> list[dict[str, Any]]:
    """Seconds of a run: as ``plan --calibrate`` says, and as the same run then takes."""
    rows = []
    for backend in backends:
        common = ["-n", str(steps), "--backend", backend, *(word for each in sets for word in ("--set", each))]
        with tempfile.TemporaryDirectory() as folder:
            run = [sys.executable, "-m", "mlxgpt"]
            said = subprocess.run([*run, "plan", recipe, "--calibrate", "--json", *common], stdout=subprocess.PIPE,
                                  text=True, check=True)  # fmt: skip
            out = Path(folder, "run")
            subprocess.run([*run, "train", recipe, "--out", str(out), *common], stdout=subprocess.DEVNULL, check=True)
            took = json.loads((out / "plan.json").read_text())["measured_seconds"]
        rows.append({"backend": backend, "predicted": json.loads(said.stdout)["seconds"], "measured": took})
    return rows


def main() -> None:
    """Prints the table; exit code 1 if a prediction is off the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=PACKAGES, help=argparse.SUPPRESS)
    parser.add_argument("--backend", choices=PACKAGES, action="append", help="default: both")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random settings in place of the list")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    parser.add_argument(
        "--gflop", type=float, help="of a measurement; default: 12, which many settings need not shrink for"
    )
    parser.add_argument("--few", action="store_true", help="every seventh setting of the list")
    parser.add_argument("--closed", action="store_true", help="the closed form in place of the plan, against its gate")
    parser.add_argument("--hours", action="store_true", help="time a run instead, against what plan --calibrate says")
    parser.add_argument("--recipe", default="pydocs", help="of --hours; default: pydocs")
    parser.add_argument("--steps", type=int, default=200, help="of --hours; default: 200")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of --hours")
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)  # make bench passes it; nothing here is timed
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.serve:
        measured.FIRST = args.gflop * 1e9
        serve(args.serve, args.closed)
        return
    if args.hours:
        for row in hours(args.backend or list(PACKAGES), args.recipe, args.steps, args.set):
            ratio = row["predicted"] / row["measured"]
            print(f"{row['backend']:6}{row['predicted']:10.1f} s{row['measured']:10.1f} s{ratio:8.3f}", flush=True)
        return
    dice = random.Random(args.seed)
    settings = [draw(dice) for _ in range(args.random)] if args.random else SETTINGS[:: 7 if args.few else 1]
    rows, (low, high) = [], CLOSED if args.closed else GATE
    for backend in args.backend or PACKAGES:
        for row in compare(backend, settings, args.gflop or measured.FIRST / 1e9, args.closed):
            ratio = row["predicted"] / row["measured"]
            rows.append(row | {"ratio": ratio})
            mark = "" if low <= ratio <= high else "  <- off"
            sizes = "".join(f"{row[key] / 2**20:10.1f}" for key in ("predicted", "measured", "resident"))
            sizes += f"{row['closed'] / row['measured']:8.2f}{row['flops'] / 1e9:6.1f}"
            print(f"{backend:6}{sizes}{ratio:8.3f}  {describe(row['setting'])}{mark}", file=sys.stderr, flush=True)
    ratios = [row["ratio"] for row in rows]
    off = sum(not low <= ratio <= high for ratio in ratios)
    if args.json:
        finish([as_row(backend, rows) for backend in args.backend or PACKAGES], True)
    else:
        print(f"{len(rows)} settings, {min(ratios):.3f} to {max(ratios):.3f}, {off} off")
    if off:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
