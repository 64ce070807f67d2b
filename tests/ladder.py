"""The parity ladder's measurements, with their gates: tests assert them, benchmarks/parity.py prints them.

A figure is a largest difference relative to the reference's largest value (compare.py). Logits and gradients of each
framework are held against torch_ref in float64; the gate follows what float32 costs that model (rounding.py).
"""

import dataclasses
import functools
import importlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import rounding
import torch
import transformers
from compare import worst, worst_gradient
from models import weights

import mlxgpt.losses
import mlxgpt.model
import mlxgpt.probe
import torch_ref.losses
import torch_ref.model
import torch_ref.probe
from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common import rng
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import ModelConfig, Recipe, TrainConfig
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import families, params
from mlxgpt.common.recipes import build
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.train import schedule

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

PACKAGES = ("mlxgpt", "torch_ref")
CHUNK = 16  # vocabulary entries at a time, a few chunks of every case
LARGEST_COST = 1e-5  # a cost above this would make the gates mean nothing


@dataclass(frozen=True)
class Figure:
    """One measurement. NaN or Inf, in it or in the gate, agrees with nothing."""

    rung: int
    what: str
    value: float
    gate: float

    @property
    def agrees(self) -> bool:
        """Whether the value is at most the gate."""
        return bool(np.isfinite(self.gate)) and self.value <= self.gate

    def __str__(self) -> str:
        return f"rung {self.rung}  {self.what}: {self.value:.2e} (gate {self.gate:.1e})"


@dataclass(frozen=True)
class Probe:
    """What one framework computes for a batch: logits (B, T, V), the mean loss, and its gradients by name.

    ``activations``: the residual stream by layer, as ``verify`` compares them; transformers has none.
    """

    logits: np.ndarray
    gradients: dict[str, np.ndarray]
    loss: float = float("nan")
    activations: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def batch(config: ModelConfig, rows: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and targets (B, T), T = block_size."""
    size = config.block_size + 1
    drawn = rng.integers(0, "ladder", count=rows * size, high=config.vocab_size).reshape(rows, size).astype(np.int32)
    return drawn[:, :-1], drawn[:, 1:]


def layers(found: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The residual stream by layer, of what a probe yields."""
    return {name: value for name, value in found if name.startswith("hidden.")}


def mlx_probe(config: ModelConfig, made: Mapping[str, np.ndarray], loss_chunk: int = 0) -> Probe:
    """mlxgpt's model and objective; ``loss_chunk`` > 0 computes the loss through the chunked head."""
    tokens, targets = (mx.array(array) for array in batch(config))
    model = mlxgpt.model.Model(config)
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in made.items()]))
    arrays = mlxgpt.losses.Arrays(tokens, targets, mx.ones(tokens.shape), None, None)
    train = TrainConfig(loss_chunk=loss_chunk)
    found: Any = nn.value_and_grad(model, lambda: mlxgpt.losses.lm(model, arrays, train).mean())()
    return Probe(
        np.array(model(tokens)),
        {name: np.array(value) for name, value in tree_flatten(found[1])},
        float(np.array(found[0])),
        layers(mlxgpt.probe.activations(model, tokens)),
    )


def host(value: torch.Tensor | None) -> np.ndarray:
    """A tensor that must be there, as numpy."""
    assert value is not None
    return value.detach().numpy()


def torch_model(config: ModelConfig, made: Mapping[str, np.ndarray], dtype: torch.dtype) -> torch_ref.model.Model:
    """torch_ref's model with these weights, in ``dtype`` throughout."""
    model = torch_ref.model.Model(config, dtype).to(dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(made[name]))
    return model


def torch_probe(
    config: ModelConfig, made: Mapping[str, np.ndarray], dtype: torch.dtype = torch.float32, loss_chunk: int = 0
) -> Probe:
    """torch_ref's model and objective; ``loss_chunk`` > 0 computes the loss through the chunked head."""
    tokens, targets = (torch.from_numpy(array) for array in batch(config))
    model = torch_model(config, made, dtype)
    arrays = torch_ref.losses.Arrays(tokens, targets, torch.ones(tokens.shape), None, None)
    loss = torch_ref.losses.lm(model, arrays, TrainConfig(loss_chunk=loss_chunk)).mean()
    loss.backward()
    gradients = {name: host(value.grad) for name, value in model.named_parameters()}
    activations = layers(torch_ref.probe.activations(model, tokens))
    return Probe(host(model(tokens)), gradients, float(loss.detach()), activations)


def hf_probe(config: ModelConfig, made: Mapping[str, np.ndarray], place: Path) -> Probe:
    """transformers' model, read from a folder of ours, and its own loss."""
    model_folder.write_model(place, config, made)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(place, output_loading_info=True)
    assert not any(info.values()), info
    tokens, targets = (torch.from_numpy(array).long() for array in batch(config))
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    ours, gradients = families.from_foreign(config), {}
    for foreign, value in model.named_parameters():
        name, transposed = ours[str(families.strip(config, foreign))]
        if name in params.table(config):
            gradients[name] = host(value.grad).T if transposed else host(value.grad)
    return Probe(host(logits), gradients)


def same_tensors(config: ModelConfig, place: Path) -> int:
    """Demands that transformers holds the very bits of the file, in every tensor: how many."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    state = load(place).state_dict()
    stored = {
        str(families.strip(config, name)): value
        for name, value in model_folder.read_tensors(place / "model.safetensors").items()
    }
    plain = {str(families.strip(config, name)): value for name, value in state.items()}
    for name, value in stored.items():
        assert np.array_equal(plain[name].numpy(), value), name
    return len(stored)


def compare(case: str, config: ModelConfig, scale: float, place: Path | None) -> list[Figure]:
    """Rungs 2 and 3 of one model with its matrices times ``scale``: each framework against torch_ref in float64.

    MLX and torch also compute the loss in chunks of CHUNK vocabulary entries. No ``place``: without transformers.
    """
    made = weights(config, scale=scale)
    exact = torch_probe(config, made, torch.float64)
    case = f"{case} x{scale:g}"
    best = rounding.rounded(torch_probe, config, made, torch.float64)
    costs = rounding.costs(case, best, exact)
    gates = [rounding.gate(cost) for cost in costs]
    figures = [
        Figure(2, f"{case}: cost of float32, logits", costs[0], LARGEST_COST),
        Figure(3, f"{case}: cost of float32, gradients", costs[1], LARGEST_COST),
    ]
    assert config.vocab_size > CHUNK
    probes = {
        "MLX": mlx_probe(config, made),
        "torch": torch_probe(config, made),
        "MLX in chunks": mlx_probe(config, made, loss_chunk=CHUNK),
        "torch in chunks": torch_probe(config, made, loss_chunk=CHUNK),
    }
    if place:
        probes["transformers"] = hf_probe(config, made, place)
    by_layer = {
        name: rounding.gate(worst(f"{case}: cost, {name}", best.activations[name], value))
        for name, value in exact.activations.items()
    }
    for name, found in probes.items():
        what = f"{case}: {name} - float64"
        for layer, value in found.activations.items():
            gap = worst(f"{what}, {layer}", value, exact.activations[layer])
            figures.append(Figure(2, f"{what}, {layer}", gap, by_layer[layer]))
        if name != "transformers":
            gap = worst(f"{what}, loss", np.array(found.loss), np.array(exact.loss))
            figures.append(Figure(3, f"{what}, loss", gap, 1e-5))
        figures.append(Figure(2, f"{what}, logits", worst(what, found.logits, exact.logits), gates[0]))
        figures.append(
            Figure(3, f"{what}, gradients", worst_gradient(what, found.gradients, exact.gradients), gates[1])
        )
    return figures


# rungs 4, 5 and 9: training


def training_recipe(family: str, **train: Any) -> Recipe:
    """200 steps of a model of 2 layers and width 48 on bytes of the language reference; keyword arguments are train's.

    The rate is one at which training is stable: where it is not (2e-3 with llama and qwen3), rounding grows to 1e-2
    within 200 steps in each framework alone, and no two float32 programs agree.
    """
    sections = {
        "model": {"family": family, "n_layer": 2, "n_head": 4, "n_embd": 48, "block_size": 48, "vocab_size": 128},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup": 20},
        "train": {"steps": 200, "batch_size": 8, **train},
    }
    return build(sections)


@functools.cache
def text() -> np.ndarray:
    """Real English that every Python carries, as 7-bit tokens."""
    return np.frombuffer("".join(topics.topics.values()).encode()[:500_000], np.uint8).astype(np.int32) & 127


def text_batch(recipe: Recipe, step: int) -> Batch:
    """Windows of the text at random places."""
    rows, size = recipe.train.batch_size, recipe.model.block_size
    starts = rng.integers(recipe.train.seed, "window", step, count=rows, high=len(text()) - size)
    windows = np.stack([text()[start : start + size + 1] for start in starts])
    return Batch(windows[:, :-1], windows[:, 1:], np.ones((rows, size), np.float32))


def trained(package: str, recipe: Recipe, exact: bool = False) -> Any:
    """An engine with the recipe's initial weights, on the CPU; ``exact`` computes in float64, in torch alone."""
    made = params.init_params(recipe.model, recipe.train.seed)
    engine = importlib.import_module(f"{package}.engine").Engine(recipe, made, "cpu")
    if exact:
        engine.model.double()
        engine.model._dtype = torch.float64
        for moments in (engine.m, engine.v):
            for name in moments:
                moments[name] = moments[name].double()
    return engine


def curve(engine: Any, first: int = 1, last: int = 0) -> np.ndarray:
    """The mean loss of each step from ``first`` to ``last`` (0: to the end)."""
    recipe, losses = engine.recipe, []
    for step in range(first, (last or recipe.train.steps) + 1):
        rate = schedule.rate(recipe.optim, step, recipe.train.steps)
        stats = engine.train_step(step, text_batch(recipe, step).split(recipe.train.micro_batch_size), rate)
        losses.append(stats.loss_sum / stats.weight)
    return np.array(losses)


def same_curve(case: str, found: np.ndarray, expected: np.ndarray) -> list[Figure]:
    """Rung 4: the loss at step 1, and over the whole curve; absolute."""
    return [
        Figure(4, f"{case}: step 1", worst(f"{case}: step 1", found[:1], expected[:1], 1.0), 1e-6),
        Figure(4, f"{case}: {len(found)} steps", worst(case, found, expected, 1.0), 1e-4),
    ]


def crossing(case: str, recipe: Recipe, place: Path) -> tuple[dict[str, np.ndarray], list[Figure]]:
    """Rung 5: each framework saves halfway, and either resumes from there; against the saver's uninterrupted curve.

    Returns:
        The uninterrupted curve of each framework, and the figures.
    """
    half, whole, figures = recipe.train.steps // 2, {}, []
    for saver in PACKAGES:
        engine = trained(saver, recipe)
        start = curve(engine, last=half)
        (place / saver).mkdir()
        state = checkpoint.RunState(
            seed=recipe.train.seed, data={}, recipe={}, framework=saver, environment={}, step=half
        )
        saved, _ = checkpoint.write(place / saver, engine.snapshot(), recipe.model, None, state, keep=0)
        checkpoint.verify(saved)
        whole[saver] = np.concatenate([start, curve(engine, first=half + 1)])
        for reader in PACKAGES:
            other = trained(reader, recipe)
            other.load_state(checkpoint.read_snapshot(saved, recipe.model))
            what = f"{case}: {saver} to {reader}"
            gap = worst(what, curve(other, first=half + 1), whole[saver][half:], 1.0)
            figures.append(Figure(5, what, gap, 0.0 if reader == saver else 2e-5))
    return whole, figures


def distance(family: str, seeds: Sequence[int]) -> list[Figure]:
    """Rung 9: RMS distance of each float32 curve from torch_ref's in float64, and the median ratio MLX / torch."""
    gaps: dict[str, list[float]] = {package: [] for package in PACKAGES}
    for seed in seeds:
        recipe = training_recipe(family, seed=seed)
        exact = curve(trained("torch_ref", recipe, exact=True))
        for package in PACKAGES:
            gaps[package].append(float(np.sqrt(np.mean((curve(trained(package, recipe)) - exact) ** 2))))
    ratios = [ours / theirs for ours, theirs in zip(gaps["mlxgpt"], gaps["torch_ref"], strict=True)]
    return [
        *(
            Figure(9, f"{family}: {package}, RMS from float64", statistics.median(gaps[package]), 1e-4)
            for package in PACKAGES
        ),
        Figure(9, f"{family}: median ratio MLX / torch of {len(seeds)} seeds", statistics.median(ratios), 8.0),
    ]
