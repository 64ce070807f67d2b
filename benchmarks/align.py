"""DPO beside trl and mlx-lm-lora: seconds a step and peak memory, the same pairs in turns, and the losses they find.

    MLXGPT_TRL=VENV/bin/python MLXGPT_MLX_LM_LORA=VENV/bin/python python -m benchmarks.align [--rounds 5] [--json]

The first VENV has trl 1.16.0, the second mlx-lm-lora 5.10.2 with mlx[cpu]; either may be left out. A random llama in
float32 (width 256, 10 layers), its vocabulary of 32,000 or 8,192 entries; batches of 4 pairs whose lengths are drawn
once (median 70 tokens of a prompt and of an answer); LoRA of rank 8 on every linear of the blocks, or every weight; no
gradient checkpointing. A round is two steps. trl computes the reference's log-probabilities before, as ours do, and
must find our losses; mlx-lm-lora has no way to, and asks a second model in every step of its own loop, without
clipping. A step of trl is its training_step, then clipping and AdamW, without what else its loop does. Memory is the
peak of a round, weights and moments included: MLX's own count, and for torch what the profiler sees allocated beside
them.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pairs import Contender, race, row
from benchmarks.report import Row, finish

STEPS, BATCH, LARGEST, RANK, RATE, BETA = 2, 4, 256, 8, 1e-4, 0.1
GATE = 1e-4  # of a loss, between ours and trl's
METHODS = ("lora", "full")
MODEL = {"n_layer": 10, "n_head": 4, "n_embd": 256, "block_size": 2048}
SIZES: dict[str, dict[str, Any]] = {"16M": MODEL | {"vocab_size": 32000}, "10M": MODEL | {"vocab_size": 8192}}


def pairs(vocabulary: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) as ids, the same for every contender."""
    draw = np.random.default_rng(3)
    made = []
    for _ in range(STEPS * BATCH):
        sizes = np.clip(np.rint(70 * np.exp(0.6 * draw.normal(size=3))), 8, LARGEST // 2 - 1).astype(int)
        made.append(tuple(draw.integers(2, vocabulary, size).tolist() for size in sizes))
    return made


def write_folder(folder: Path, size: str) -> None:
    """The model that all contenders load, and an adapter of it, whose B is 0."""
    from benchmarks.serving import model as served
    from mlxgpt.common.folders import adapter_folder
    from mlxgpt.common.folders import model_folder as folders
    from mlxgpt.common.model import adapters

    served.write_folder(folder / "model", SIZES[size])
    recipe = recipe_of(folder, "lora")
    (folder / "adapter").mkdir()
    base = folders.read_params(folder / "model", recipe.model)
    adapter_folder.write_adapter(folder / "adapter", recipe, folder / "model", adapters.init(recipe, base))


def recipe_of(folder: Path, method: str) -> Any:
    """Ours."""
    from mlxgpt.common.folders import model_folder as folders
    from mlxgpt.common.recipes import build

    adapter = {"rank": RANK, "alpha": 2.0 * RANK} if method == "lora" else {"method": "full"}
    settings: dict[str, Any] = {
        "optim": {"lr": RATE, "min_lr": RATE, "weight_decay": 0.0},
        "train": {"batch_size": BATCH},
        "tune": {"task": "prefer"},
        "prefer": {"beta": BETA},
        "adapter": adapter,
    }
    return dataclasses.replace(build(settings), model=folders.read_config(folder / "model"))


def ours(package: str, folder: str, method: str) -> Callable[[], int]:
    """mlxgpt or torch_ref: the engine on padded batches of pairs, with the reference of before."""
    from mlxgpt.common.align.reference import logps
    from mlxgpt.common.folders import adapter_folder
    from mlxgpt.common.folders import model_folder as folders
    from mlxgpt.common.sft import pack

    place = Path(folder)
    recipe = recipe_of(place, method)
    weights = folders.read_params(place / "model", recipe.model)
    if method == "lora":
        weights |= adapter_folder.read_adapter(place / "adapter", place / "model", recipe.model).params
    engine = importlib.import_module(f"{package}.engine").Engine(recipe, weights, "cpu")
    held = []
    for prompt, *answers in pairs(recipe.model.vocab_size):
        for answer in answers:
            ids = np.array([*prompt, *answer], np.int32)
            mask = (np.arange(1, len(ids)) >= len(prompt)).astype(np.float32)
            held.append(pack.Example("", ids[:-1], ids[1:], mask))
    batches = []
    for start in range(0, len(held), 2 * BATCH):
        batch = pack.padded_batch(held, [(n,) for n in range(start, start + 2 * BATCH)], LARGEST)
        batch = dataclasses.replace(batch, together=2, each=0.5)
        before = logps(engine, batch, 0).astype(np.float32)
        batches.append(dataclasses.replace(batch, beside={"reference": before}))
    found = list[float]()

    def run() -> int:
        for batch in batches:
            stats = engine.train_step(engine.t + 1, [batch], RATE)
            found.append(stats.loss_sum / stats.weight)
        return len(batches)

    run.losses = found  # type: ignore[attr-defined]
    return run


def trl(folder: str, method: str) -> Callable[[], int]:
    """trl's DPOTrainer, its reference computed before."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mlxgpt.common.folders import model_folder as folders

    datasets, library, place = importlib.import_module("datasets"), importlib.import_module("trl"), Path(folder)
    vocabulary = folders.read_config(place / "model").vocab_size
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = datasets.Dataset.from_list([dict(zip(names, each, strict=True)) for each in pairs(vocabulary)])
    model: Any = AutoModelForCausalLM.from_pretrained(str(place / "model"), dtype=torch.float32)
    if method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(place / "adapter"), is_trainable=True)

    class Trainer(library.DPOTrainer):  # type: ignore[misc, name-defined]
        """Whose rows are tokens already."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    args = library.DPOConfig(
        output_dir=str(place / "out"), per_device_train_batch_size=BATCH, precompute_ref_log_probs=True, bf16=False,
        gradient_checkpointing=False, use_cpu=True, report_to="none", beta=BETA, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    read = AutoTokenizer.from_pretrained(str(place / "model"))
    trainer = Trainer(model=model, args=args, train_dataset=data, processing_class=read)
    rows = [trainer.train_dataset[n] for n in range(len(data))]
    batches = [trainer.data_collator(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, (0.9, 0.99), weight_decay=0.0)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    found = list[float]()

    def run() -> int:
        for batch in batches:
            found.append(float(trainer.training_step(trainer.model, dict(batch))))
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return len(batches)

    run.losses = found  # type: ignore[attr-defined]
    return run


def mlx_lm_lora(folder: str, method: str) -> Callable[[], int]:
    """mlx-lm-lora's train_dpo in a thread, which waits for its turn before each round."""
    from mlxgpt import blas  # noqa: F401  (the same BLAS, before MLX)

    # isort: split
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    theirs = importlib.import_module("mlx_lm_lora.trainer.dpo_trainer")
    mx.set_default_device(mx.Device(mx.cpu))
    mx.set_wired_limit = lambda _: 0  # of Metal
    info = mx.device_info()
    mx.device_info = lambda: info | {"max_recommended_working_set_size": 0}
    place = Path(folder) / "model"
    go, done, errors, found = threading.Semaphore(0), threading.Semaphore(0), list[BaseException](), list[float]()
    vocabulary = json.loads((place / "config.json").read_text())["vocab_size"]
    listed = pairs(vocabulary)
    batches = [_arrays(mx, listed[start : start + BATCH]) for start in range(0, len(listed), BATCH)]
    turn = iter(range(10**9))

    def in_turns(**given: Any) -> Iterator[Any]:
        number = next(turn)
        if number % STEPS == 0:
            if number:
                done.release()
            go.acquire()
        yield batches[number % STEPS]

    class Report:
        """Keeps the losses."""

        def on_train_loss_report(self, line: dict[str, Any]) -> None:
            found.append(line["train_loss"])

    def train() -> None:
        try:
            mx.random.seed(0)
            model, _ = load_model(place)
            reference, _ = load_model(place)
            reference.freeze()
            if method == "lora":
                model.freeze()
                linear_to_lora_layers(model, MODEL["n_layer"], {"rank": RANK, "scale": 2.0, "dropout": 0.0})
            args = theirs.DPOTrainingArgs(
                batch_size=BATCH, iters=10**6, steps_per_report=1, steps_per_eval=10**6, steps_per_save=10**6,
                max_seq_length=LARGEST, beta=BETA,
            )  # fmt: skip
            vars(theirs)["iterate_dpo_batches"] = in_turns
            optimizer = optimizers.AdamW(learning_rate=RATE, betas=[0.9, 0.99], weight_decay=0.0)
            theirs.train_dpo(model, reference, optimizer, listed, None, args, training_callback=Report())
        except BaseException as error:
            errors.append(error)
            done.release()

    threading.Thread(target=train, daemon=True).start()

    def run() -> int:
        go.release()
        done.acquire()
        if errors:
            raise errors[0]
        return STEPS

    run.losses = found  # type: ignore[attr-defined]
    return run


def _arrays(mx: Any, part: list[tuple[list[int], list[int], list[int]]]) -> tuple[Any, ...]:
    """Chosen, rejected and their masks, padded as its iterate_dpo_batches does."""
    width = max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in part)
    made = []
    for place in (1, 2):
        ids, mask = np.zeros((len(part), width), np.int32), np.zeros((len(part), width), np.float32)
        for b, each in enumerate(part):
            whole = [*each[0], *each[place]]
            ids[b, : len(whole)], mask[b, len(each[0]) : len(whole)] = whole, 1
        made.append((mx.array(ids), mx.array(mask)))
    return made[0][0], made[1][0], made[0][1], made[1][1]


def figures(function: str, *args: str) -> dict[str, Any]:
    """Losses of a round, and the bytes at the peak of the next one, weights and moments included."""
    run = globals()[function](*args)
    run()
    losses = list(run.losses)
    if function == "trl" or args[0] == "torch_ref":
        import torch

        from benchmarks.head import torch_peak

        storages = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in gc.get_objects()
            if isinstance(each, torch.Tensor)
        }
        return {"losses": losses, "peak": sum(storages.values()) + torch_peak(run)}
    import mlx.core as mx

    mx.reset_peak_memory()
    run()
    return {"losses": losses, "peak": mx.get_peak_memory()}


def measured(contender: Contender) -> dict[str, Any]:
    """``figures`` of a contender, from a process of its own."""
    command = [contender.python, "-m", "benchmarks.align", "--figures", contender.function, *contender.args]
    done = subprocess.run(command, env={**os.environ, **contender.env}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(peers: dict[str, str], rounds: int, size: str, methods: list[str]) -> list[Row]:
    """Everybody in turn, in processes of their own."""
    made: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(folder, size)
        for method in methods:
            for peer, python in peers.items():
                package = "torch_ref" if peer == "trl" else "mlxgpt"
                mine = Contender(package, "align", "ours", (package, temporary, method))
                other = Contender(peer, "align", peer, (temporary, method), python=python)
                made += compared(mine, other, method, size, rounds)
                for line in made[-2:]:
                    say("  ".join(line.cells()))
    return made


def compared(mine: Contender, other: Contender, method: str, size: str, rounds: int) -> list[Row]:
    """A row of seconds and one of memory; the losses must be those of trl.

    Raises:
        SystemExit: they are not.
    """
    one, two = measured(mine), measured(other)
    gap = float(np.abs(np.array(one["losses"]) - np.array(two["losses"])).max())
    say(f"{other.name}, {method}: losses {gap:.1e} from ours: {one['losses'][-1]:.6f} at step {STEPS}")
    if not gap <= GATE and other.name == "trl":
        raise SystemExit(f"{mine.name}: losses {one['losses']}: trl has {two['losses']}")
    race([mine, other], rounds)
    speed = statistics.median(b / a for a, b in zip(mine.cpu, other.cpu, strict=True))
    say(f"{other.name}, {method}: CPU time a step, ours / peer: {speed:.2f}")
    framework = "torch" if mine.name == "torch_ref" else "MLX"
    goal = "<= 0.91" if other.name == "trl" else "<= 0.8"
    what, memory = f"{framework} DPO, {method}, llama {size}", (one["peak"] / 2**20, two["peak"] / 2**20)
    seconds = row(what, other.name.replace("_", "-"), "ms", mine, other, goal)
    peaks = Row(what, seconds.against, "MiB", *memory, [memory[0] / memory[1]], "<= 0.6")
    return [dataclasses.replace(seconds, memory=0.0, peer_memory=0.0), peaks]


def say(line: str) -> None:
    """A line that is no result."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default=os.environ.get("MLXGPT_TRL", ""), help="an interpreter with trl")
    parser.add_argument("--mlx-lm-lora", default=os.environ.get("MLXGPT_MLX_LM_LORA", ""), help="one with mlx-lm-lora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=tuple(SIZES), default="16M")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--figures", nargs="+", metavar="FUNCTION", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.figures:
        out, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(figures(*args.figures)), file=out)
        return
    peers = {name: python for name, python in (("trl", args.trl), ("mlx_lm_lora", args.mlx_lm_lora)) if python}
    if not peers:
        raise SystemExit("expected --trl, an interpreter that has trl, or --mlx-lm-lora: see --help")
    finish(measure(peers, args.rounds, args.size, args.methods), args.json)


if __name__ == "__main__":
    main()
