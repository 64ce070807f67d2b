"""Tiny models of both frameworks to decode with."""

from types import ModuleType
from typing import Any

import mlxgpt.generate as mlx_generate  # first: it loads a BLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
import torch

import torch_ref.generate as torch_generate
from mlxgpt.common import recipes
from mlxgpt.common.config import ModelConfig, SampleConfig
from mlxgpt.common.inference import sampling
from mlxgpt.common.model import params
from mlxgpt.model import Model as MlxModel
from torch_ref.model import Model as TorchModel

BACKENDS = ("mlx", "torch")
GENERATE: dict[str, ModuleType] = {"mlx": mlx_generate, "torch": torch_generate}
V, P = 61, 40


def make_config(family: str, vocab: int = V, **more: object) -> ModelConfig:
    heads = {} if family == "gpt2" else {"n_kv_head": 2}
    sizes = dict(n_layer=2, n_head=4, n_embd=32, block_size=P, vocab_size=vocab)
    return recipes.build({"model": {"family": family, **sizes, **heads, **more}}).model


def make_weights(sizes: ModelConfig, scale: float = 6.0) -> dict[str, np.ndarray]:
    """Scaled, so that the tokens depend on all of the model."""
    return {name: value * np.float32(scale) for name, value in params.init_params(sizes, 3).items()}


def make_model(backend: str, sizes: ModelConfig, scale: float = 6.0) -> Any:
    """The same weights for both."""
    weights = make_weights(sizes, scale)
    if backend == "mlx":
        model = MlxModel(sizes)
        model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
        return model
    model = TorchModel(sizes)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model


def logits_of(backend: str, model, tokens: list[list[int]], **more) -> np.ndarray:
    if backend == "mlx":
        return np.array(model(mx.array(tokens), **more))
    with torch.no_grad():
        return model(torch.tensor(tokens), **more).numpy()


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, count).tolist()


def oracle(
    model: TorchModel, prompt: list[int], sample: SampleConfig, bias: dict[int, float] | None = None, copy: int = 0
) -> list[int]:
    """Full forward passes, and numpy for the rest."""
    ids, seen, counts = list(prompt), np.zeros((1, V), dtype=bool), np.zeros((1, V), dtype=np.int32)
    added = sampling.biases(bias or {}, V)
    for step in range(sample.max_tokens):
        seen[0, ids] = True
        logits, keys = logits_of("torch", model, [ids])[:, -1], sampling.step_keys(sample.seed, [copy], step)
        more = sampling.added(counts, added, sample.presence_penalty, sample.frequency_penalty)
        ids += sampling.sample_tokens(logits, seen, keys, sample, more).tolist()
        counts[0, ids[-1]] += 1
    return ids[len(prompt) :]
