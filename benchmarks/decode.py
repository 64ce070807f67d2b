"""Decoding with a key-value cache beside mlx-lm and transformers: new tokens a second, and ms to the first, on the CPU.

    python -m benchmarks.decode [--rounds 9] [--tokens 64] [--threads 1] [--json]

A random llama of 54 M (width 512, 12 layers, 8 heads, MLP 1376, vocabulary 32000, tied), float32, batch 1, greedy, 16
tokens of prompt; for the first token 128. All load the same folder; mlx-lm gets the BLAS that we get. All must draw the
same tokens.
"""

import argparse
import importlib
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pairs import Contender, race, row
from benchmarks.report import Row, finish

SIZES = {"n_layer": 12, "n_head": 8, "n_embd": 512, "n_hidden": 1376, "vocab_size": 32000, "block_size": 1024}
PROMPT, LONG_PROMPT = 16, 128  # tokens: before many new ones, and before the first


def prompt_of(count: str) -> list[int]:
    """What is continued by ``count`` tokens."""
    return [7919 * i % SIZES["vocab_size"] for i in range(1, 1 + (LONG_PROMPT if count == "1" else PROMPT))]


def write_folder(folder: Path) -> None:
    """The model that all contenders load."""
    from mlxgpt.common import recipes
    from mlxgpt.common.folders.model_folder import write_model
    from mlxgpt.common.model import params

    model = recipes.build({"model": {"family": "llama", **SIZES}}).model
    write_model(folder, model, params.init_params(model, 0))


def ours(package: str, folder: str, count: str):
    """mlxgpt or torch_ref."""
    from mlxgpt.common.config import SampleConfig

    generate = importlib.import_module(f"{package}.generate")
    model, _ = importlib.import_module(f"{package}.load").load(folder, device="cpu")
    generate.prepare(model)
    sample, prompt = SampleConfig(temperature=0.0, max_tokens=int(count)), prompt_of(count)

    def run() -> int:
        tokens = generate.generate(model, None, [prompt], sample)[0].tokens
        return check(folder, tokens)

    return run


def mlx_lm(folder: str, count: str):
    """mlx-lm's own loop."""
    from mlxgpt import blas  # noqa: F401  (the same BLAS, before MLX)

    # isort: split
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.Device(mx.cpu))
    model, _ = load_model(Path(folder))
    prompt = mx.array(prompt_of(count))

    def run() -> int:
        return check(folder, [int(token) for token, _ in generate_step(prompt, model, max_tokens=int(count))])

    return run


def transformers(folder: str, count: str):
    """transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([prompt_of(count)])
    options = {"do_sample": False, "min_new_tokens": int(count), "max_new_tokens": int(count), "pad_token_id": 0}

    def run() -> int:
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **options)
        return check(folder, found[0, prompt.shape[1] :].tolist())

    return run


def check(folder: str, tokens: list[int]) -> int:
    """The number of tokens, which must be those that the first contender drew."""
    path = Path(folder) / f"{len(tokens)} tokens.txt"
    if not path.exists():
        path.write_text(str(tokens))
    if path.read_text() != str(tokens):
        raise SystemExit(f"drew {tokens}, another contender {path.read_text()}")
    return len(tokens)


def measure(rounds: int, count: int, threads: int) -> list[Row]:
    """Everybody in turn, in processes of their own."""
    env = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "model")
        write_folder(Path(folder))

        def contenders(count: int) -> list[Contender]:
            given = (folder, str(count))
            sides = [("mlxgpt", "ours", ("mlxgpt", *given)), ("mlx-lm", "mlx_lm", given)]
            sides += [("torch_ref", "ours", ("torch_ref", *given)), ("transformers", "transformers", given)]
            return [Contender(name, "decode", function, args, env) for name, function, args in sides]

        many, first = contenders(count), contenders(1)
        race(many, rounds)
        race(first, rounds)
    rows = []
    for unit, (mlx, lm, torch, hf) in (("tok/s", many), ("ms", first)):
        what = "decode" if unit == "tok/s" else "first token"
        goal = "worse quartile >= 0.95" if unit == "tok/s" else "worse quartile <= 1.05"
        rows += [
            row(f"MLX {what}, llama 54 M", "mlx-lm, same BLAS", unit, mlx, lm, goal),
            row(f"MLX {what}, llama 54 M", "transformers generate", unit, mlx, hf, "aim at 1"),
            row(f"torch {what}, llama 54 M", "transformers generate", unit, torch, hf, "aim at 1"),
        ]
    return rows


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a round")
    parser.add_argument("--threads", type=int, default=1, help="of each contender; neighbors disturb more than one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    finish(measure(args.rounds, args.tokens, args.threads), args.json)


if __name__ == "__main__":
    main()
