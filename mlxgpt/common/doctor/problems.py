"""What doctor computes on every device: small models, their weights and batches, from seeds alone."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import Recipe
from mlxgpt.common.model import adapters, params
from mlxgpt.common.recipes import build

# on the matrices, of width 64: attention that is not flat, so that a wrong mask or rotation shows; logits of about 10
SCALE = 6.0
STEPS = 20
RATE = 1e-3


@dataclass(frozen=True)
class Problem:
    """A model and a batch of ``rows`` texts of the model's context; ``steps`` of training, 0: only what leads there."""

    name: str
    recipe: Recipe
    rows: int
    steps: int

    def changed(self, adapter: dict[str, Any] | None = None, **train: Any) -> Recipe:
        """The recipe with other settings of ``train``; with an adapter, one that fine-tunes."""
        made = dataclasses.replace(self.recipe, train=dataclasses.replace(self.recipe.train, **train))
        if adapter is None:
            return made
        tuned = build({"tune": {"block_size": made.model.block_size}, "adapter": {"rank": 4, **adapter}})
        return dataclasses.replace(made, tune=tuned.tune, adapter=tuned.adapter)


def _problem(name: str, rows: int, steps: int, model: dict[str, Any], **train: Any) -> Problem:
    train = {"batch_size": rows, "steps": steps or 1, **train}
    return Problem(name, build({"model": model, "train": train}), rows, steps)


def problems(quick: bool, long: bool = True) -> list[Problem]:
    """Two families at the smallest size and, unless ``quick``, a wide model and, if ``long``, a long context.

    The small vocabulary is above train.loss_chunk, so that head and loss go in chunks; 61 and 67 are lengths that no
    kernel's tile divides, 256 is one that all do. The long one has more attention scores than a GPU makes at once.
    """
    small = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 1100}
    wide = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 256, "block_size": 256, "vocab_size": 2048}
    made = [
        _problem("gpt2", 3, STEPS, {"family": "gpt2", "block_size": 61, **small}, dropout=0.1),
        _problem("llama", 2, STEPS, {"family": "llama", "block_size": 67, "n_kv_head": 2, **small}),
    ]
    if quick:
        return made
    made.append(_problem("llama, wide", 1, 3, {"family": "llama", **wide}))
    if long:
        size = {"n_layer": 1, "n_head": 8, "n_kv_head": 4, "n_embd": 128, "block_size": 2176, "vocab_size": 1100}
        made.append(_problem("llama, long", 1, 0, {"family": "llama", **size}))
    return made


def weights(recipe: Recipe, scale: float = SCALE) -> dict[str, np.ndarray]:
    """Weights in which no tensor is constant, the adapter's included, and larger matrices than at the start."""
    model, seed = recipe.model, recipe.train.seed
    scale = max(1.0, scale * (64 / model.n_embd) ** 0.5)
    made = params.init_params(model, seed)
    for name, param in params.table(model).items():
        noise = rng.normal(seed, "doctor", name, shape=param.shape, std=0.1)
        made[name] = made[name] * np.float32(scale) if param.std else made[name] + noise
    if recipe.adapter is None:
        return made
    made |= adapters.init(recipe, made)
    for name, shape in adapters.shapes(recipe).items():
        if name.endswith((".lora_a", ".lora_b")):
            made[name] = made[name] + rng.normal(seed, "doctor", name, shape=shape, std=0.05)
    return made


def batch(recipe: Recipe, rows: int, step: int) -> Batch:
    """Skewed random tokens and what follows each; a function of ``step``."""
    size, vocabulary = recipe.model.block_size, recipe.model.vocab_size
    draw = rng.integers(0, "doctor", step % 4, count=rows * (size + 1), high=vocabulary * vocabulary)
    tokens = np.sqrt(draw).astype(np.int32).reshape(rows, size + 1)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((rows, size), np.float32))
