"""The demo: one recipe in MLX, resumed in PyTorch from MLX's checkpoint, and from scratch in PyTorch; one loss curve.

Then MLX's model is fine-tuned to answer questions, with LoRA in both frameworks, and the adapter that MLX trained
answers in both: one curve and one text. Every leg is a public command in its own process; this file starts them and
compares their metrics.jsonl and answers. On a GPU doctor's short ladder comes first.
"""

import argparse
import importlib
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mlxgpt.common import backend
from mlxgpt.common.doctor import answers
from mlxgpt.common.doctor.answers import Answer, Tie
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import metrics
from mlxgpt.common.units import duration

RECIPE = "pydocs"
LEGS = ("mlx", "torch-resumed", "torch")
TUNED = ("lora-mlx", "lora-torch")
COUNT = len(LEGS) + len(TUNED) + 1  # the last one answers
QUESTIONS = ("What does os.path.join do?", "What does shutil.copyfile do?", "What does random.shuffle do?",
             "What is queue.Queue?")  # fmt: skip
TOKENS = 24  # of an answer
# Steps and settings: about a minute per leg on two cores or any GPU.
PRESET = (300, ["train.batch_size=8", "train.eval_batches=20", "train.keep=0"])
# LoRA on questions and answers: a low rank on a model this small needs a high learning rate.
TUNE_PRESET = (150, ["optim.lr=2e-3", "train.eval_batches=20", "sample.max_tokens=0"])
# If MLX uses its reference BLAS, 15 to 30 times slower.
SLOW_PRESET = (200, [*PRESET[1], "model.n_layer=2", "model.n_embd=64", "model.block_size=64"])


@dataclass(frozen=True)
class Gates:
    """The largest differences allowed between two curves, in nats; measured in float32 on the CPU (docs/parity.md)."""

    first: float = 1e-6  # step 1, rung 4 of the ladder: the same weights, batch and loss
    curve: float = 1e-4  # any step of two whole curves, rung 4
    resumed: float = 2e-5  # any step after resuming, against the curve it left, rung 5


# Metal, MPS and CUDA sum in other orders and sizes; these leave them ten times the room.
ACCELERATOR_GATES = Gates(1e-5, 1e-3, 2e-4)


@dataclass(frozen=True)
class Difference:
    """The largest difference of two curves, and where; NaN where a loss is not finite."""

    what: str
    largest: float
    step: int
    gate: float

    @property
    def agrees(self) -> bool:
        """False for NaN too."""
        return self.largest <= self.gate


def demo(args: argparse.Namespace) -> int:
    """Runs the three legs under ``args.out`` and prints the comparison.

    Returns:
        0 if every difference is within its gate, and answers are the same up to ties, else 1.

    Raises:
        UserError: a framework is missing, or the folder is not a demo's.
        RunError: a leg failed, or doctor's ladder on this machine's GPU.
    """
    began = time.perf_counter()
    runs = {leg: Path(args.out) / leg for leg in (*LEGS, *TUNED)}
    for run in runs.values():
        if run.exists() and not resolve.is_run(run):
            raise UserError(f"{run}: exists and is not a run; expected a folder that the demo may replace")
    for name in backend.PACKAGES:
        backend.resolve(name)
    slow = importlib.import_module("mlxgpt.blas").load() == "reference"
    steps, sets = SLOW_PRESET if slow else PRESET
    resumed_at = steps // 2
    if accelerated():
        _leg(0, "does this machine's GPU compute what its CPU does?", "mlxgpt", ["--quick"], "doctor")
    for run in runs.values():
        shutil.rmtree(run, ignore_errors=True)

    sets = [*sets, f"train.eval_every={resumed_at}", f"train.save_every={resumed_at}"]
    recipe = [RECIPE, "--steps", str(steps), *(word for text in sets for word in ("--set", text))]
    _leg(1, f"MLX, steps 1 to {steps}", "mlxgpt", [*recipe, "--out", str(runs["mlx"])])
    _branch(runs["mlx"], runs["torch-resumed"], resumed_at)
    title = f"PyTorch, steps {resumed_at + 1} to {steps}, from MLX's checkpoint of step {resumed_at}"
    _leg(2, title, "torch_ref", ["--resume", str(runs["torch-resumed"])])
    _leg(3, f"PyTorch, steps 1 to {steps}", "torch_ref", [*recipe, "--out", str(runs["torch"])])

    tuned, tune_sets = TUNE_PRESET
    words = [*(word for text in [*tune_sets, f"train.eval_every={tuned}"] for word in ("--set", text))]
    rows = ["--model", str(runs["mlx"]), "--data", "pydocs-qa", "--steps", str(tuned), *words]
    for number, (leg, package) in enumerate(zip(TUNED, ("mlxgpt", "torch_ref"), strict=True), start=len(LEGS) + 1):
        name = {"mlxgpt": "MLX", "torch_ref": "PyTorch"}[package]
        title = f"{name}: LoRA on the questions of pydocs-qa, on MLX's model, steps 1 to {tuned}"
        _leg(number, title, package, [*rows, "--out", str(runs[leg])], "finetune")
    print(f"\n[{COUNT}/{COUNT}] answers: MLX's model, its adapter in MLX, and the same adapter in PyTorch", flush=True)
    asked = [f"{question}\n" for question in QUESTIONS]
    plain, (prompts, ends) = answers.prompt_ids(runs["mlx"], asked)[0], answers.prompt_ids(runs["lora-mlx"], asked)
    base = answers.ask("mlxgpt", runs["mlx"], plain, TOKENS)
    mlx, torch = (answers.ask(package, runs["lora-mlx"], prompts, TOKENS) for package in ("mlxgpt", "torch_ref"))
    on_gpu = any(_devices(run) != {"cpu"} for run in runs.values())
    limit = answers.gate(on_gpu)
    ties = [
        answers.tie(("mlxgpt", "torch_ref"), runs["lora-mlx"], prompt, a, b, ends, limit)
        for prompt, a, b in zip(prompts, mlx, torch, strict=True)
    ]

    curves = {leg: losses(run, "train") for leg, run in runs.items()}
    gates = ACCELERATOR_GATES if on_gpu else Gates()
    differences = [*compare(curves, steps, resumed_at, gates), *compare_tuned(curves, tuned, gates)]
    print("\n" + table(curves, {leg: losses(run, "val") for leg, run in runs.items()}, steps, resumed_at))
    print("\n" + side_by_side(base, mlx, torch, ties))
    print("\n" + "\n".join(_verdict(differences, on_gpu, ties)))
    print(f"the demo took {duration(time.perf_counter() - began)}; its runs are in {args.out}")
    return 0 if all(one.agrees for one in (*differences, *filter(None, ties))) else 1


def accelerated() -> bool:
    """Whether a framework computes on a GPU here."""
    devices = [importlib.import_module(f"{package}.device") for package in backend.PACKAGES.values()]
    return any(each.describe(each.use("auto"))["device"] != "cpu" for each in devices)


def side_by_side(base: list[Answer], mlx: list[Answer], torch: list[Answer], ties: list[Tie | None]) -> str:
    """Each question with its answers before and after."""

    def shown(answer: Answer) -> str:
        return " ".join(answer.text.split())[:100] or "(nothing)"

    lines = []
    for question, before, after, other, tie in zip(QUESTIONS, base, mlx, torch, ties, strict=True):
        lines += [question, f"  before             {shown(before)}", f"  after LoRA, MLX    {shown(after)}"]
        lines.append(f"  in PyTorch         {shown(other) if tie else 'the same'}")
        if tie:
            word = "a tie" if tie.agrees else "no tie"
            lines.append(f"    {word} at token {tie.at + 1}: margin {tie.margin:.1e}, gate {tie.gate:.0e}")
    return "\n".join(lines)


def losses(run: Path, split: str) -> dict[int, float]:
    """Step -> loss of one split of a run; NaN where it was not finite."""
    lines = [line for line in metrics.read_lines(run / metrics.FILE) if line["split"] == split]
    return {line["step"]: math.nan if line["loss"] is None else line["loss"] for line in lines}


def compare(curves: dict[str, dict[int, float]], steps: int, resumed_at: int, gates: Gates) -> list[Difference]:
    """The differences that the verdict is based on.

    Raises:
        RunError: a curve lacks a step.
    """
    whole, rest = range(1, steps + 1), range(resumed_at + 1, steps + 1)
    mlx, resumed, torch = (curves[leg] for leg in LEGS)
    return [
        _difference("torch from scratch to MLX, step 1", mlx, torch, range(1, 2), gates.first),
        _difference("torch from scratch to MLX, every step", mlx, torch, whole, gates.curve),
        _difference(f"torch from MLX's step {resumed_at} to MLX", mlx, resumed, rest, gates.resumed),
    ]


def compare_tuned(curves: dict[str, dict[int, float]], steps: int, gates: Gates) -> list[Difference]:
    """The same for the two LoRA runs, which start from one model.

    Raises:
        RunError: a curve lacks a step.
    """
    mlx, torch = (curves[leg] for leg in TUNED)
    return [
        _difference("LoRA in torch to MLX, step 1", mlx, torch, range(1, 2), gates.first),
        _difference("LoRA in torch to MLX, every step", mlx, torch, range(1, steps + 1), gates.curve),
    ]


def _difference(what: str, a: dict[int, float], b: dict[int, float], steps: range, gate: float) -> Difference:
    missing = [step for step in steps if step not in a or step not in b]
    if missing:
        raise RunError(f"{what}: no loss of step {missing[0]}")
    found = {step: abs(a[step] - b[step]) for step in steps}
    worst = max(found, key=lambda step: math.inf if math.isnan(found[step]) else found[step])
    return Difference(what, found[worst], worst, gate)


def table(train: dict[str, dict[int, float]], val: dict[str, dict[int, float]], steps: int, resumed_at: int) -> str:
    """The three curves side by side: losses in nats at about ten steps, then on the validation split."""

    def row(name: str, curves: dict[str, dict[int, float]], step: int) -> str:
        cells = (f"{curves[leg][step]:.6f}" if step in curves[leg] else "-" for leg in LEGS)
        return f"{name:>14}" + "".join(f"{cell:>20}" for cell in cells)

    tenth = max(1, steps // 10)
    shown = sorted({1, resumed_at + 1, *range(tenth, steps + 1, tenth)})
    source = "from MLX's file"
    titles = [f"MLX 1..{steps}", f"torch {resumed_at + 1}..{steps}", f"torch 1..{steps}"]
    return "\n".join([
        f"{'step':>14}" + "".join(f"{title:>20}" for title in titles),
        f"{'':>14}{'':>20}{source:>20}",
        *(row(str(step), train, step) for step in shown),
        *(row(f"validation {step}", val, step) for step in sorted(val["mlx"])),
    ])  # fmt: skip


def _verdict(differences: list[Difference], on_gpu: bool, ties: list[Tie | None]) -> list[str]:
    lines = [f"{'largest difference of the training loss':<44}{'at step':>8}{'found':>10}{'gate':>10}"]
    for one in differences:
        word = "" if one.agrees else "  over the gate"
        lines.append(f"{one.what:<44}{one.step:>8}{one.largest:>10.1e}{one.gate:>10.0e}{word}")
    if on_gpu:
        lines.append("a GPU took part: these gates are ten times those measured on the CPU")
    agrees = all(one.agrees for one in differences)
    lines.append(f"verdict: the curves {'agree' if agrees else 'DISAGREE'}")
    parted = [tie for tie in ties if tie]
    word = "are the same in both" + (", up to ties" if parted else "")
    if not all(tie.agrees for tie in parted):
        word = "DIFFER"
    return [*lines, f"verdict: the answers of the adapter {word}"]


def _leg(number: int, title: str, package: str, arguments: list[str], verb: str = "train") -> None:
    """Runs one verb in its own process, with its display; after Ctrl-C it saves first."""
    command = [sys.executable, "-m", package, verb, *arguments]
    print(f"\n[{number}/{COUNT}] {title}\n      python {shlex.join(command[1:])}", flush=True)
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except BaseException:
            # Ctrl-C reaches the process too
            process.wait()
            raise
    if code:
        raise RunError(f"leg {number} of the demo ended with exit code {code}")


def _branch(run: Path, branch: Path, step: int) -> None:
    """A copy of a run as it was at a checkpoint."""
    shutil.copytree(run, branch, symlinks=True)
    for place in (branch / "checkpoints").iterdir():
        if place.name != resolve.path_of(run, step).name:
            shutil.rmtree(place)
    for hint in ("best", "last"):
        (branch / hint).unlink(missing_ok=True)


def _devices(run: Path) -> set[str]:
    return {segment["device"] for segment in json.loads((run / "environment.json").read_text(encoding="utf-8"))[-1:]}
