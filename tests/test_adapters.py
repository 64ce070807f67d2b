"""Adapters: logits and every trainable gradient alike in both frameworks, in PEFT and in the fused matrix."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import PACKAGES, moved, packed, peft_curve, peft_probe, probe, recipe, starting, train
from compare import agree, worst_gradient

from mlxgpt.common import adapters
from mlxgpt.common.config import Recipe

# isort: split
from mlx.utils import tree_flatten

# PEFT 0.21 asks transformers 5.23 in a way that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

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


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2", "llama-untied"])
@pytest.mark.parametrize("choice", ["lora", "rslora", "dora"])
def test_peft_computes_the_same(case: str, choice: str, tmp_path: Path) -> None:
    targets = {"llama-untied": ("all-linear", "lm_head")}.get(case, ("all-linear",))
    config = recipe(case, targets=targets, **CHOICES[choice])
    params, batch = moved(config), packed(config, segments=False)
    theirs = peft_probe(config, params, batch, tmp_path / "m")
    for package in PACKAGES:
        ours = probe(package, config, params, batch)
        agree("logits", ours.logits, theirs.logits, 1e-5)
        assert worst_gradient("gradient", ours.gradients, theirs.gradients) <= 1e-5


def test_peft_computes_the_same_with_an_adapted_embedding(tmp_path: Path) -> None:
    config = recipe("llama-untied", targets=("all-linear", "wte"))
    params, batch = moved(config), packed(config, segments=False)
    theirs = peft_probe(config, params, batch, tmp_path / "m")
    for package in PACKAGES:
        ours = probe(package, config, params, batch)
        agree("logits", ours.logits, theirs.logits, 1e-5)
        assert worst_gradient("gradient", ours.gradients, theirs.gradients) <= 1e-5


def curves(config: Recipe, params: dict[str, Any], steps: int, place: Path) -> None:
    """Rung 4: MLX, torch and a loop by hand on PEFT."""
    ours, theirs = (train(package, config, params, steps, segments=False)[1] for package in PACKAGES)
    by_hand = peft_curve(config, params, steps, place)
    assert ours[-2] < ours[0] - 2e-3, "it learns: batches come again"
    for name, curve in (("torch", theirs), ("PEFT", by_hand)):
        agree(f"{name}, step 1", ours[:1], curve[:1], 1e-6, 1.0)
        agree(f"{name}, {steps} steps", ours, curve, 1e-4, 1.0)


@pytest.mark.parametrize("choice", ["lora", "dora"])
def test_the_curves_are_one(choice: str, tmp_path: Path) -> None:
    config = recipe("llama-gqa", **CHOICES[choice])
    curves(config, starting(config), 20, tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("choice", ["lora", "rslora", "dora"])
def test_the_curves_are_one_over_100_steps(case: str, choice: str, tmp_path: Path) -> None:
    config = recipe(case, **CHOICES[choice])
    curves(config, starting(config), 100, tmp_path / "m")
