"""`mlxgpt quantize` beside mlx_lm's convert -q, gptq, awq, dwq and dynamic_quant: the same text, one evaluator.

    python -m benchmarks.quantize [--models stories,trained] [--bits 2,3,4,8] [--steps 300] [--write]
    MLXGPT_STORIES260K=FOLDER python -m benchmarks.quantize       with llama2.c's stories260K.bin and tok512.bin

Two models: stories260K, on stories that it wrote itself, and a llama of 0.5 M parameters trained here on Python's own
docstrings. Calibration and measuring take windows of different documents; every result is a folder that mlx-lm loads,
and is measured by mlxgpt from that folder: perplexity, KL(float32 || quantized) in nats a token, bits per weight of all
tensors. All matrices are quantized in groups of 64, embedding and head too, by mlx_lm's methods at the same bits.
mlx_lm's dwq trains at the learning rate of its command line, 1e-6, and at 1e-4. Seconds are CPU time of whole
processes. The rows with LoRA train adapters on the quantized model with `mlxgpt finetune` on the calibration text.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.__main__ import THREADS, describe
from benchmarks.report import DOCS, replace_section

GROUP, WINDOW, CALIBRATION, MEASURED, BATCH = 64, 256, 64, 32, 8
PEERS = ("convert", "gptq", "awq", "dwq", "dwq-1e-4", "dynamic_quant")
PAGE, HEADING = DOCS / "benchmarks.md", "Quantization"
TRAINED = ["family=llama", "n_layer=2", "n_head=4", "n_kv_head=2", "n_embd=128", "n_hidden=384", "block_size=256"]


@dataclass
class Figures:
    """What one evaluator says of a folder."""

    perplexity: float
    kl: float
    bits: float  # per weight
    size: int  # bytes


@dataclass(frozen=True)
class Subject:
    """A model in float32, a text to calibrate on, and one to measure on."""

    name: str
    folder: Path
    text: Path
    held: Path


def mlxgpt(*words: object) -> tuple[float, str]:
    """CPU seconds of a command, and why it failed, or ''."""
    return timed([sys.executable, "-m", "mlxgpt", *map(str, words)])


def timed(command: list[str]) -> tuple[float, str]:
    """CPU seconds of a process, and the last line of what it said if it failed."""
    begun = sum(os.times()[2:4])
    done = subprocess.run(command, env={**os.environ, **THREADS}, capture_output=True, text=True)
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return sum(os.times()[2:4]) - begun, (lines or ["no output"])[-1] if done.returncode else ""


def needed(done: tuple[float, str]) -> float:
    """The seconds of a command that must succeed."""
    if done[1]:
        raise SystemExit(done[1])
    return done[0]


def stories(place: Path) -> Subject | None:
    """stories260K and stories that it wrote; None where it is not here."""
    source = Path(os.environ.get("MLXGPT_STORIES260K", "stories260K"))
    if not (source / "stories260K.bin").is_file():
        return None
    folder = place / "stories"
    if folder.exists():
        return Subject("stories260K", folder, place / "stories-calibration.txt", place / "stories-held.txt")
    words = ("convert", source / "stories260K.bin", folder, "--to", "hf", "--tokenizer", source / "tok512.bin")
    needed(mlxgpt(*words))
    for name, seed, rows in (("calibration", 1, CALIBRATION), ("held", 2, MEASURED)):
        write_stories(folder, place / f"stories-{name}.txt", seed, rows)
    return Subject("stories260K", folder, place / "stories-calibration.txt", place / "stories-held.txt")


def write_stories(folder: Path, path: Path, seed: int, rows: int) -> None:
    """Texts that a model draws from its own distribution, one window of tokens each."""
    from mlxgpt import load  # it loads a BLAS before MLX

    # isort: split
    import mlx.core as mx

    from mlxgpt.model import make_cache

    model, tokenizer = load.load(folder, device="cpu")
    assert tokenizer is not None
    mx.random.seed(seed)
    drawn = [mx.ones((rows, 1), mx.int32)]  # its beginning of a text
    cache = make_cache(model, rows, WINDOW)
    for _ in range(WINDOW - 1):
        drawn.append(mx.random.categorical(model(drawn[-1], cache=cache)[:, -1])[:, None].astype(mx.int32))
        mx.eval(drawn[-1])
    texts = (tokenizer.decode(row[1:]) for row in np.array(mx.concatenate(drawn, axis=1)).tolist())
    path.write_text("\n".join(texts), encoding="utf-8")


def trained(place: Path, steps: int) -> Subject:
    """A small llama trained for a minute, and documents that it has not seen."""
    from mlxgpt.common.data.pydocs import documents

    texts = [text for _, text in documents()]
    apart = np.random.default_rng(0).permutation(len(texts))
    parts = {"held": apart[:400], "calibration": apart[400:1400], "train": apart[1400:]}
    for name, chosen in parts.items():
        (place / f"docs-{name}.txt").write_text("\n".join(texts[n] for n in chosen), encoding="utf-8")
    sizes = [word for size in TRAINED for word in ("-s", f"model.{size}")]
    words = ("-s", "data.vocab_size=512", "-s", "train.eval_every=0", "--batch-size", 8, "--lr", 4e-3)
    run = place / "run"
    text = place / "docs-train.txt"
    if not (place / "trained").exists():
        needed(mlxgpt("train", "pydocs", "-d", text, "-o", run, "-n", steps, *words, *sizes, "--backend", "torch"))
        needed(mlxgpt("convert", run, place / "trained", "--to", "hf"))
    return Subject("trained", place / "trained", place / "docs-calibration.txt", place / "docs-held.txt")


class Evaluator:
    """Measures folders of one model on the same windows."""

    def __init__(self, subject: Subject):
        from mlxgpt import load  # it loads a BLAS before MLX

        # isort: split
        import mlx.core as mx

        self._load, self._mx = load.load, mx
        self._tokens = windows(subject.folder, subject.held)[:MEASURED]
        self._before = self._logs(subject.folder, None)
        self.whole = self.measure(subject.folder)

    def _logs(self, folder: Path, adapter: Path | None) -> list[Any]:
        """log-probabilities (BATCH, T, V) a batch."""
        mx, made = self._mx, []
        model, _ = self._load(folder, adapter, device="cpu")
        for at in range(0, len(self._tokens), BATCH):
            logits = model(mx.array(self._tokens[at : at + BATCH, :-1]))
            made.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            mx.eval(made[-1])
        return made

    def measure(self, folder: Path, adapter: Path | None = None) -> Figures:
        """The figures of a folder, with an adapter or without."""
        from mlxgpt.common.folders.tensors import read_header

        mx, losses, kls = self._mx, [], []
        for n, (p, q) in enumerate(zip(self._before, self._logs(folder, adapter), strict=True)):
            targets = mx.array(self._tokens[n * BATCH : (n + 1) * BATCH, 1:])
            losses.append(np.array(-mx.take_along_axis(q, targets[..., None], axis=-1)))
            kls.append(np.array((mx.exp(p) * (p - q)).sum(axis=-1)))
        headers = [read_header(path)[0] for path in sorted(folder.glob("model*.safetensors"))]
        size = sum(entry.stop - entry.start for header in headers for entry in header.values())
        loss, kl = (float(np.concatenate(each).mean(dtype=np.float64)) for each in (losses, kls))
        return Figures(math.exp(loss), kl, 8 * size / self._count(folder), size)

    def _count(self, folder: Path) -> int:
        from mlxgpt.common.folders.model_folder import read_config
        from mlxgpt.common.model import params

        return params.count(read_config(folder))


def windows(folder: Path, text: Path) -> np.ndarray:
    """A text as rows (N, WINDOW + 1) of the model's tokens."""
    from mlxgpt.common.tokenizers.load import load_tokenizer

    ids = np.asarray(load_tokenizer(folder).encode(text.read_text(encoding="utf-8")), np.int32)
    count = (len(ids) - 1) // WINDOW
    return ids[np.arange(count)[:, None] * WINDOW + np.arange(WINDOW + 1)]


def peer(method: str, folder: str, made: str, bits: str, text: str) -> None:
    """One of mlx_lm's methods, in a process of its own; ``bits`` of dynamic_quant are those per weight."""
    from mlxgpt import blas  # noqa: F401  (the same BLAS, before MLX)

    # isort: split
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.quant import awq, dwq, dynamic_quant, gptq
    from mlx_lm.utils import load, quantize_model, save

    mx.set_default_device(mx.Device(mx.cpu))
    mx.random.seed(123)
    np.random.seed(123)
    rows = windows(Path(folder), Path(text))[:CALIBRATION]
    model, tokenizer, config = load(folder, return_config=True)  # type: ignore[misc]
    data, count = mx.array(rows[:, :-1]), int(float(bits))
    if method == "convert":
        model, config = quantize_model(model, config, GROUP, count)
    elif method == "gptq":
        model, config["quantization"] = gptq.gptq_quantize(model, data, count, GROUP, count, GROUP)
    elif method == "awq":
        kind = awq.AWQ_MODEL_CONFIGS[config["model_type"]]
        awq.awq_quantize(model, data, kind, GROUP, count, GROUP, count)
        config = awq.update_config(model, config)
    elif method.startswith("dwq"):
        import copy

        import mlx.optimizers as optimizers

        whole, rate = copy.deepcopy(model), float(method.partition("-")[2] or 1e-6)
        model, config = quantize_model(model, config, GROUP, count)
        parts = [(row.tolist(), 0) for row in rows]
        dwq.dwq_quantize(
            model, lambda batch, n, split: whole(batch), optimizers.Adam(rate, bias_correction=True),
            parts * 4, parts[:8], 4, WINDOW + 1, 123, dtype=mx.float32,
        )  # fmt: skip
    else:
        low, high = 3 if float(bits) < 5 else 4, 5 if float(bits) < 5 else 8
        sizes = (low, GROUP, high, GROUP)
        found = dict(dynamic_quant.estimate_sensitivities(model, data, *sizes))
        edge = dynamic_quant.estimate_threshold(model, found, float(bits), *sizes)

        def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
            if not hasattr(module, "to_quantized"):
                return False
            return {"bits": high, "group_size": GROUP} if found[path] > edge else True

        model, config = quantize_model(model, config, GROUP, low, quant_predicate=predicate)
    save(made, folder, model, tokenizer, config)


def rows_of(subject: Subject, all_bits: list[int], place: Path) -> Iterator[tuple[str, str, Figures | str, float]]:
    """(bits, method, figures or why there are none, seconds), as they are measured."""
    evaluator, tokens = Evaluator(subject), CALIBRATION * WINDOW
    yield "32", "float32", evaluator.whole, 0.0
    for bits in all_bits:
        uniform, size = None, 0.0
        for method in ("rtn", "gptq", "awq", "rtn, mixed", "gptq, mixed"):
            name, _, mixed = method.partition(", ")
            if mixed and (not uniform or bits > 4):
                continue
            made = place / f"{subject.name}-{bits}-{method.replace(', ', '-')}"
            asked = f"mixed:{math.floor(size * 1e4) / 1e4}" if mixed else bits
            words = ("--bits", asked, "--method", name, "--group-size", GROUP, "--data", subject.text)
            held = ("--eval-data", subject.held, "--tokens", tokens)
            seconds, wrong = mlxgpt("quantize", subject.folder, made, *words, *held)
            figures = wrong or evaluator.measure(made)
            if method == "rtn" and isinstance(figures, Figures):
                uniform, size = figures, figures.bits
            yield str(bits), method, figures, seconds
        for method in PEERS:
            made = place / f"{subject.name}-{bits}-mlx_lm-{method}"
            asked = f"{size:.3f}" if method == "dynamic_quant" else str(bits)
            command = [sys.executable, "-m", "benchmarks.quantize", "--peer", method, str(subject.folder), str(made)]
            if method == "dynamic_quant" and bits not in (4,):
                continue  # it mixes two of the bits that the others have, and begins at 3
            seconds, wrong = timed([*command, asked, str(subject.text)])
            yield str(bits), f"mlx_lm {method}", wrong or evaluator.measure(made), seconds
        if bits in (3, 4):
            yield from recovered(subject, evaluator, bits, place)


def recovered(
    subject: Subject, evaluator: Evaluator, bits: int, place: Path
) -> Iterator[tuple[str, str, Figures | str, float]]:
    """LoRA on the model that gptq made."""
    base = place / f"{subject.name}-{bits}-gptq"
    data, run = place / f"{subject.name}.jsonl", place / f"{subject.name}-{bits}-lora"
    with open(data, "w", encoding="utf-8") as file:
        text = subject.text.read_text(encoding="utf-8")
        for at in range(0, len(text), 700):
            print(json.dumps({"text": text[at : at + 700]}), file=file)
    words = ("--rank", 8, "-n", 100, "--lr", 2e-3, "--batch-size", 4, "-s", "train.eval_every=100")
    length = ("-s", f"tune.block_size={WINDOW}", "-s", "tune.overflow=truncate")
    seconds, wrong = mlxgpt("finetune", "-m", base, "-d", data, "-o", run, *words, *length, "--backend", "torch")
    yield str(bits), "gptq, then LoRA, 100 steps", wrong or evaluator.measure(base, run), seconds


def line(bits: str, method: str, found: Figures | str, seconds: float, whole: float) -> str:
    """One row of the table."""
    if isinstance(found, str):
        return f"| {bits} | {method} | not run: {found[:90]} | | | | | |"
    lost = found.perplexity - whole
    cells = f"{found.perplexity:.4f} | {lost:+.4f} | {found.kl:.5f} | {found.bits:.3f} | {found.size / 2**10:,.0f}"
    return f"| {bits} | {method} | {cells} | {f'{seconds:.0f}' if seconds else ''} |"


def main() -> None:
    """Prints a table a model, and with --write puts them into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="stories,trained")
    parser.add_argument("--bits", default="2,3,4,8")
    parser.add_argument("--steps", type=int, default=300, help="of training the second model")
    parser.add_argument("--place", type=Path, help="a folder that keeps models and texts for another run")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--peer", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(*args.peer)
    start, made = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        place = args.place or Path(folder)
        for name in args.models.split(","):
            subject = stories(place) if name == "stories" else trained(place, args.steps)
            if subject is None:
                print("stories260K is not here: MLXGPT_STORIES260K names no folder with it", file=sys.stderr)
                continue
            head = "| bits | method | perplexity | loss | KL | bits per weight | KiB | s |\n|" + "---|" * 8
            made += [f"\n### {subject.name}\n", head]
            print(*made[-2:], sep="\n", flush=True)
            whole = 0.0
            for row in rows_of(subject, [int(bits) for bits in args.bits.split(",")], place):
                whole = row[2].perplexity if row[1] == "float32" and isinstance(row[2], Figures) else whole
                made.append(line(*row, whole))
                print(made[-1], flush=True)
    if args.write:
        about = (__doc__ or "").split("\n\n")
        took = f"`python -m benchmarks.quantize`, {(time.perf_counter() - start) / 60:.1f} minutes; {describe()}."
        body = "\n\n".join([about[0], about[-1], "\n".join(made).strip(), took])
        PAGE.write_text(
            replace_section(PAGE.read_text(encoding="utf-8"), HEADING, body, before="Notes"), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
