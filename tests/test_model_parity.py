"""Rungs 0 to 3 of the parity ladder: names, bytes, logits and gradients in MLX, PyTorch and transformers."""

from pathlib import Path
from typing import Any

import ladder
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from models import CASES, weights

import mlxgpt.engine
import mlxgpt.load
import mlxgpt.model
import torch_ref.engine
import torch_ref.load
import torch_ref.model
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import params

PAIRS = [pytest.param(name, config, id=name) for name, config in CASES.items()]


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    """The parameters of either framework's model, by name."""
    named = tree_flatten(model.parameters()) if isinstance(model, mlxgpt.model.Model) else model.named_parameters()
    return {name: ladder.host(value) if isinstance(value, torch.Tensor) else np.array(value) for name, value in named}


@pytest.mark.parametrize(("case", "config"), PAIRS)
def test_rung_0_names_and_shapes_are_the_tables(case: str, config: ModelConfig) -> None:
    table = {name: param.shape for name, param in params.table(config).items()}
    for model in (mlxgpt.model.Model(config), torch_ref.model.Model(config)):
        assert {name: value.shape for name, value in arrays_of(model).items()} == table


@pytest.mark.parametrize(("case", "config"), PAIRS)
@pytest.mark.parametrize("writer", [mlxgpt.engine, torch_ref.engine], ids=["mlx", "torch"])
def test_rung_1_what_one_trained_loads_in_the_other(
    case: str, config: ModelConfig, writer: Any, tmp_path: Path
) -> None:
    engine = writer.Engine(Recipe(model=config), weights(config), "cpu")
    tokens, targets = ladder.batch(config)
    engine.train_step(1, [Batch(tokens, targets, np.ones(tokens.shape, np.float32))], 1e-2)
    trained = engine.snapshot()["params"]
    assert all((trained[name] != value).any() for name, value in weights(config).items()), "a tensor did not move"
    model_folder.write_model(tmp_path / "m", config, trained)
    for reader in (mlxgpt.load, torch_ref.load):
        model, tokenizer = reader.load(tmp_path / "m", device="cpu")
        assert model.config == config and tokenizer is None
        found = arrays_of(model)
        assert found.keys() == trained.keys()
        for name, value in found.items():
            assert value.dtype == np.float32 and value.tobytes() == trained[name].tobytes(), name


@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["x1", "x8"])
@pytest.mark.parametrize(("case", "config"), PAIRS)
def test_rungs_2_and_3_logits_and_gradients(case: str, config: ModelConfig, scale: float, tmp_path: Path) -> None:
    figures = ladder.compare(case, config, scale, tmp_path / "m")
    print(*figures, sep="\n")
    assert {figure.rung for figure in figures} == {2, 3}
    for what in ("in chunks - float64, loss", "in chunks - float64, gradients", "hidden.h.1", "transformers - float64"):
        assert any(what in figure.what for figure in figures), what
    for figure in figures:
        assert figure.agrees, figure


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_logits_are_those_of_the_weights(dtype: str, tmp_path: Path) -> None:
    """The public way in: load(folder) gives the probe's logits, in bfloat16 to its accuracy."""
    config = CASES["qwen3"]
    model_folder.write_model(tmp_path / "m", config, weights(config))
    tokens, _ = ladder.batch(config)
    expected = ladder.mlx_probe(config, weights(config)).logits
    ours, _ = mlxgpt.load.load(tmp_path / "m", device="cpu", dtype=dtype)
    theirs, _ = torch_ref.load.load(tmp_path / "m", device="cpu", dtype=dtype)
    found = {"mlx": np.array(ours(mx.array(tokens))), "torch": ladder.host(theirs(torch.from_numpy(tokens)))}
    for name, logits in found.items():
        assert logits.dtype == np.float32
        assert ladder.worst(name, logits, expected) <= (1e-5 if dtype == "float32" else 3e-2)
