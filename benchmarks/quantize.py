"""`mlxgpt quantize` beside mlx_lm's convert -q, gptq, awq, dwq and dynamic_quant: the same text, one evaluator.

    python -m benchmarks.quantize [--models stories trained] [--bits 2 3 4 8] [--rounds 3]
    MLXGPT_STORIES260K=FOLDER python -m benchmarks quantize       with llama2.c's stories260K.bin and tok512.bin
    MLXGPT_QUANTIZED=FOLDER python -m benchmarks quantize         keeps models, texts and rows; a later run goes on

Two models: stories260K, on stories that it wrote itself, and a llama of 0.5 M parameters trained here on Python's own
docstrings. Every result is a folder, which mlxgpt measures on documents that were not calibrated or trained on:
perplexity, what it rose by, with the standard error of that over windows of 256 tokens, KL(float32 || quantized) in
nats a token, and bits per weight of all tensors. All methods calibrate on the same 64 windows, in groups of 64, and
mlx_lm's give embedding and head the same bits, too. Its dwq makes one pass at the learning rate of its command line,
1e-6, and one at 1e-4; its dynamic_quant is given the size of rtn; its convert is rtn, bit for bit. LoRA trains on other
documents: stories of another seed, or what the second model was trained on. Seconds are CPU time without imports.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.__main__ import THREADS

GROUP, WINDOW, CALIBRATION, BATCH = 64, 256, 64, 16
MEASURED = 32  # windows of each text that is measured on
STORIES = 800  # windows that LoRA trains on
PEERS = ("convert", "gptq", "awq", "dwq", "dwq-1e-4", "dynamic_quant")
TRAINED = ["family=llama", "n_layer=2", "n_head=4", "n_kv_head=2", "n_embd=128", "n_hidden=384", "block_size=256"]
COMPARED = 4  # bits of mlx_lm's methods, and of mixed ones at the size of rtn
TUNED = {3: ("rtn", "gptq"), 4: ("gptq",)}  # what LoRA begins with
TUNING = ("--rank", 16, "--lr", 3e-4, "--batch-size", 4)
HEAD = "| bits | method | perplexity | rose by | KL | bits per weight | KiB | s |\n|" + "---|" * 8


@dataclass
class Figures:
    """What one evaluator says of a folder."""

    perplexity: float
    rose: float
    error: float  # of what it rose by
    kl: float
    bits: float  # per weight
    size: int  # bytes


Found = Figures | str  # or why there are none


@dataclass(frozen=True)
class Subject:
    """A model in float32, a text to calibrate on, texts to measure on, and examples for LoRA."""

    name: str
    folder: Path
    text: Path
    held: list[Path]
    examples: Path


def mlxgpt(*words: object) -> tuple[float, str]:
    """CPU seconds of a command in this process, imports not counted, and why it failed, or ''."""
    import convert.quantize.run  # noqa: F401
    import torch_ref.calibrate
    import torch_ref.engine  # noqa: F401
    from mlxgpt.cli import main as command

    begun, said = time.process_time(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command([str(word) for word in words])
    return time.process_time() - begun, said.getvalue().strip().splitlines()[-1] if code else ""


def peer(*words: str) -> tuple[float, str]:
    """CPU seconds that a process says it needed, and the last line of what it said if it failed."""
    command = [sys.executable, "-m", "benchmarks.quantize_peer", *words]
    done = subprocess.run(command, env={**os.environ, **THREADS}, capture_output=True, text=True)
    if done.returncode:
        return 0.0, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return float(done.stdout.splitlines()[-1]), ""


def needed(done: tuple[float, str]) -> None:
    """Ends the run where a command that must succeed did not."""
    if done[1]:
        raise SystemExit(done[1])


def stories(place: Path, rounds: int) -> Subject | None:
    """stories260K and stories that it wrote; None where it is not here."""
    source = Path(os.environ.get("MLXGPT_STORIES260K", "stories260K"))
    if not (source / "stories260K.bin").is_file():
        return None
    folder, held = place / "stories", [place / f"stories-held-{n}.txt" for n in range(rounds)]
    if not folder.exists():
        words = ("convert", source / "stories260K.bin", folder, "--to", "hf", "--tokenizer", source / "tok512.bin")
        needed(mlxgpt(*words))
    text, examples = place / "stories-calibration.txt", place / "stories.jsonl"
    if not text.exists():
        text.write_text("\n".join(drawn(folder, 1, CALIBRATION)), encoding="utf-8")
    if not examples.exists():
        write_examples(examples, drawn(folder, 2, STORIES))
    for n, path in enumerate(held):
        if not path.exists():
            path.write_text("\n".join(drawn(folder, 3 + n, MEASURED + 4)), encoding="utf-8")
    return Subject("stories260K", folder, text, held, examples)


def drawn(folder: Path, seed: int, rows: int) -> list[str]:
    """Texts that a model draws from its own distribution, one window of tokens each."""
    import torch

    from torch_ref import load
    from torch_ref.model import make_cache

    model, tokenizer = load.load(folder, device="cpu")
    assert tokenizer is not None
    torch.manual_seed(seed)
    found = [torch.ones((rows, 1), dtype=torch.int64)]  # its beginning of a text
    cache = make_cache(model, rows, WINDOW)
    with torch.no_grad():
        for _ in range(WINDOW - 1):
            found.append(torch.multinomial(torch.softmax(model(found[-1], cache=cache)[:, -1], -1), 1))
    return [tokenizer.decode(row[1:]) for row in torch.cat(found, dim=1).tolist()]


def write_examples(path: Path, texts: list[str]) -> None:
    """Rows of JSON that `mlxgpt finetune` reads."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def trained(place: Path, rounds: int, steps: int) -> Subject:
    """A small llama trained for a minute, and documents that it has not seen."""
    from mlxgpt.common.data.pydocs import documents

    texts = [text for _, text in documents()]
    apart = np.random.default_rng(0).permutation(len(texts)).tolist()
    parts = {f"held-{n}": apart[400 * n : 400 * n + 400] for n in range(rounds)}
    parts |= {"calibration": apart[1200:1400], "train": apart[1400:]}
    for name, chosen in parts.items():
        (place / f"docs-{name}.txt").write_text("\n".join(texts[n] for n in chosen), encoding="utf-8")
    run, text, examples = place / "run", place / "docs-train.txt", place / "docs.jsonl"
    whole = text.read_text(encoding="utf-8")
    write_examples(examples, [whole[at : at + 500] for at in range(0, len(whole), 500)])
    sizes = [word for size in TRAINED for word in ("-s", f"model.{size}")]
    words = ("-s", "data.vocab_size=512", "-s", "train.eval_every=0", "--batch-size", 8, "--lr", 4e-3)
    if not (place / "trained").exists():
        command = ("train", "pydocs", "-d", text, "-o", run, "-n", steps, *words, *sizes)
        needed(mlxgpt(*command, "--force", "--backend", "torch"))
        needed(mlxgpt("convert", run, place / "trained", "--to", "hf"))
    held = [place / f"docs-held-{n}.txt" for n in range(rounds)]
    return Subject("trained", place / "trained", place / "docs-calibration.txt", held, examples)


class Evaluator:
    """Measures folders of one model on the same windows."""

    def __init__(self, subject: Subject):
        self._tokens = np.concatenate([windows(subject.folder, held)[:MEASURED] for held in subject.held])
        self._before = list(self._logs(subject.folder, None))
        self.count = len(self._tokens) * WINDOW

    def _logs(self, folder: Path, adapter: Path | None) -> Iterator[Any]:
        """log-probabilities (BATCH, T, V) a batch."""
        import torch

        from torch_ref import load

        model, _ = load.load(folder, adapter, device="cpu")
        with torch.no_grad():
            for at in range(0, len(self._tokens), BATCH):
                yield torch.log_softmax(model(torch.from_numpy(self._tokens[at : at + BATCH, :-1])).float(), dim=-1)

    def measure(self, folder: Path, adapter: Path | None = None) -> Figures:
        """The figures of a folder, with an adapter or without."""
        import torch

        from mlxgpt.common.folders.model_folder import read_config
        from mlxgpt.common.folders.tensors import read_header
        from mlxgpt.common.model import params

        firsts, losses, kls = [], [], []
        for n, (p, q) in enumerate(zip(self._before, self._logs(folder, adapter), strict=True)):
            targets = torch.from_numpy(self._tokens[n * BATCH : (n + 1) * BATCH, 1:])[..., None]
            for each, into in ((p, firsts), (q, losses)):
                into.append(-each.gather(-1, targets)[..., 0].mean(-1).double().numpy())
            kls.append((p.exp() * (p - q)).sum(-1).mean(-1).double().numpy())
        first, loss, kl = (np.concatenate(each) for each in (firsts, losses, kls))
        headers = [read_header(path)[0] for path in sorted(folder.glob("model*.safetensors"))]
        size = sum(entry.stop - entry.start for header in headers for entry in header.values())
        before, after = math.exp(first.mean()), math.exp(loss.mean())
        error = after * float((loss - first).std(ddof=1)) / math.sqrt(len(loss))
        return Figures(
            after, after - before, error, float(kl.mean()), 8 * size / params.count(read_config(folder)), size
        )


def windows(folder: Path, text: Path) -> np.ndarray:
    """A text as rows (N, WINDOW + 1) of the model's tokens."""
    from mlxgpt.common.tokenizers.load import load_tokenizer

    ids = np.asarray(load_tokenizer(folder).encode(text.read_text(encoding="utf-8")), np.int64)
    count = (len(ids) - 1) // WINDOW
    return ids[np.arange(count)[:, None] * WINDOW + np.arange(WINDOW + 1)]


class Rows:
    """The rows of one model's table, made once: they are kept beside the models."""

    def __init__(self, subject: Subject, place: Path, tuning: int):
        self.subject, self.place, self.tuning = subject, place, tuning
        self.evaluator, self.lines = Evaluator(subject), [f"### {subject.name}\n", HEAD]
        self.seconds, self.earlier = 0.0, 0

    def row(self, bits: int, method: str, make: Callable[[Path], tuple[float, str]], base: str = "") -> Found:
        """One row, printed; ``make`` writes a folder, which is an adapter of that of ``base`` where there is one."""
        made = self.folder(bits, method)
        kept = Path(f"{made}.row{len(self.subject.held)}.json")
        self.earlier += kept.exists()
        if not kept.exists():
            seconds, wrong = make(made)
            found = () if wrong else (self.folder(bits, base), made) if base else (made,)
            kept.write_text(json.dumps([wrong or dataclasses.asdict(self.evaluator.measure(*found)), seconds]))
        result, seconds = json.loads(kept.read_text())
        self.seconds += seconds
        figures: Found = result if isinstance(result, str) else Figures(**result)
        print(line(bits, method, figures, seconds), file=sys.stderr, flush=True)
        self.lines.append(line(bits, method, figures, seconds))
        return figures

    def folder(self, bits: int, method: str) -> Path:
        """Where a row's model is."""
        if method == "float32":
            return self.subject.folder
        return self.place / f"{self.subject.name}-{bits}-{method.translate({44: None, 32: '-'})}"

    def table(self, all_bits: list[int], peers: list[str]) -> str:
        """All rows, of float32 first."""
        self.row(32, "float32", lambda _: (0.0, ""))
        if self.tuning:
            self._tuned(32, "float32")
        for bits in all_bits:
            self._ours(bits, peers)
        return "\n".join(self.lines)

    def _ours(self, bits: int, peers: list[str]) -> None:
        """Rows of one number of bits."""
        uniform = None
        for method in ("rtn", "gptq", "awq", "rtn, mixed", "gptq, mixed"):
            name, _, mixed = method.partition(", ")
            if mixed and (uniform is None or bits != COMPARED):
                continue
            asked = f"mixed:{math.floor(uniform * 1e4) / 1e4}" if mixed and uniform else bits
            found = self.row(bits, method, lambda made, asked=asked, name=name: self._quantized(made, asked, name))
            uniform = found.bits if method == "rtn" and isinstance(found, Figures) else uniform
        for name in peers if bits == COMPARED else ():
            asked = f"{uniform:.3f}" if name == "dynamic_quant" else str(bits)
            given = asked, str(self.subject.text), str(self.subject.folder)
            self.row(bits, f"mlx_lm {name}", lambda made, name=name, given=given: peer(name, str(made), *given))
        for base in TUNED.get(bits, ()) if self.tuning else ():
            self._tuned(bits, base)

    def _quantized(self, made: Path, bits: int | str, method: str) -> tuple[float, str]:
        """`mlxgpt quantize`."""
        words = ("--bits", bits, "--method", method, "--group-size", GROUP, "--data", self.subject.text, "--force")
        held = ("--eval-data", self.subject.held[0], "--tokens", CALIBRATION * WINDOW, "--backend", "torch")
        return mlxgpt("quantize", self.subject.folder, made, *words, *held)

    def _tuned(self, bits: int, base: str) -> None:
        """`mlxgpt finetune` on a model that another row made."""
        words = ("-d", self.subject.examples, *TUNING, "-n", self.tuning, "-s", f"train.eval_every={self.tuning}")
        length = ("-s", f"tune.block_size={WINDOW}", "-s", "tune.overflow=truncate", "--force", "--backend", "torch")
        folder = self.folder(bits, base)
        self.row(
            bits, f"{base}, then LoRA", lambda made: mlxgpt("finetune", "-m", folder, "-o", made, *words, *length), base
        )


def line(bits: int, method: str, found: Found, seconds: float) -> str:
    """One row of the table."""
    if isinstance(found, str):
        return f"| {bits} | {method} | not run: {found} | | | | | |"
    rose = "" if method == "float32" else f"{found.rose:+.4f} ± {found.error:.4f}"
    cells = f"{found.perplexity:.4f} | {rose} | {found.kl:.5f} | {found.bits:.3f} | {found.size / 2**10:,.0f}"
    return f"| {bits} | {method} | {cells} | {f'{seconds:.0f}' if seconds else ''} |"


def main() -> None:
    """Prints a table a model, or with --json both as one string."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("stories", "trained"), default=["stories", "trained"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--steps", type=int, default=150, help="of training the second model")
    parser.add_argument("--tuning", type=int, default=200, help="steps of LoRA; 0: none")
    parser.add_argument(
        "--rounds", type=int, choices=(1, 2, 3), default=3, help="texts to measure on, of 32 windows each"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    made = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(os.environ.get("MLXGPT_QUANTIZED", temporary))
        for name in args.models:
            found = stories(place, args.rounds) if name == "stories" else trained(place, args.rounds, args.steps)
            if found is None:
                print("stories260K is not here: MLXGPT_STORIES260K names no folder with it", file=sys.stderr)
                continue
            rows = Rows(found, place, args.tuning)
            made.append(rows.table(args.bits, list(args.peers)))
            made.append(
                f"Measured on {rows.evaluator.count:,} tokens of {args.rounds} texts; LoRA: {args.tuning} steps, rank "
                f"{TUNING[1]}, learning rate {TUNING[3]}. {rows.seconds / 60:.1f} minutes of CPU time in all, "
                f"{rows.earlier} of {len(rows.lines) - 2} rows kept from earlier runs."
            )
    print(json.dumps("\n\n".join(made)) if args.json else "\n\n".join(made))


if __name__ == "__main__":
    main()
