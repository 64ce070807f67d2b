"""Somebody who writes PyTorch: a model and a loop from Python, a change of the MLP, a run that moves to MLX.

python tests/walks/researcher.py
"""

import contextlib
import importlib
import io
import sys
from pathlib import Path

from walk import ROOT, TINY, books, check, command, lines, losses, main

import mlxgpt.api

# isort: split
import mlx.core as mx
import numpy as np
import torch

import torch_ref.api
from torch_ref.losses import Arrays, Model

CONFIG = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 20}


def walk() -> None:
    """From ``new`` to a curve that both frameworks share."""
    same_model()
    own_objective()
    print("> examples/parity.py: another MLP, in both frameworks")
    sys.path.append(str(ROOT / "examples"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = importlib.import_module("parity").main()
    check(code == 0 and "they agree" in out.getvalue(), "another MLP agrees", out.getvalue())
    from_torch_to_mlx()


def same_model() -> None:
    """``new`` and what it refuses, in both."""
    print("> torch_ref.api.new, mlxgpt.api.new")
    tokens = np.random.default_rng(0).integers(20, size=(2, 16))
    in_torch, in_mlx = torch_ref.api.new(CONFIG, seed=1, device="cpu"), mlxgpt.api.new(CONFIG, seed=1, device="cpu")
    found, other = in_torch.eval()(tokens).detach().numpy(), np.array(in_mlx.eval()(mx.array(tokens)))
    check(float(np.abs(found).max()) > 0, "a new model is not all zeros")
    check(float(np.abs(found - other).max()) < 1e-5, "the two give the same logits", np.abs(found - other).max())
    check("n_embd" in repr(in_torch) or "32" in repr(in_torch), "print(model) shows sizes", repr(in_torch))
    try:
        in_torch(np.array([[20]]))
    except mlxgpt.api.UserError as error:
        check("20" in str(error), "an id outside the vocabulary is named", error)
    else:
        check(False, "an id outside the vocabulary is an error")


def own_objective() -> None:
    """The Trainer with batches and a loss of one's own, stopped and continued; ``load`` and ``generate`` read it."""
    print("> torch_ref.api.Trainer with an objective")

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        start = np.random.default_rng(step).integers(20, size=(4, 1))
        rows = (start + np.arange(17)) % 20
        return rows[:, :-1], rows[:, 1:]

    def objective(model: Model, batch: Arrays) -> torch.Tensor:
        losses = torch_ref.api.cross_entropy(model(batch.tokens), batch.targets)
        return losses * (1 - torch.exp(-losses))  # less of what is known (Lin et al. 2017, focal loss)

    recipe = {"model": CONFIG, "optim": {"lr": 1e-2, "warmup": 2}, "train": {"steps": 60, "batch_size": 4},
              "sample": {"max_tokens": 0}}  # fmt: skip
    trainers = [
        torch_ref.api.Trainer(recipe, f"runs/{name}", source=batch, objective=objective, device="cpu", quiet=True)
        for name in ("own", "whole")
    ]
    check(not trainers[0].train(stop_after=20), "stop_after stops")
    check(trainers[0].train() and trainers[1].train(), "train() again goes on to the end", trainers)
    check(losses("runs/own") == losses("runs/whole"), "a stopped run has the losses of a whole one")
    for api in (torch_ref.api, mlxgpt.api):
        model, tokenizer = api.load("runs/own", device="cpu")
        said = api.generate(model, tokenizer, [3, 4, 5, 6], max_tokens=5, temperature=0).tokens
        check(list(said) == [7, 8, 9, 10, 11], f"{api.__name__}.load: it has learned to count", said)


def from_torch_to_mlx() -> None:
    """A run begun in PyTorch and resumed in MLX has the curve of one in MLX."""
    books("books", 4)
    train = ("train", "--data", "books/", *TINY, "--steps", "16", "--set", "optim.warmup=2",
             "--set", "train.eval_every=8")  # fmt: skip
    command(*train, "--out", "runs/moved", "--stop-after", "8", backend="torch", says=("torch",))
    command("train", "--resume", "runs/moved", "--backend", "mlx", says=("resumes from step 8", "written by torch"))
    command(*train, "--out", "runs/mlx", "--backend", "mlx")
    apart = max(abs(a - b) for a, b in zip(losses("runs/moved"), losses("runs/mlx"), strict=True))
    check(apart < 1e-4, "the moved run has the curve of one in MLX", apart)
    one, other = (lines(run, "val")[-1]["loss"] for run in ("runs/moved", "runs/mlx"))
    check(abs(one - other) < 1e-4, "and its validation loss", (one, other))
    check(Path("runs/moved/environment.json").is_file(), "the run says where it was computed")


if __name__ == "__main__":
    sys.exit(main(walk))
