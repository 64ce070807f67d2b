"""Adapters on tiny models in both frameworks: what the tests of adapters, quantized bases and fine-tuning share."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from models import CASES, weights

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common import rng
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import AdapterConfig, OptimConfig, Recipe, TrainConfig, TuneConfig
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import adapters, families
from mlxgpt.common.model import params as parameters

# isort: split
import mlx.core as mx

PACKAGES = ("mlxgpt", "torch_ref")
_PEFT = {
    "lora_a": ("lora_A.default.weight", "lora_embedding_A.default"),
    "lora_b": ("lora_B.default.weight", "lora_embedding_B.default"),
    "magnitude": ("lora_magnitude_vector.default.weight",),
}


class Probe(NamedTuple):
    """What a model computes from given weights."""

    logits: np.ndarray
    gradients: dict[str, np.ndarray]


def recipe(case: str, loop: dict[str, Any] | None = None, neftune: float = 0.0, **adapter: Any) -> Recipe:
    """A recipe of fine-tuning on a case of models.CASES; ``loop`` is train's, keyword arguments adapter's."""
    loop = {"steps": 100, "batch_size": 4, "loss_chunk": 32} | (loop or {})
    adapter = {"rank": 4} | adapter
    return Recipe(
        model=CASES[case],
        optim=OptimConfig(lr=5e-4, min_lr=0.0, warmup=0, weight_decay=0.05),
        train=TrainConfig(**loop),
        tune=TuneConfig(neftune=neftune),
        adapter=AdapterConfig(**adapter),
    )


def starting(config: Recipe, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Base weights in which no tensor is constant, and the adapter's start."""
    base = weights(config.model, scale=scale)
    return base | adapters.init(config, base)


def moved(config: Recipe, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The same with every trainable tensor of the adapter off its start, as after some training."""
    made = starting(config, scale)
    for name in adapters.shapes(config):
        kind = name.rpartition(".")[2]
        if kind == "magnitude":
            noise = rng.uniform(2, "moved", name, shape=made[name].shape, bound=0.3)
            made[name] = made[name] * (1 + noise)
        elif kind in ("lora_a", "lora_b"):
            made[name] = made[name] + rng.normal(2, "moved", name, shape=made[name].shape, std=0.05)
    return made


def packed(config: Recipe, step: int = 1, rows: int = 4, segments: bool = True) -> Batch:
    """Skewed random tokens, three texts side by side in a row; the first two tokens of each are no targets."""
    size, vocabulary = config.model.block_size - 1, config.model.vocab_size
    draw = rng.integers(0, "tokens", step, count=rows * (size + 1), high=vocabulary * vocabulary)
    tokens = np.sqrt(draw).astype(np.int32).reshape(rows, size + 1)
    weight = np.ones((rows, size), np.float32)
    positions, parts = np.tile(np.arange(size, dtype=np.int32), (rows, 1)), np.zeros((rows, size), np.int32)
    cuts = np.sort(rng.integers(0, "cuts", step, count=2 * rows, high=size - 2).reshape(rows, 2) + 1, axis=1)
    for row, (first, second) in enumerate(cuts):
        for start in (0, first, second):
            parts[row, start:] += 1
            positions[row, start:] -= positions[row, start]
            weight[row, start : start + 2] = 0
    if not segments:
        return Batch(tokens[:, :-1], tokens[:, 1:], weight)
    return Batch(tokens[:, :-1], tokens[:, 1:], weight, positions, parts)


def engine(package: str, config: Recipe, params: dict[str, Any]) -> Any:
    """An engine on the CPU."""
    return importlib.import_module(f"{package}.engine").Engine(config, params, "cpu")


def exact(trained: Any) -> Any:
    """torch_ref's engine in float64."""
    trained.model.double()
    trained.model._dtype = torch.float64
    for module in trained.model.modules():
        if module.__dict__.get("adapter") and module.adapter.squares is not None:
            squares = module.adapter.squares.double()
            module.adapter = dataclasses.replace(module.adapter, squares=squares)
    return trained


def probe(
    package: str, config: Recipe, params: dict[str, Any], batch: Batch | None = None, step: int = 1, wide: bool = False
) -> Probe:
    """Logits without anything random, and the gradients of a step's summed loss, by the names of what trains."""
    trained, batch = engine(package, config, params), batch or packed(config)
    trained = exact(trained) if wide else trained
    first, given = batch.first_row, (batch.tokens, batch.positions, batch.segments)
    if package == "mlxgpt":
        _, _, found = trained._gradients(trained._arrays(batch), trained._keys(step), mx.array(first, mx.uint32))
        logits = trained.model(*(None if each is None else mx.array(each) for each in given))
        return Probe(np.array(logits), {name: np.array(found[name]) for name in found})
    trained._gradients(trained._arrays(batch), trained._keys(step), torch.tensor(first, dtype=torch.int32))
    with torch.no_grad():
        logits = trained.model(*(None if each is None else torch.from_numpy(each) for each in given))
    everything = dict(trained.model.named_parameters())
    assert {name for name, each in everything.items() if each.grad is not None} == set(trained.table)
    return Probe(
        logits.numpy(), {name: each.grad.numpy() for name, each in everything.items() if each.grad is not None}
    )


def train(
    package: str, config: Recipe, params: dict[str, Any], steps: int, first: int = 1, **batch: Any
) -> tuple[Any, np.ndarray]:
    """The engine after the steps, and the mean loss of each."""
    trained, losses = engine(package, config, params), []
    for step in range(first, first + steps):
        stats = trained.train_step(
            step, packed(config, step % 2, **batch).split(config.train.micro_batch_size), config.optim.lr
        )
        assert stats.finite
        losses.append(stats.loss_sum / stats.weight)

    return trained, np.array(losses)


def peft_model(config: Recipe, params: dict[str, Any], place: Path) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """PEFT's model on transformers', with the recipe's adapter and these tensors; its parameters by our names."""
    import peft
    import transformers

    adapter = config.adapter
    assert adapter is not None
    model_folder.write_model(place, config.model, {name: params[name] for name in parameters.table(config.model)})
    plain = transformers.AutoModelForCausalLM.from_pretrained(place)
    targets = adapters.targets(config.model, adapter)
    modules = {path: families.to_foreign(config.model, f"{path}.weight")[0].removesuffix(".weight") for path in targets}
    settings = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=int(adapter.alpha),
        target_modules=list(modules.values()),
        rank_pattern={modules[path]: target.rank for path, target in targets.items()},
        use_rslora=adapter.rslora,
        use_dora=adapter.method == "dora",
        fan_in_fan_out=config.model.family == "gpt2",
        lora_dropout=0.0,
    )
    model = peft.get_peft_model(plain, settings).eval()
    every, own = dict(model.named_parameters()), {}
    for path, module in modules.items():
        for kind, spellings in _PEFT.items():
            found = [name for name in every if any(name.endswith(f".{module}.{each}") for each in spellings)]
            if f"{path}.{kind}" in params:
                own[f"{path}.{kind}"] = every[found[0]]
                every[found[0]].data.copy_(torch.from_numpy(params[f"{path}.{kind}"]))
    assert len(own) == sum(each.requires_grad for each in every.values())
    return model, own


def peft_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The weighted sum of the batch's losses by PEFT's model."""
    logits = model(torch.from_numpy(batch.tokens).long()).logits
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.targets).long().flatten(), reduction="none"
    )
    return (each * torch.from_numpy(batch.weights).flatten()).sum()


def peft_probe(config: Recipe, params: dict[str, Any], batch: Batch, place: Path) -> Probe:
    """What PEFT computes."""
    model, own = peft_model(config, params, place)
    peft_loss(model, batch).backward()
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens).long()).logits
    return Probe(logits.numpy(), {name: gradient(each) for name, each in own.items()})


def peft_curve(config: Recipe, params: dict[str, Any], steps: int, place: Path) -> np.ndarray:
    """The mean loss of each step of a loop by hand: PEFT, torch's AdamW and clipping, matrices decay."""
    model, own = peft_model(config, params, place)
    optim, losses = config.optim, []
    groups = [
        {
            "params": [each for each in own.values() if (each.ndim > 1) == decay],
            "weight_decay": optim.weight_decay * decay,
        }
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    for step in range(1, steps + 1):
        batch = packed(config, step % 2, segments=False)
        optimizer.zero_grad()
        loss = peft_loss(model, batch) / batch.weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), optim.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


def gradient(tensor: torch.Tensor) -> np.ndarray:
    """Its gradient, which must be there."""
    assert tensor.grad is not None
    return tensor.grad.numpy()
