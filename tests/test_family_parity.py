"""Rungs 2, 3 and 6: logits and gradients of every family in both frameworks against transformers; caches; mlx-lm.

The folder is what is compared: transformers reads what we wrote, and both frameworks read what transformers saved.
"""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from compare import agree, gradients, worst
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from models import CASES, weights

import mlxgpt.load
import mlxgpt.model
import torch_ref.load
import torch_ref.model
from mlxgpt.common import families, folder, params, rng
from mlxgpt.common.config import ModelConfig

LENGTH = 64
LONG = {name: dataclasses.replace(config, block_size=LENGTH + 8) for name, config in CASES.items()}
TOKENS = rng.integers(5, "tokens", 0, count=2 * LENGTH, high=80).astype(np.int32).reshape(2, LENGTH)


def hf_load(place: Path) -> Any:
    """transformers' model; no key of the files missing, unexpected or of another shape."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(place, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token."""
    targets = torch.tensor(TOKENS[:, 1:], dtype=torch.long)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())


def ours(config: ModelConfig, gradient: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients of transformers' parameters by our names and in our layout, of those that are ours."""
    theirs = {families.strip(config, name): value.grad for name, value in gradient.named_parameters()}
    made = {}
    for name in params.table(config):
        foreign, transposed = families.to_foreign(config, name)
        made[name] = (theirs[foreign].T if transposed else theirs[foreign]).numpy()
    return made


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_transformers_own(name: str, tmp_path: Path) -> None:
    config = LONG[name]
    for scale in (1.0, 8.0):
        place = tmp_path / str(scale)
        folder.write_model(place, config, weights(config, scale=scale))
        reference = hf_load(place)
        logits = reference(torch.tensor(TOKENS)).logits
        loss(logits).backward()
        expected, slopes = logits.detach().numpy(), ours(config, reference)

        model, _ = torch_ref.load.load(place, device="cpu")
        found = model(torch.tensor(TOKENS))
        loss(found).backward()
        found_slopes = {key: value.grad.numpy() for key, value in model.named_parameters()}
        exact = torch_ref.model.Model(config, torch.float64).double()
        exact.load_state_dict(model.state_dict())
        exact_logits = exact(torch.tensor(TOKENS))
        loss(exact_logits).backward()
        floor = worst("floor", found.detach().numpy(), exact_logits.detach().numpy())
        gate = max(1e-5, 4 * floor)
        agree(f"{name} x{scale:g} torch", found.detach().numpy(), expected, gate)

        model_mlx, _ = mlxgpt.load.load(place, device="cpu")
        agree(f"{name} x{scale:g} mlx", np.array(model_mlx(mx.array(TOKENS))), expected, gate)
        step = nn.value_and_grad(model_mlx, lambda m: nn.losses.cross_entropy(
            m(mx.array(TOKENS))[:, :-1], mx.array(TOKENS[:, 1:]), reduction="mean"))
        mlx_slopes = {key: np.array(value) for key, value in tree_flatten(step(model_mlx)[1])}
        exact_slopes = {key: value.grad.numpy() for key, value in exact.named_parameters()}
        if scale == 1.0:
            gradients(found_slopes, slopes, 1e-5)
            gradients(mlx_slopes, slopes, 1e-5)
