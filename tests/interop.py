"""Adapters between mlxgpt, PEFT and mlx-lm, on tiny models: what tests assert and benchmarks/adapters.py prints.

A cell is a largest difference of logits relative to the largest, at most GATE. What was written here is loaded by a
library and held against that library on the fused model; what a library wrote is loaded by both frameworks and held
against the library itself.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from adapting import moved, recipe
from compare import worst
from models import CASES, tiny, weights

import mlxgpt.load
import torch_ref.load
from convert.fuse import fuse
from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.model import adapters, params

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

GATE = 1e-5
TOKENS = np.random.default_rng(0).integers(0, 80, (2, 12))  # no longer than a window, which mlx-lm does not have
# mlx-lm takes gpt_neox's GELU for tanh, so a model that has that one is compared
MODELS: dict[str, ModelConfig] = {name: CASES[name] for name in ("gpt2", "llama-gqa", "qwen3", "phi3", "gemma2")}
MODELS["gpt_neox"] = tiny(family="gpt_neox", activation="gelu_tanh", block_size=64)
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"method": "dora"}, "rslora": {"rslora": True}}
FULL = ("gpt2", "llama-gqa", "qwen3")  # with every method; the others with LoRA

transformers.logging.set_verbosity_error()


@dataclass(frozen=True)
class Written:
    """A base, an adapter of ours for it, and the model of both, as folders."""

    config: ModelConfig
    recipe: Recipe
    base: Path
    adapter: Path
    fused: Path


def write_base(place: Path, config: ModelConfig) -> Path:
    """A model folder of weights in which no tensor is constant."""
    model_folder.write_model(place, config, weights(config))
    return place


def written(place: Path, name: str, **adapter: Any) -> Written:
    """An adapter of ours, off its start, and what it makes of its base."""
    config = MODELS.get(name) or CASES[name]
    made = recipe("gpt2", **adapter)
    made = Recipe(model=config, train=made.train, tune=made.tune, adapter=made.adapter)
    assert made.adapter
    arrays = moved(made)
    chosen = adapters.whole(config, made.adapter, adapters.targets(config, made.adapter))
    for number, key in enumerate(chosen):  # what trains whole moves as well
        arrays[key] = arrays[key] + np.random.default_rng(number).normal(0, 0.1, arrays[key].shape).astype(np.float32)
    base = write_base(place / "base", config)
    (place / "adapter").mkdir()
    kept = {key: arrays[key] for key in adapters.shapes(made) if key in chosen or key not in params.table(config)}
    adapter_folder.write_adapter(place / "adapter", made, base, kept)
    fuse(base, place / "adapter", place / "fused")
    return Written(config, made, base, place / "adapter", place / "fused")


def transformers_logits(place: Path) -> np.ndarray:
    """Of transformers on a model folder, float32."""
    return _torch_logits(transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32))


def _torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def mlx_lm_logits(place: Path, adapter: Path | None = None) -> np.ndarray:
    """Of mlx-lm on a model folder, with an adapter's folder."""
    model: Any = load_model(place)[0]
    if adapter is not None:
        load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def our_logits(package: Any, place: Path, adapter: Any = None) -> np.ndarray:
    """Of one of our frameworks on a model folder, with adapters."""
    model, _ = package.load.load(place, adapter=adapter, device="cpu")
    if package is mlxgpt:
        return np.array(model(mx.array(TOKENS)))
    return model(torch.tensor(TOKENS)).detach().numpy()


def peft_load(base: Path, adapter: Path) -> tuple[Any, list[str], list[str]]:
    """PEFT's model, and the names that it missed in the folder's file and did not expect there."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that are not PEFT's own
        made = peft.PeftModel(model, peft.PeftConfig.from_pretrained(str(adapter)))
        said = made.load_adapter(adapter, "default")
    return made, list(said.missing_keys), list(said.unexpected_keys)


def to_peft(made: Written) -> float:
    """Written here, loaded by PEFT; infinity where it misses a name."""
    model, missing, unexpected = peft_load(made.base, made.adapter)
    if missing or unexpected:
        print(f"missing {missing}, unexpected {unexpected}")
        return float("inf")
    return worst("peft", _torch_logits(model), transformers_logits(made.fused))


def to_mlx_lm(made: Written) -> float:
    """Written here, loaded by mlx-lm."""
    return worst("mlx-lm", mlx_lm_logits(made.base, made.adapter), mlx_lm_logits(made.fused))


def write_peft(place: Path, base: Path, **config: Any) -> np.ndarray:
    """An adapter as PEFT saves it, its tensors drawn; the logits with it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4} | config))
        with torch.no_grad():
            for name, each in made.named_parameters():
                if each.requires_grad:
                    noise = 0.05 * torch.randn(each.shape)
                    each.copy_(each * (1 + 4 * noise) if "magnitude" in name else each + noise)
        made.save_pretrained(str(place))
    return _torch_logits(made)


def write_mlx_lm(place: Path, base: Path, method: str = "lora", layers: int = -1, **parameters: Any) -> np.ndarray:
    """An adapter as mlx_lm.lora saves it, its tensors drawn; the logits with it."""
    model: Any = load_model(base)[0]
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0} | parameters
    model.freeze()
    linear_to_lora_layers(model, layers, parameters, use_dora=method == "dora")
    mx.random.seed(0)

    def draw(name: str, each: mx.array) -> mx.array:
        noise = 0.05 * mx.random.normal(each.shape)
        return each * (1 + 4 * noise) if name.endswith(".m") else each + noise

    model.update(tree_map_with_path(draw, model.trainable_parameters()))
    model.eval()
    place.mkdir()
    mx.save_safetensors(str(place / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    values = {"fine_tune_type": method, "num_layers": layers, "lora_parameters": parameters, "model": str(base)}
    (place / "adapter_config.json").write_text(json.dumps(values))
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def from_library(base: Path, adapter: Path, expected: np.ndarray) -> dict[str, float]:
    """Written by a library, loaded by both frameworks."""
    return {
        package.__name__: worst(package.__name__, our_logits(package, base, adapter), expected)
        for package in (mlxgpt, torch_ref)
    }


def matrix(place: Path | None = None) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(model, method, figures by direction) of every cell of the interop matrix."""
    for name in MODELS:
        for method in METHODS if name in FULL else ("lora",):
            yield name, method, cell(Path(tempfile.mkdtemp(dir=place)), name, method)


def cell(place: Path, name: str, method: str) -> dict[str, float]:
    """One line of the matrix: written here and read there, written there and read here in both frameworks."""
    made = written(place, name, ranks=("c_proj=2",), alpha=4.0, **METHODS[method])
    figures = {"ours -> peft": to_peft(made), "ours -> mlx-lm": to_mlx_lm(made)}
    kinds: dict[str, Callable[[Path], np.ndarray]] = {
        "peft": lambda at: write_peft(
            at, made.base, target_modules="all-linear", use_dora=method == "dora", use_rslora=method == "rslora"
        ),
        "mlx-lm": lambda at: write_mlx_lm(at, made.base, "dora" if method == "dora" else "lora", 1),
    }
    for library, write in kinds.items():
        expected = write(place / library)
        for package, figure in from_library(made.base, place / library, expected).items():
            figures[f"{library} -> {package}"] = figure
    return figures
