"""Adapters: logits and every trainable gradient alike in both frameworks, in PEFT and in the fused matrix."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rounding
import torch
from adapting import PACKAGES, engine, moved, packed, peft_curve, peft_probe, probe, recipe, starting, train
from compare import agree, worst, worst_gradient

import torch_ref.adapters
import torch_ref.noise
from benchmarks.head import mlx_peak, torch_peak
from mlxgpt import noise
from mlxgpt.common.config import OptimConfig, Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.adapter import Adapter, add_up
from mlxgpt.common.model import adapters
from mlxgpt.common.model import params as parameters
from mlxgpt.common.train import guards

# isort: split
import mlx.core as mx
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


# A gradient's gate: LEAST, or TIMES the cost. Measured with MKL and OpenBLAS over all cases (2026-11-29): up to
# 3.3e-5 (MLX, rslora-qwen3) and 5.6 times the cost above 1.2e-5. The mutations below give 1e-3 and more.
LEAST, TIMES = 2e-5, 6.0


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa", "qwen3", "gpt_neox", "phi3", "gemma2"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_frameworks_agree(case: str, choice: str) -> None:
    config = recipe(case, **CHOICES[choice])
    params = moved(config)
    exact = probe("torch_ref", config, params, wide=True)
    costs = rounding.costs(case, rounding.rounded(probe, "torch_ref", config, params, wide=True), exact)
    for package in PACKAGES:
        found = probe(package, config, params)
        agree(f"{package}: logits", found.logits, exact.logits, rounding.gate(costs[0]))
        gate = rounding.gate(costs[1], LEAST, TIMES)
        assert worst_gradient(f"{package}: gradient", found.gradients, exact.gradients) <= gate


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
    assert config.adapter is not None
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
    """Rung 4: MLX, torch and a loop by hand on PEFT, at a rate where rounding does not grow (see ladder.py)."""
    ours, theirs = (train(package, config, params, steps, segments=False)[1] for package in PACKAGES)
    by_hand = peft_curve(config, params, steps, place)
    assert ours[-2] < ours[0] - 1e-3, "it learns: batches come again"
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


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("gpt2", {"targets": ("wte", "attn.c_attn")}),
    "tied, pissa": ("gpt2", {"targets": ("wte",), "init": "pissa"}),
    "untied": ("llama-untied", {"targets": ("lm_head", "q_proj"), "dropout": 0.3}),
    "untied, pissa": ("llama-untied", {"targets": ("lm_head",), "init": "pissa"}),
    "bias alone": ("phi", {"targets": ("q_proj",), "bias": "all"}),
    "bias and update": ("phi", {"targets": ("lm_head",), "bias": "adapted"}),
    "whole": ("gpt2", {"targets": ("attn.c_attn",), "train": ("wte",)}),
    "quantized": ("phi", {"targets": ("lm_head",), "bits": 4, "group_size": 32, "dequantize": "never", "bias": "all"}),
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_in_chunks_is_the_whole_head(package: str, head: str) -> None:
    case, adapter = HEADS[head]
    chunked, plain = (recipe(case, {"loss_chunk": chunk, "label_smoothing": 0.1}, **adapter) for chunk in (32, 0))
    params = moved(chunked)
    found, expected = (probe(package, config, params) for config in (chunked, plain))
    assert worst_gradient("gradient", found.gradients, expected.gradients) <= 1e-5


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("loop", [{"micro_batch_size": 1}, {"checkpoint_activations": True}])
def test_micro_batches_and_recomputation_change_the_curve_by_rounding_only(package: str, loop: dict[str, Any]) -> None:
    config = recipe("llama-gqa", {"compile": "off"}, 5.0, dropout=0.3)
    params = starting(config)
    _, expected = train(package, config, params, 4)
    other = recipe("llama-gqa", {"compile": "off"} | loop, 5.0, dropout=0.3)
    agree("loss a step", train(package, other, params, 4)[1], expected, 1e-6)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_stopped_run_goes_on_bit_equal(package: str) -> None:
    config = recipe("llama-gqa", {"compile": "off"}, 5.0, method="dora", dropout=0.3, b_lr=4.0)
    params = starting(config)
    whole, losses = train(package, config, params, 6)
    half, _ = train(package, config, params, 3)
    again = engine(package, config, params)
    again.load_state(half.snapshot())
    for step in (4, 5, 6):
        stats = again.train_step(step, packed(config, step % 2).split(0), config.optim.lr)
        assert stats.loss_sum / stats.weight == losses[step - 1]
    for key in ("params", "m", "v"):
        ours, theirs = again.snapshot()[key], whole.snapshot()[key]
        assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize("package", PACKAGES)
def test_b_learns_at_its_own_rate(package: str) -> None:
    """Adam's first update is the rate, whatever the gradient."""
    config = recipe("gpt2", {"compile": "off"}, b_lr=16.0)
    params = moved(config)
    after = train(package, config, params, 1)[0].snapshot()["params"]
    for name, moves in after.items():
        keep = 1 - config.optim.lr * config.optim.weight_decay * (16 if name.endswith("lora_b") else 1)
        change = np.median(np.abs(moves - keep * params[name]))
        assert abs(change / config.optim.lr / (16 if name.endswith("lora_b") else 1) - 1) < 0.01, name


def test_noise_on_embeddings_is_neftunes() -> None:
    """Uniform in alpha / sqrt(L C), L of the segment, the same in both frameworks, and none where nothing trains."""
    segments = np.array([[0] * 5 + [1] * 27, [0] * 32], np.int32)
    ours = noise.neftune(mx.zeros((2, 32, 48)), 5.0, mx.array(7, mx.uint32), mx.array(3, mx.uint32), mx.array(segments))
    key, row = (torch.tensor(value, dtype=torch.int32) for value in (7, 3))
    theirs = torch_ref.noise.neftune(torch.zeros((2, 32, 48)), 5.0, key, row, torch.from_numpy(segments))
    agree("noise", np.array(ours), theirs.numpy(), 1e-7)
    for part, length in ((theirs[0, :5], 5), (theirs[0, 5:], 27), (theirs[1], 32)):
        bound = 5.0 / (length * 48) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound
        assert abs(part.std() / bound - 3**-0.5) < 0.05
    config, quiet = recipe("llama-gqa", neftune=5.0), recipe("llama-gqa")
    params = moved(config)
    for package in PACKAGES:
        loud, still = (probe(package, each, params) for each in (config, quiet))
        assert worst("logits", loud.logits, still.logits) == 0
        assert worst_gradient("gradient", loud.gradients, still.gradients) > 1e-3


@pytest.mark.parametrize("package", PACKAGES)
def test_several_adapters_add_up(package: str) -> None:
    config, other = recipe("gpt2", targets=("all-linear", "wte")), recipe("gpt2", rank=2, rslora=True, init="pissa")
    fused = starting(Recipe(model=config.model, adapter=other.adapter))
    given, base = [], {name: fused[name].copy() for name in parameters.table(config.model)}
    for each, weight in ((config, 1.0), (other, 0.5)):
        assert each.adapter is not None
        params, targets = moved(each), adapters.targets(each.model, each.adapter)
        own = {name: params[name] for name in adapters.shapes(each) if name not in base}
        given.append((Adapter("lora", targets, own), weight))
        for path, target in targets.items():
            base[f"{path}.weight"] += (weight * adapters.delta(target, own, path)).astype(np.float32)
    plain = Recipe(model=config.model, train=config.train)
    model = engine(package, plain, {name: fused[name] for name in base}).model
    both = add_up(config.model, given)
    assert not both.whole
    importlib.import_module(f"{package}.adapters").adapt(model, both.targets, both.params)
    tokens = packed(config).tokens
    found = (
        np.array(model(mx.array(tokens))) if package == "mlxgpt" else model(torch.from_numpy(tokens)).detach().numpy()
    )
    agree("logits", found, probe(package, plain, base, packed(config, segments=False)).logits, 1e-5)


def test_what_cannot_be_added_up_is_refused() -> None:
    config = recipe("gpt2", method="dora", train=("ln_f",))
    assert config.adapter is not None
    params, targets = starting(config), adapters.targets(config.model, config.adapter)
    own = {name: params[name] for name in adapters.trainable(config)}
    updates = {name: each for name, each in own.items() if not name.startswith("ln_f")}
    with pytest.raises(UserError, match="ln_f.weight is trained whole"):
        adapters.add_up([(targets, own, 0.5)])
    with pytest.raises(UserError, match="has a dora update: expected it alone and without a weight"):
        adapters.add_up([(targets, updates, 0.5)])
    with pytest.raises(UserError, match="optim.name = muon: expected adamw with adapter.method = dora"):
        adapters.trainable(dataclasses.replace(config, optim=OptimConfig(name="muon")))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_memory_is_taken_by_gradients_of_what_is_frozen(package: str) -> None:
    config = recipe("llama", {"compile": "off"})
    model = dataclasses.replace(config.model, n_embd=256, n_hidden=1024, head_dim=64)
    config = dataclasses.replace(config, model=model)
    trained, batch = engine(package, config, starting(config)), packed(config, rows=1)
    base = 4 * sum(int(np.prod(param.shape)) for param in parameters.table(model).values())

    def step() -> int:
        trained.train_step(1, [batch], 1e-3)
        return 0

    step()
    peak = (mlx_peak if package == "mlxgpt" else torch_peak)(step)
    assert peak < base / 2, f"{peak:,} bytes beside the model's {base:,}"


@pytest.mark.parametrize("choice", ["lora", "dora", "pissa"])
def test_the_first_updates_move_everything_that_trains(choice: str) -> None:
    config = recipe("gpt2", {"compile": "off"}, targets=("all-linear", "wte"), **CHOICES[choice])
    for package in PACKAGES:
        trained = engine(package, config, starting(config))
        watch = guards.FirstUpdates(trained, adapters.trainable(config))
        for step in (1, 2, 3):
            watch.check(trained.train_step(step, [packed(config, step)], 1e-3), 1e-3)


def unscaled(patch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.adapters.LowRankUpdate
    patch.setattr(torch_ref.adapters, "LowRankUpdate", lambda scale, *rest: plain(1.0, *rest))


def alpha_over_root(patch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.adapters.LowRankUpdate
    patch.setattr(torch_ref.adapters, "LowRankUpdate", lambda scale, *rest: plain(scale * 2, *rest))


def norm_not_detached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "detach", lambda self: self)


def other_layer_order(patch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.adapters.adapt

    def adapt(model: Any, targets: Any, params: Any) -> None:
        turn = {"h.0.": "h.1.", "h.1.": "h.0."}
        plain(model, targets, {turn.get(n[:4], n[:4]) + n[4:]: each for n, each in params.items()})

    patch.setattr(torch_ref.adapters, "adapt", adapt)


def dropout_that_does_not_scale(patch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.noise.dropout
    patch.setattr(torch_ref.noise, "dropout", lambda x, rate, *rest: plain(x, rate, *rest) * (1 - rate))


def dropout_of_another_site(patch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.adapters.LowRankUpdate
    patch.setattr(torch_ref.adapters, "LowRankUpdate", lambda scale, site, *rest: plain(scale, max(site - 1, 0), *rest))


def start_left_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch_ref.adapters, "KINDS", ("lora_a", "lora_b", "magnitude"), raising=False)
    patch.setattr(adapters, "KINDS", ("lora_a", "lora_b", "magnitude"))


MUTATIONS = {
    "unscaled": (unscaled, "lora"),
    "scale of another rank": (alpha_over_root, "lora"),
    "norm not detached": (norm_not_detached, "dora"),
    "wrong layer order": (other_layer_order, "lora"),
    "dropout without scaling": (dropout_that_does_not_scale, "dropout"),
    "dropout of another site": (dropout_of_another_site, "dropout"),
    "PiSSA's start not taken off": (start_left_in, "pissa"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_adapter_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison of logits and gradients that test_the_frameworks_agree makes."""
    mutate, choice = MUTATIONS[mutation]
    config = recipe("llama-gqa", **CHOICES[choice])
    params = moved(config)
    ours = probe("mlxgpt", config, params)
    mutate(monkeypatch)
    theirs = probe("torch_ref", config, params)
    monkeypatch.undo()
    assert worst_gradient("gradient", ours.gradients, theirs.gradients) > 1e-3
