"""A cache in 8 and 4 bits beside mlx-lm's, and the cache of a model whose layers look at a window: error, bytes, speed.

    python -m benchmarks.cache [--rounds 5] [--tokens 1024] [--steps 200] [--threads 1] [--json]
    python -m benchmarks.cache --model DIR --text FILE       the KL of a llama alone

KL is of the full cache's distribution from the quantized one's, a token, behind the first 64 of windows of 256 tokens
of Python's language reference, read one at a time; the model is a llama of 1 M with heads of 64, trained for --steps on
docstrings. Speed and bytes are of random models: a llama of 54 M, and a gemma3_text with one global layer in six and a
window of 512; --tokens of prompt, then tokens one by one. Both sides hold the same groups, from the first token on.
"""

import argparse
import functools
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import decode
from benchmarks.pairs import Contender, race, row
from benchmarks.report import Row, finish
from mlxgpt.common.inference import kv_cache

DRAWN = 32
LENGTH, FIRST, WINDOWS = 256, 64, 6  # tokens of a text, of them not counted, and texts
GEMMA = {"family": "gemma3_text", "n_layer": 12, "n_head": 8, "n_kv_head": 4, "head_dim": 64, "n_embd": 512,
         "n_hidden": 1376, "vocab_size": 32000, "block_size": 16384, "window": 512,
         "window_layers": [n for n in range(12) if n % 6 != 5]}  # fmt: skip
LLAMA = {"family": "llama", **decode.SIZES, "block_size": 16384}


def train(folder: Path, steps: int) -> Path:
    """A model of ours in a folder that mlx-lm loads."""
    sets = {"model.family": "llama", "model.n_head": 2, "model.block_size": LENGTH}
    words = [each for key, value in sets.items() for each in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "mlxgpt", "train", "pydocs", "-n", str(steps), "-o", str(folder / "run"), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command = [sys.executable, "-m", "mlxgpt", "convert", str(folder / "run"), str(folder / "trained")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "trained"


def windows(folder: Path, text: str) -> np.ndarray:
    """The first tokens (WINDOWS, LENGTH) of a text."""
    from mlxgpt.common.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text[: 16 * WINDOWS * LENGTH])
    return np.array(ids[: WINDOWS * LENGTH], np.int32).reshape(WINDOWS, LENGTH)


def divergence(folder: Path, package: str, tokens: np.ndarray) -> list[float]:
    """Nats a token by which the distribution behind a cache in 8, and in 4 bits differs from that behind a full one."""
    found: list[list[float]] = [[], []]
    for text in tokens:
        right, *others = (logprobs(package, str(folder), text, bits) for bits in (0, 8, 4))
        for each, other in zip(found, others, strict=True):
            each.append((np.exp(right) * (right - other)).sum(-1)[FIRST:].mean())
    return [float(np.mean(each)) for each in found]


def logprobs(package: str, folder: str, text: np.ndarray, bits: int) -> np.ndarray:
    """(T, V) float64, each token read behind those before it."""
    step = reader(package, folder, bits)[0]
    logits = np.stack([step(int(token)) for token in text]).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


@functools.cache
def loaded(package: str, folder: str) -> Any:
    """A model on the CPU, ready to draw."""
    if package == "mlx_lm":
        from mlxgpt import blas  # noqa: F401  (the same BLAS, before MLX)

        # isort: split
        import mlx.core as mx
        from mlx_lm.utils import load_model

        mx.set_default_device(mx.Device(mx.cpu))
        return load_model(Path(folder))[0]
    model, _ = importlib.import_module(f"{package}.load").load(folder, device="cpu")
    model.eval()
    importlib.import_module(f"{package}.generate").prepare(model)
    return model


def reader(package: str, folder: str, bits: int) -> tuple[Any, Any]:
    """A function of tokens that gives the last one's logits (V,), behind those given before; and the bytes held."""
    model, held = loaded(package, folder), list[Any]()

    def size() -> int:
        return sum(layer.nbytes for layer in held)

    if package == "mlx_lm":
        import mlx.core as mx
        from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

        group = kv_cache.group_size(json.loads((Path(folder) / "config.json").read_text())["head_dim"], bits)
        held += [QuantizedKVCache(group, bits) for _ in model.layers] if bits else make_prompt_cache(model)
        return lambda *tokens: np.array(model(mx.array([tokens]), cache=held)[0, -1]), size
    held += importlib.import_module(f"{package}.model").make_cache(model, 1, model.config.block_size, kv_bits=bits)
    if package == "mlxgpt":
        return lambda *tokens: np.array(model([tokens], cache=held, last_only=True)[0, -1]), size
    import torch

    def step(*tokens: int) -> np.ndarray:
        with torch.no_grad():
            return model([tokens], cache=held, last_only=True)[0, -1].numpy()

    return step, size


def drawing(package: str, folder: str, bits: str, tokens: str):
    """Tokens one by one behind a prompt; the bytes that are held are noted in the folder."""
    step, size = reader(package, folder, int(bits))
    prompt = [7919 * i % LLAMA["vocab_size"] for i in range(1, 1 + int(tokens))]
    for start in range(0, len(prompt), 512):
        logits = step(*prompt[start : start + 512])

    def run() -> int:
        nonlocal logits
        for _ in range(DRAWN):
            logits = step(int(logits.argmax()))
        (Path(folder) / f"{package} {bits}.json").write_text(json.dumps(size()))
        return DRAWN

    return run


def write_folder(folder: Path, sizes: dict[str, Any]) -> None:
    """A random model."""
    from mlxgpt.common import recipes
    from mlxgpt.common.folders.model_folder import write_model
    from mlxgpt.common.model import params

    model = recipes.build({"model": sizes}).model
    write_model(folder, model, params.init_params(model, 0))


def race_at(folder: Path, what: str, bits: list[int], tokens: int, rounds: int, env: dict[str, str]) -> list[Row]:
    """Speeds and bytes of all sides at each number of bits, 0 for a full cache."""
    sides = {
        (package, each): Contender(package, "cache", "drawing", (package, str(folder), str(each), str(tokens)), env)
        for each in bits
        for package in ("mlxgpt", "mlx_lm", "torch_ref")
    }
    race(list(sides.values()), rounds)
    rows = []
    for each in bits:
        name = f"{what}, {each or 'no'} bits" if len(bits) > 1 else what
        ours, lm, torch = (sides[package, each] for package in ("mlxgpt", "mlx_lm", "torch_ref"))
        rows.append(row(f"MLX {name}", "mlx-lm, the same cache", "tok/s", ours, lm))
        held, theirs = (json.loads((folder / f"{name} {each}.json").read_text()) for name in ("mlxgpt", "mlx_lm"))
        rows.append(Row(f"bytes held, {name}", "mlx-lm", "MiB", held / 2**20, theirs / 2**20, [held / theirs]))
        if each:
            rows.append(row(f"MLX {name}", "mlxgpt, a full cache", "tok/s", ours, sides["mlxgpt", 0]))
            rows.append(row(f"torch {name}", "torch_ref, a full cache", "tok/s", torch, sides["torch_ref", 0]))
    return rows


def errors(folder: Path, text: str) -> list[Row]:
    """How far the distributions behind quantized caches are from those behind full ones."""
    texts, rows = windows(folder, text), []
    found = {package: divergence(folder, package, texts) for package in ("mlxgpt", "torch_ref", "mlx_lm")}
    for bits, *sides in zip((8, 4), *found.values(), strict=True):
        ours, torch, lm = sides
        rows.append(Row(f"MLX KL, {bits} bits", "mlx-lm", "nats", ours, lm, [ours / lm]))
        rows.append(Row(f"torch KL, {bits} bits", "mlx-lm", "nats", torch, lm, [torch / lm]))
    return rows


def measure(rounds: int, tokens: int, steps: int, threads: int) -> list[Row]:
    """Errors on real text, then speeds and bytes."""
    env = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        from pydoc_data.topics import topics

        rows += errors(train(Path(temporary), steps), "\n\n".join(topics[name] for name in sorted(topics)))
        for name, sizes, bits in (("llama 54 M", LLAMA, [0, 8, 4]), ("gemma3_text, window 512", GEMMA, [0])):
            folder = Path(temporary) / str(sizes["family"])
            write_folder(folder, sizes)
            rows += race_at(folder, f"{name}, {tokens} tokens", bits, tokens, rounds, env)
    return rows


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    parser.add_argument("--steps", type=int, default=200, help="of training the model whose errors are measured")
    parser.add_argument("--threads", type=int, default=1, help="of each contender; neighbors disturb more than one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", type=Path, help="a llama's folder that mlx-lm loads; with --text")
    parser.add_argument("--text", type=Path, help="what it has not seen")
    args = parser.parse_args()
    if bool(args.model) != bool(args.text):
        parser.error("expected --model and --text together")
    if args.model:
        finish(errors(args.model, args.text.read_text(encoding="utf-8")), args.json)
    else:
        finish(measure(args.rounds, args.tokens, args.steps, args.threads), args.json)


if __name__ == "__main__":
    main()
