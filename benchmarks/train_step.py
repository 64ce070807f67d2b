"""One training step (forward, backward, clip, AdamW) against plain scripts of the same model, in tokens a second.

    python -m benchmarks.train_step [--size tiny|baby] [--rounds 9] [--json]
    python -m benchmarks.train_step --device cuda [--size gpt2-124m] [--dtype bfloat16] [--rounds 9]

The peers are what one would write by hand: a GPT of nn.Linear, nn.LayerNorm and the frameworks' own attention, loss,
clipping and AdamW, compiled with mx.compile in MLX, eager or compiled in PyTorch. ``installed`` is the MLX script with
the BLAS that its wheel carries. tiny: 4 layers, 4 heads, width 128, block 64, batch 12; baby: 6, 6, 384, 256, 8; both
have 65 vocabulary entries and are float32. ``--device`` compares torch alone on cuda, cuda:N, mps or cpu:
gpt2-124m is nanoGPT's GPT-2, micro-batches of 12 rows of 1024, in bfloat16 unless --dtype says otherwise; its peer has
float32 weights under autocast and on CUDA a fused AdamW, as nanoGPT trains it. MFU is printed where the peak is known.
"""

import argparse
import sys

import numpy as np

from benchmarks.pairs import Contender, race, row
from benchmarks.report import Row, finish

SIZES = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "batch": 12, "steps": 20},
    "baby": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "batch": 8, "steps": 2},
    "gpt2-124m": {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "block_size": 1024,
        "vocab_size": 50304,
        "batch": 12,
        "steps": 10,
    },
}


def batch_of(size: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and the tokens that follow them."""
    rows = np.random.default_rng(0).integers(0, size["vocab_size"], (size["batch"], size["block_size"] + 1))
    return rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)


def engine(package: str, name: str, compile: str = "auto", device: str = "cpu", dtype: str = "float32"):
    """Our engine of either framework."""
    import importlib

    from mlxgpt.common.batch import Batch
    from mlxgpt.common.model import params
    from mlxgpt.common.recipes import build

    size = SIZES[name]
    model = {key: size[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    train = {"batch_size": size["batch"], "compile": compile, "compute_dtype": dtype}
    recipe = build({"model": model, "train": train})
    engine = importlib.import_module(f"{package}.engine").Engine(recipe, params.init_params(recipe.model, 0), device)
    tokens, targets = batch_of(size)
    batch = Batch(tokens, targets, np.ones(tokens.shape, np.float32))

    def run() -> int:
        for _ in range(size["steps"]):
            engine.train_step(engine.t + 1, [batch], 1e-3)
        finish_on(device)
        return size["steps"] * tokens.size

    return run


def finish_on(device: str) -> None:
    """Waits until a GPU of torch has done what it was given."""
    if device != "cpu":
        import torch

        (torch.cuda if device.startswith("cuda") else torch.mps).synchronize()


def mlx_script(name: str, steps: str = "0"):
    """A minimal compiled MLX training script."""
    from mlxgpt import blas  # noqa: F401  (the same BLAS as ours, unless MLXGPT_BLAS says otherwise)

    # isort: split
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optimizers

    size = SIZES[name]
    width, heads = size["n_embd"], size["n_head"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def __call__(self, x):
            B, T, C = x.shape
            q, k, v = mx.split(self.qkv(self.ln_1(x)).reshape(B, T, 3 * heads, C // heads).swapaxes(1, 2), 3, axis=1)
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=(C // heads) ** -0.5, mask="causal")
            x = x + self.proj(y.swapaxes(1, 2).reshape(B, T, C))
            return x + self.out(nn.gelu_approx(self.fc(self.ln_2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(size["vocab_size"], width), nn.Embedding(size["block_size"], width)
            self.h, self.ln_f = [Block() for _ in range(size["n_layer"])], nn.LayerNorm(width)

        def __call__(self, x):
            x = self.wte(x) + self.wpe(mx.arange(x.shape[1]))
            for block in self.h:
                x = block(x)
            return self.wte.as_linear(self.ln_f(x))

    model = GPT()
    optimizer = optimizers.AdamW(1e-3, betas=[0.9, 0.99], weight_decay=0.1, bias_correction=True)
    mx.eval(model.parameters())
    loss_and_grad = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))

    def step(x, y):
        loss, grads = loss_and_grad(x, y)
        grads, _ = optimizers.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return loss

    state = [model.state, optimizer.state]
    compiled = mx.compile(step, inputs=state, outputs=state)
    tokens, targets = (mx.array(a) for a in batch_of(size))
    count = int(steps) or size["steps"]

    def run() -> int:
        for _ in range(count):
            mx.eval(compiled(tokens, targets), state)
        return count * tokens.size

    return run


def torch_script(name: str, compile: str = "off", device: str = "cpu", dtype: str = "float32"):
    """A plain PyTorch GPT, eager or compiled; bfloat16 is autocast's."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    size = SIZES[name]
    width, heads = size["n_embd"], size["n_head"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            B, T, C = x.shape
            q, k, v = self.qkv(self.ln_1(x)).split(C, dim=2)
            q, k, v = (a.view(B, T, heads, C // heads).transpose(1, 2) for a in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
            return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(size["vocab_size"], width), nn.Embedding(size["block_size"], width)
            self.h, self.ln_f = nn.ModuleList(Block() for _ in range(size["n_layer"])), nn.LayerNorm(width)

        def forward(self, x, y):
            h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
            for block in self.h:
                h = block(h)
            return F.cross_entropy(F.linear(self.ln_f(h), self.wte.weight).flatten(0, 1), y.flatten())

    model = GPT().to(device)
    fused = True if device.startswith("cuda") else None
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)
    forward = torch.compile(model) if compile == "on" else model
    tokens, targets = (torch.from_numpy(a).long().to(device) for a in batch_of(size))
    autocast = torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=dtype == "bfloat16")

    def run() -> int:
        for _ in range(size["steps"]):
            with autocast:
                loss = forward(tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
        finish_on(device)
        return size["steps"] * tokens.numel()

    return run


def measure(size: str, rounds: int, compiled: bool, installed: bool) -> list[Row]:
    """Rows of the table for one size."""
    me, unit, rows = "train_step", "tok/s", []
    ours, peer = Contender("mlxgpt", me, "engine", ("mlxgpt", size)), Contender("MLX script", me, "mlx_script", (size,))
    race([ours, peer], rounds)
    against = "minimal compiled MLX script, same BLAS"
    rows.append(row(f"MLX step, {size}", against, unit, ours, peer, "worse quartile >= 0.95"))
    if installed:
        ours = Contender("mlxgpt", me, "engine", ("mlxgpt", size))
        bare = Contender("MLX as installed", me, "mlx_script", (size, "1"), {"MLXGPT_BLAS": "none"})
        race([ours, bare], min(rounds, 3))
        goal = ">= 6" if size == "tiny" else ">= 10"
        rows.append(row(f"MLX step, {size}", "the same script as installed", unit, ours, bare, goal))
    ours, peer = (
        Contender("torch_ref", me, "engine", ("torch_ref", size)),
        Contender("torch", me, "torch_script", (size,)),
    )
    race([ours, peer], rounds)
    rows.append(row(f"torch step, {size}", "plain eager PyTorch GPT", unit, ours, peer, "worse quartile >= 0.95"))
    if compiled:
        ours = Contender("torch_ref compiled", me, "engine", ("torch_ref", size, "on"))
        peer = Contender("torch compiled", me, "torch_script", (size, "on"))
        race([ours, peer], rounds)
        rows.append(row(f"torch step, {size}, compiled", "that GPT compiled", unit, ours, peer, "median >= 1"))
    return rows


def measure_on(device: str, size: str, rounds: int, dtype: str, compiled: bool) -> list[Row]:
    """Rows of torch on one device, and a line of MFU on standard error."""
    made = []
    for how in ("off", "on") if compiled else ("off",):
        words = (size, how, device, dtype)
        ours = Contender("torch_ref", "train_step", "engine", ("torch_ref", *words))
        peer = Contender("torch", "train_step", "torch_script", words)
        race([ours, peer], rounds)
        spelled, of = ("compiled", "that GPT compiled") if how == "on" else ("eager", "plain eager PyTorch GPT")
        goal = "worse quartile >= 1" if how == "on" else "worse quartile >= 0.95"
        made.append(row(f"torch step, {size}, {dtype}, {device}, {spelled}", of, "tok/s", ours, peer, goal))
        print(f"{spelled}: {utilization(device, size, dtype, made[-1].ours)}", file=sys.stderr)
    return made


def utilization(device: str, name: str, dtype: str, rate: float) -> str:
    """MFU of so many tokens a second, in words."""
    from mlxgpt.common.plan import chips
    from mlxgpt.common.recipes import build
    from torch_ref import device as devices

    card = devices.describe(devices.use(device))["device"]
    chip = chips.chip_of(card)
    if chip is None:
        return f"MFU unknown: the peak of {card} is not in the table of chips"
    model = {key: value for key, value in SIZES[name].items() if key not in ("batch", "steps")}
    share = rate * chips.training_flops(build({"model": model}).model) / chip.flops(dtype)
    return (
        f"{rate:,.0f} tok/s, MFU {100 * share:.1f} % of {chip.name}'s {chip.flops(dtype) / 1e12:g} TFLOP/s in {dtype}"
    )


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=SIZES, action="append", help="default: tiny and baby; with --device gpt2-124m"
    )
    parser.add_argument("--device", help="torch alone, on cuda, cuda:N, mps or cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="with --device")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--no-compiled", action="store_true", help="leave out torch.compile, which takes a minute to start"
    )
    parser.add_argument("--no-installed", action="store_true", help="leave out MLX with its wheel's own BLAS")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for size in args.size or (["gpt2-124m"] if args.device else ["tiny", "baby"]):
        if args.device:
            rows += measure_on(args.device, size, args.rounds, args.dtype, not args.no_compiled)
            continue
        rows += measure(size, args.rounds, not args.no_compiled, not args.no_installed)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
