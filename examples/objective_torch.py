"""An objective of one's own through the Trainer, in PyTorch; objective_mlx.py is its twin.

    python examples/objective_torch.py        # Ctrl-C stops and saves; the same command goes on

Cross-entropy less 0.1 times the entropy of the prediction (Pereyra et al. 2017, confidence penalty), on batches that
the program makes: the loop, run folder, metrics and exact resume are those of mlxgpt train.
"""

from pydoc_data.topics import topics

import numpy as np
import torch

from torch_ref.api import Trainer, cross_entropy
from torch_ref.losses import Arrays, Model

text = "".join(topics[name] for name in ("assignment", "class", "function"))
letters = sorted(set(text))
ids = np.array([letters.index(letter) for letter in text])
split = len(ids) * 9 // 10
recipe = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": len(letters)},
    "optim": {"lr": 3e-3, "warmup": 5},
    "train": {"steps": 40, "batch_size": 8, "eval_every": 20, "dropout": 0.1},
    "sample": {"max_tokens": 0},
}


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets (8, 32): a function of the step alone, so that a resumed run goes on exactly."""
    starts = np.random.default_rng((1337, step)).integers(split - 33, size=8)
    rows = np.stack([ids[start : start + 33] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def validation() -> list[tuple[np.ndarray, np.ndarray]]:
    """The last tenth of the text, in rows."""
    rows = np.stack([ids[start : start + 33] for start in range(split, len(ids) - 33, 32)])
    return [(rows[:, :-1], rows[:, 1:])]


def objective(model: Model, batch: Arrays) -> torch.Tensor:
    """Losses (B, T); the trainer takes their mean."""
    logits = model(batch.tokens)
    log_p = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    entropy = -(torch.exp(log_p) * log_p).sum(dim=-1)
    return cross_entropy(logits, batch.targets) - 0.1 * entropy


if __name__ == "__main__":
    trainer = Trainer(recipe, "runs/objective_torch", source=batch, validation=validation, objective=objective)
    trainer.train()
    for line in trainer.metrics("val"):
        print(f"step {line['step']}: validation {line['loss']:.4f}")
