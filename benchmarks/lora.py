"""LoRA beside mlx_lm.lora and PEFT: real tokens a second, peak memory, the same examples in turns; loss curves.

    python -m benchmarks.lora [--rounds 5] [--rows 12] [--json]
    python -m benchmarks.lora --device cuda [--rows 64]       torch and PEFT alone, there
    python -m benchmarks.lora --curves [--steps 100]

A random llama of 54 M (width 512, 12 layers, 8 heads, MLP 1376, vocabulary 32,000, tied), float32, rank 8 on every
linear of the blocks, rows whose lengths are drawn once (log-normal, median 120, largest 512; printed). A round is one
pass over the rows. The peers take batches of 4 rows: mlx-lm with its own trainer, padded as it pads; PEFT in the loop
that one would write, padded to the longest row. Ours are packed into bins of 512 tokens, one a step, which is as many
tokens as 4 rows have. ``as installed`` is mlx-lm with the BLAS that MLX's wheel carries. Memory is the peak of a pass,
weights included: MLX's own count, and for torch the weights and what the profiler sees allocated beside them.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.head import torch_peak
from benchmarks.pairs import Contender, race, row
from benchmarks.report import Row, finish
from benchmarks.train_step import finish_on

SIZES = {"n_layer": 12, "n_head": 8, "n_embd": 512, "n_hidden": 1376, "vocab_size": 32000, "block_size": 512}
MEDIAN, LARGEST, SIGMA, BATCH, RANK, SCALE, RATE = 120, 512, 0.7, 4, 8, 2.0, 1e-4
SLOW_ROWS = 4  # of contenders that take minutes for more
SLOW_ROUNDS = 1


def lengths(count: int) -> np.ndarray:
    """Tokens of each row; the same first rows whatever the count."""
    drawn = np.random.default_rng(0).normal(size=count)
    return np.clip(np.rint(MEDIAN * np.exp(SIGMA * drawn)), 8, LARGEST).astype(int)


def rows(count: int, vocabulary: int = SIZES["vocab_size"]) -> list[np.ndarray]:
    """The rows: one token more than they have targets."""
    draw = np.random.default_rng(8)
    return [draw.integers(0, vocabulary, length + 1).astype(np.int32) for length in lengths(count)]


def write_folder(folder: Path, quantized: Path) -> None:
    """The model that all contenders load, and the same in mlx-lm's 4 bits."""
    from mlxgpt import cli
    from mlxgpt.common import recipes
    from mlxgpt.common.folders.model_folder import write_model
    from mlxgpt.common.model import params

    model = recipes.build({"model": {"family": "llama", **SIZES}}).model
    write_model(folder, model, params.init_params(model, 0))
    sys.stdout, out = sys.stderr, sys.stdout
    code = cli.main(["convert", str(folder), str(quantized), "--to", "mlx-lm", "--bits", "4"])
    sys.stdout = out
    if code:
        raise SystemExit(f"convert: exit code {code}")


def ours(package: str, folder: str, count: str, bins: str, checkpointed: str, device: str = "cpu") -> Callable[[], int]:
    """mlxgpt or torch_ref: the engine on packed batches."""
    from mlxgpt.common.folders import model_folder as folders
    from mlxgpt.common.model import adapters
    from mlxgpt.common.recipes import build
    from mlxgpt.common.sft import pack
    from mlxgpt.common.sft.weights import Dequantized

    config = folders.read_config(folder)
    weights = folders.read_params(folder, config)
    settings = {
        "optim": {"lr": RATE, "weight_decay": 0.0},
        "train": {"batch_size": int(bins), "checkpoint_activations": checkpointed == "checkpointed"},
        "tune": {},
        "adapter": {"rank": RANK, "alpha": SCALE * RANK},
    }
    import dataclasses

    recipe = dataclasses.replace(build(settings), model=config)
    own = adapters.init(recipe, Dequantized(weights))
    engine = importlib.import_module(f"{package}.engine").Engine(recipe, weights | own, device)
    held = [pack.Example("", r[:-1], r[1:], np.ones(len(r) - 1, np.float32)) for r in rows(int(count))]
    sizes = np.array([len(example) for example in held])
    plan = pack.pack(sizes, np.arange(len(held)), LARGEST)
    step = int(bins)
    batches = [pack.packed_batch(held, plan[at : at + step], LARGEST) for at in range(0, len(plan), step)]

    def run() -> int:
        for batch in batches:
            engine.train_step(engine.t + 1, [batch], RATE)
        finish_on(device)
        return int(sizes.sum())

    return run


class _Data:
    """Rows as mlx-lm's datasets hold them: what an item is before it is processed is a dict."""

    def __init__(self, held: list[np.ndarray]):
        self._held = held

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": self._held[index]}

    def process(self, item: dict[str, Any]) -> tuple[list[int], int]:
        return item["text"].tolist(), 0

    def __len__(self) -> int:
        return len(self._held)


def mlx_lm(folder: str, count: str, checkpointed: str) -> Callable[[], int]:
    """mlx_lm.lora's trainer; its own loop runs in a thread that waits for its turn before each pass over the rows."""
    from mlxgpt import blas  # noqa: F401  (the same BLAS, before MLX, unless MLXGPT_BLAS says otherwise)

    # isort: split
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.Device(mx.cpu))
    go, done, errors = threading.Semaphore(0), threading.Semaphore(0), []
    held = rows(int(count))
    a_pass = len(held) // BATCH

    def in_turns(**given: Any) -> Iterator[Any]:
        for number, batch in enumerate(trainer.iterate_batches(**given)):
            if number % a_pass == 0:
                if number:
                    done.release()
                go.acquire()
            yield batch

    def train() -> None:
        try:
            mx.random.seed(0)
            model, _ = load_model(Path(folder))
            model.freeze()
            linear_to_lora_layers(model, SIZES["n_layer"], {"rank": RANK, "scale": SCALE, "dropout": 0.0})
            args = trainer.TrainingArgs(
                batch_size=BATCH, iters=10**6, steps_per_report=10**6, steps_per_eval=10**6, steps_per_save=10**6,
                max_seq_length=LARGEST + 1, grad_checkpoint=checkpointed == "checkpointed",
            )  # fmt: skip
            optimizer = optimizers.AdamW(learning_rate=RATE, weight_decay=0.0)
            trainer.train(model, optimizer, CacheDataset(_Data(held)), None, args, iterate_batches=in_turns)
        except BaseException as error:
            errors.append(error)
            done.release()

    threading.Thread(target=train, daemon=True).start()

    def run() -> int:
        go.release()
        done.acquire()
        if errors:
            raise errors[0]
        return sum(len(r) - 1 for r in held)

    return run


def peft(folder: str, count: str, checkpointed: str, device: str = "cpu") -> Callable[[], int]:
    """PEFT in a plain loop: rows padded to the longest of their batch, masked, clipped, AdamW."""
    import torch

    model = peft_model(folder).to(device)
    if checkpointed == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = True if device.startswith("cuda") else None
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0, fused=fused)
    held = rows(int(count))

    def run() -> int:
        for at in range(0, len(held), BATCH):
            part = [torch.from_numpy(r).long().to(device) for r in held[at : at + BATCH]]
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in part], batch_first=True)
            model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finish_on(device)
        return sum(len(r) - 1 for r in held)

    run.model = model  # type: ignore[attr-defined]
    return run


def peft_model(folder: str) -> Any:
    """transformers' model of the folder with PEFT's LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules="all-linear"))


def peak(function: str, *args: str) -> int:
    """Bytes at the peak of one pass, weights and moments included."""
    run = globals()[function](*args)
    run()
    if function == "peft" or args[0] == "torch_ref":
        import gc

        import torch

        storages = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in gc.get_objects()
            if isinstance(each, torch.Tensor)
        }
        return sum(storages.values()) + torch_peak(run)
    import mlx.core as mx

    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory()


def measured_peak(contender: Contender) -> float:
    """MiB, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.lora", "--peak", contender.function, *contender.args]
    done = subprocess.run(command, env={**os.environ, **contender.env}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1]) / 2**20


def measure_on(device: str, rounds: int, count: int) -> list[Row]:
    """torch against PEFT on one device; speed alone, memory there is for torch.cuda to say."""
    with tempfile.TemporaryDirectory() as temporary:
        base = str(Path(temporary) / "model")
        write_folder(Path(base), Path(temporary) / "model-4bit")
        ours = Contender("torch_ref", "lora", "ours", ("torch_ref", base, str(count), "1", "plain", device))
        peer = Contender("PEFT", "lora", "peft", (base, str(count), "plain", device))
        race([ours, peer], rounds)
    return [row(f"torch LoRA, llama 54 M, {device}", "PEFT, a plain loop", "tok/s", ours, peer, "worse quartile >= 1")]


def measure(rounds: int, count: int) -> list[Row]:
    """Everybody in turn, in processes of their own; each row of the table is printed as soon as it is there."""
    sizes = lengths(count)
    say(f"rows: {count}, {sizes.sum()} tokens, lengths {sizes.tolist()}")
    made: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        base, small = str(Path(temporary) / "model"), str(Path(temporary) / "model-4bit")
        write_folder(Path(base), Path(small))

        def mine(package: str, folder: str = base, many: int = count, bins: int = 1, how: str = "plain") -> Contender:
            return Contender(package, "lora", "ours", (package, folder, str(many), str(bins), how))

        def lm(folder: str = base, many: int = count, how: str = "plain", **env: str) -> Contender:
            return Contender("mlx-lm", "lora", "mlx_lm", (folder, str(many), how), env)

        def hf(how: str = "plain") -> Contender:
            return Contender("PEFT", "lora", "peft", (base, str(count), how))

        def compare(what: str, against: str, a: Contender, b: Contender, rounds: int, speed: str, memory: str) -> None:
            began = time.perf_counter()
            race([a, b], rounds)
            made.append(row(what, against, "tok/s", a, b, speed))
            if memory:
                one, other = measured_peak(a), measured_peak(b)
                made.append(Row(what, against, "MiB", one, other, [one / other], memory))
            for line in made[-2 if memory else -1 :]:
                say("  ".join(line.cells()))
            ratio = statistics.median(x / y for x, y in zip(a.cpu, b.cpu, strict=True))
            say(f"{what} against {against}: {time.perf_counter() - began:.0f} s; by CPU time {ratio:.2f}")

        llama = "llama 54 M"
        compare(f"MLX LoRA, {llama}", "mlx_lm.lora, same BLAS", mine("mlxgpt"), lm(), rounds, ">= 1.25", "<= 0.6")
        compare(f"torch LoRA, {llama}", "PEFT, a plain loop", mine("torch_ref"), hf(), rounds,
                "lower quartile >= 1.0", "<= 0.7")  # fmt: skip
        few = min(rounds, SLOW_ROUNDS)
        compare(f"MLX LoRA, {llama}, checkpointed", "mlx_lm.lora, not checkpointed", mine("mlxgpt", how="checkpointed"),
                lm(), few, "", "<= 0.35")  # fmt: skip
        compare(f"MLX LoRA, {llama}, checkpointed", "mlx_lm.lora, checkpointed", mine("mlxgpt", how="checkpointed"),
                lm(how="checkpointed"), few, "", "<= 1")  # fmt: skip
        compare(f"torch LoRA, {llama}, checkpointed", "PEFT, checkpointed", mine("torch_ref", how="checkpointed"),
                hf("checkpointed"), few, "", "<= 1")  # fmt: skip
        compare(f"MLX LoRA, {llama}, 4 bins a step", "mlx_lm.lora, same BLAS", mine("mlxgpt", bins=4), lm(), few, "",
                "none: 2,048 tokens a step")  # fmt: skip
        slow = min(count, SLOW_ROWS)
        compare(f"MLX LoRA, {llama}", "mlx_lm.lora as installed", mine("mlxgpt", many=slow),
                lm(many=slow, MLXGPT_BLAS="none"), few, ">= 10", "")  # fmt: skip
        compare(f"MLX QLoRA, {llama}, 4 bits", "mlx_lm.lora, same BLAS", mine("mlxgpt", small, slow), lm(small, slow),
                few, ">= 4", "none")  # fmt: skip
    return made


def say(line: str) -> None:
    """A line that is no result."""
    print(line, file=sys.stderr, flush=True)


CURVE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_hidden": 384, "vocab_size": 512, "block_size": 128}


def curves(steps: int) -> int:
    """Losses of MLX, torch_ref and PEFT from the same weights, adapters and rows; 1 where one is over its gate."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        from mlxgpt.common import recipes
        from mlxgpt.common.folders.model_folder import write_model
        from mlxgpt.common.model import params

        model = recipes.build({"model": {"family": "llama", **CURVE}}).model
        write_model(folder, model, params.init_params(model, 0))
        failed = False
        for method in ("lora", "dora", "full"):
            found = {
                name: np.array([float(word) for word in _child(package, str(folder), method, str(steps))])
                for name, package in (("MLX", "mlxgpt"), ("torch_ref", "torch_ref"), ("PEFT", "peft"))
                if method == "lora" or package != "peft"
            }
            first = found.pop("MLX")
            print(f"{method}: MLX {first[0]:.6f} at step 1, {first[-1]:.6f} at step {steps}")
            for name, other in found.items():
                gaps = np.abs(other - first)
                good = gaps[0] <= 1e-6 and gaps.max() <= 1e-4
                failed |= not good
                print(
                    f"  {name} to MLX: step 1 {gaps[0]:.1e}, largest {gaps.max():.1e} at step {gaps.argmax() + 1}"
                    f"{'' if good else '  OVER THE GATE'}"
                )
    return int(failed)


def _child(*words: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.lora", "--curve", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout.split()


def curve(package: str, folder: str, method: str, steps: int) -> list[float]:
    """The loss of each step, 8 rows a step, in which a token is mostly followed by one other."""
    import dataclasses

    from mlxgpt.common.folders import model_folder as folders
    from mlxgpt.common.model import adapters
    from mlxgpt.common.recipes import build
    from mlxgpt.common.sft import pack

    config = folders.read_config(folder)
    weights = folders.read_params(folder, config)
    draw, size = np.random.default_rng(9), CURVE["vocab_size"]
    follows, held = draw.permutation(size), []
    for length in np.clip(lengths(8 * 16) // 4, 4, CURVE["block_size"]):
        tokens = [int(draw.integers(size))]
        while len(tokens) <= length:
            tokens.append(int(follows[tokens[-1]] if draw.random() < 0.9 else draw.integers(size)))
        held.append(np.array(tokens, np.int32))
    examples = [pack.Example("", r[:-1], r[1:], np.ones(len(r) - 1, np.float32)) for r in held]
    each = [list(range(8 * (n % 16), 8 * (n % 16) + 8)) for n in range(steps)]
    rate = 1e-3 if method == "full" else 5e-3
    settings: dict[str, Any] = {"optim": {"lr": rate, "weight_decay": 0.0}, "tune": {}}
    settings["adapter"] = {"method": method} | ({} if method == "full" else {"rank": RANK, "alpha": SCALE * RANK})
    recipe = dataclasses.replace(build(settings), model=config)
    own = adapters.init(recipe, weights) if method != "full" else {}
    if package == "peft":
        return _peft_curve(folder, own, [[held[i] for i in group] for group in each], rate, recipe.optim)
    engine = importlib.import_module(f"{package}.engine").Engine(recipe, weights | own, "cpu")
    made = []
    for step, group in enumerate(each, start=1):
        sizes = np.array([len(examples[i]) for i in group])
        plan = [tuple(group[i] for i in bin) for bin in pack.pack(sizes, np.arange(8), CURVE["block_size"])]
        stats = engine.train_step(step, [pack.packed_batch(examples, plan, CURVE["block_size"])], rate)
        made.append(stats.loss_sum / stats.weight)
    return made


def _peft_curve(folder: str, own: dict[str, np.ndarray], batches: Any, rate: float, optim: Any) -> list[float]:
    """The same with PEFT, row by row, from our A and B."""
    import torch

    from mlxgpt.common.folders import model_folder as folders
    from mlxgpt.common.model import families

    config = folders.read_config(folder)
    model = peft_model(folder)
    tensors = dict(model.named_parameters())
    for name, array in own.items():
        path, _, kind = name.rpartition(".")
        foreign = families.to_foreign(config, f"{path}.weight")[0].removesuffix(".weight")
        letter = {"lora_a": "A", "lora_b": "B"}[kind]
        found = [key for key in tensors if foreign in key and key.endswith(f"lora_{letter}.default.weight")]
        tensors[found[0]].data.copy_(torch.from_numpy(array))
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(trained, rate, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay)
    made = []
    for batch in batches:
        count, total = sum(len(r) - 1 for r in batch), 0.0
        for r in batch:
            ids = torch.from_numpy(r).long()[None]
            logits = model(input_ids=ids[:, :-1]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        made.append(total / count)
    return made


def main() -> None:
    """Prints the table, or with --json the rows; with --curves the distances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=12, help="a multiple of 4")
    parser.add_argument("--device", help="torch and PEFT alone, on cuda, cuda:N, mps or cpu")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--steps", type=int, default=100, help="of the curves")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--curve", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    if args.peak:
        print(peak(*args.peak))
    elif args.curve:
        package, folder, method, steps = args.curve
        print(*(repr(loss) for loss in curve(package, folder, method, int(steps))))
    elif args.curves:
        sys.exit(curves(args.steps))
    elif args.device:
        finish(measure_on(args.device, args.rounds, args.rows), args.json)
    else:
        finish(measure(args.rounds, args.rows), args.json)


if __name__ == "__main__":
    main()
