"""Adapters: logits and every trainable gradient alike in both frameworks, in PEFT and in the fused matrix."""

from typing import Any

import numpy as np
import pytest
from adapting import PACKAGES, moved, probe, recipe, starting, train
from compare import agree, worst_gradient

from mlxgpt.common import adapters
from mlxgpt.common.config import Recipe

# isort: split
from mlx.utils import tree_flatten

# what is adapted, by a name for it
CHOICES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True, "ranks": ("attn.c_proj=2",)},
    "dora": {"method": "dora"},
    "pissa": {"init": "pissa"},
    "dora-pissa": {"method": "dora", "init": "pissa"},
    "dropout": {"dropout": 0.3},
    "dora-dropout": {"method": "dora", "dropout": 0.3},
    "pissa-dropout": {"init": "pissa", "dropout": 0.3},
}


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa", "qwen3", "gpt_neox", "phi3", "gemma2"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_frameworks_agree(case: str, choice: str) -> None:
    config = recipe(case, **CHOICES[choice])
    params = moved(config)
    ours, theirs = (probe(package, config, params) for package in PACKAGES)
    judge = probe("torch_ref", config, params, wide=True)
    agree("logits", ours.logits, theirs.logits, 1e-5)
    floor = worst_gradient("floor", theirs.gradients, judge.gradients)
    assert worst_gradient("gradient", ours.gradients, theirs.gradients) <= max(1e-5, 4 * floor)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("choice", ["lora", "rslora", "dora", "pissa", "dora-pissa"])
@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "llama-untied"])
def test_base_and_adapter_compute_as_the_fused_matrices(package: str, case: str, choice: str) -> None:
    config = recipe(case, targets=("all-linear", "wte" if case == "gpt2" else "lm_head"), **CHOICES[choice])
    if case != "gpt2":
        config = recipe(
            case, targets=("all-linear", "embed_out" if case == "gpt_neox" else "lm_head", "wte"), **CHOICES[choice]
        )
    params = moved(config)
    plain = Recipe(model=config.model, train=config.train)
    fused = {name: params[name] for name in adapters.shapes(plain)}
    for path, target in adapters.targets(config.model, config.adapter).items():
        fused[f"{path}.weight"] = adapters.fuse(params[f"{path}.weight"], target, params, path)
    agree("logits", probe(package, config, params).logits, probe(package, plain, fused).logits, 1e-5)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("choice", ["lora", "dora", "pissa"])
def test_training_leaves_the_base_as_it_was_and_moves_the_rest(package: str, choice: str) -> None:
    config = recipe("llama-gqa", train=("ln_f",), bias="all", targets=("q_proj", "mlp.c_proj"), **CHOICES[choice])
    params = starting(config)
    before = {name: array.copy() for name, array in params.items()}
    trained, _ = train(package, config, params, 3)
    after = trained.snapshot()["params"]
    assert set(after) == set(adapters.trainable(config)) == set(trained.m)
    assert all((after[name] != before[name]).any() for name in after)
    held = (
        {name: np.array(each) for name, each in tree_flatten(trained.model.parameters())}
        if package == "mlxgpt"
        else {name: each.detach().numpy() for name, each in trained.model.named_parameters()}
    )
    assert set(held) == set(before)
    for name in set(held) - set(after):
        assert held[name].tobytes() == before[name].tobytes() == params[name].tobytes(), name
