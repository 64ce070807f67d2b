"""Decoding speed beside mlx-lm and transformers: a random llama of 54 M, fp32, batch 1, greedy, on the CPU.

    python benchmarks/decode.py [--rounds 9] [--tokens 64] [--threads 1] [--contenders mlx,mlx-lm,...] [--json]

Every contender lives in its own process with the same folder and, for MLX, the same BLAS; they take turns, so that a
busy machine hits all alike. Ratios are taken round by round. The clock runs from the first new token to the last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROMPT, VOCAB = 128, 32000
CONTENDERS = ("mlx", "torch", "mlx-lm", "transformers")
PAIRS = (("mlx", "mlx-lm"), ("mlx", "transformers"), ("torch", "transformers"))


def write_folder(folder: Path) -> None:
    """The model: d 512, 12 layers, 8 heads, MLP 1376, vocabulary 32000, tied."""
    from mlxgpt.common import config, params
    from mlxgpt.common.folder import write_model

    sizes = dict(n_layer=12, n_head=8, n_embd=512, n_hidden=1376, vocab_size=VOCAB, block_size=1024, tied=True)
    model = config.build({"model": {"family": "llama", **sizes}}).model
    write_model(folder, model, params.init_params(model, 0))


def ours(package: str, folder: str, prompt: list[int], count: int) -> Callable[[], Iterator[int]]:
    """mlxgpt or torch_ref."""
    from importlib import import_module

    from mlxgpt.common import continuation
    from mlxgpt.common.config import SampleConfig

    generate = import_module(f"{package}.generate")
    model, _ = import_module(f"{package}.load").load(folder, device="cpu")
    generate.prepare(model)

    def run() -> Iterator[int]:
        rows = continuation.start_rows(model.config, None, [prompt], ())
        sample = SampleConfig(temperature=0.0, max_tokens=count)
        for tokens in generate.decode(model, rows, sample, VOCAB):
            yield tokens[0]

    return run


def mlx_lm(folder: str, prompt: list[int], count: int) -> Callable[[], Iterator[int]]:
    """mlx-lm's own loop."""
    from mlxgpt import blas  # noqa: F401  (the same BLAS, before MLX)

    # isort: split
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))

    def run() -> Iterator[int]:
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=count):
            yield int(token)

    return run


def transformers(folder: str, prompt: list[int], count: int) -> Callable[[], list[tuple[float, int]]]:
    """transformers' generate; a streamer notes the time of every token."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.stamps: list[tuple[float, int]] = []

        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                self.stamps.append((time.perf_counter(), int(value)))

        def end(self) -> None:
            pass

    def run() -> list[tuple[float, int]]:
        clock = Clock()
        ids = torch.tensor([prompt])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            pad_token_id=0, eos_token_id=None, streamer=clock,
        )  # fmt: skip
        return clock.stamps

    return run


def serve(name: str, folder: str, count: int) -> None:
    """A contender's process: a line in asks for a run, a line of JSON comes out."""
    prompt = [(7919 * i) % VOCAB for i in range(1, PROMPT + 1)]
    packages = {"mlx": "mlxgpt", "torch": "torch_ref"}
    if name in packages:
        run = ours(packages[name], folder, prompt, count)
    else:
        run = {"mlx-lm": mlx_lm, "transformers": transformers}[name](folder, prompt, count)
    print(flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        stamps = [item if isinstance(item, tuple) else (time.perf_counter(), item) for item in run()]
        rate = (len(stamps) - 1) / (stamps[-1][0] - stamps[0][0])
        tokens = [token for _, token in stamps]
        print(json.dumps({"rate": rate, "first": stamps[0][0] - start, "tokens": tokens}), flush=True)


def ask(process: subprocess.Popen) -> dict:
    """One run of a contender."""
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def quartile(values: list[float]) -> float:
    """The lower quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]


def compare(names: list[str], rounds: int, count: int, threads: int) -> dict:
    """Runs the contenders in turn; one round warms up and is dropped."""
    environment = dict(
        os.environ, OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads)
    )
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "model")
        processes = {}
        try:
            for name in names:
                command = [
                    sys.executable,
                    __file__,
                    "--serve",
                    name,
                    str(Path(folder) / "model"),
                    "--tokens",
                    str(count),
                ]
                processes[name] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
                )
            for process in processes.values():
                process.stdout.readline()
            runs = [{name: ask(process) for name, process in processes.items()} for _ in range(rounds + 1)][1:]
        finally:
            for process in processes.values():
                process.stdin.close()
                process.wait()
    result: dict = {
        "rounds": rounds,
        "new_tokens": count,
        "prompt_tokens": PROMPT,
        "threads": threads,
        "tokens_per_s": {},
        "ratios": {},
    }
    for name in names:
        rates = [run[name]["rate"] for run in runs]
        first = statistics.median(run[name]["first"] for run in runs)
        result["tokens_per_s"][name] = {
            "median": statistics.median(rates), "lower_quartile": quartile(rates), "first_token_s": first,
        }  # fmt: skip
    for a, b in PAIRS:
        if a in names and b in names:
            ratios = [run[a]["rate"] / run[b]["rate"] for run in runs]
            result["ratios"][f"{a} / {b}"] = {"median": statistics.median(ratios), "lower_quartile": quartile(ratios)}
    result["same_tokens"] = all(run[name]["tokens"] == runs[0][names[0]]["tokens"] for run in runs for name in names)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve, args.tokens)
        return 0
    result = compare(args.contenders.split(","), args.rounds, args.tokens, args.threads)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{args.rounds} rounds, {PROMPT} prompt and {args.tokens} new tokens, {args.threads} thread(s)")
    for name, row in result["tokens_per_s"].items():
        print(f"{name:14s} {row['median']:6.1f} tokens/s (lower quartile {row['lower_quartile']:.1f}), "
              f"first token {row['first_token_s'] * 1000:.0f} ms")  # fmt: skip
    for pair, row in result["ratios"].items():
        print(f"{pair:22s} median {row['median']:.2f}, lower quartile {row['lower_quartile']:.2f}")
    print("same tokens:", "yes" if result["same_tokens"] else "no")
    return 0


if __name__ == "__main__":
    sys.exit(main())
