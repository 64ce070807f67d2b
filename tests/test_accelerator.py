"""The ladder on Metal, MPS or CUDA, each framework against its own CPU float32: ``pytest -m accelerator``.

Not measured on Metal yet: the gates are those of the CPU ladder with ten times the room, as the demo's are.
"""

import functools
import importlib
from typing import Any

import numpy as np
import pytest
from compare import agree
from test_engine import batch, recipe

from mlxgpt.common.config import Recipe, SampleConfig
from mlxgpt.common.model import params

pytestmark = pytest.mark.accelerator


PACKAGES = ["mlxgpt", "torch_ref"]


@functools.cache
def present(package: str) -> bool:
    """Whether the package has an accelerator here that computes."""
    if package == "mlxgpt":
        from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

        # isort: split
        import mlx.core as mx

        return mx.is_available(mx.gpu)
    import torch

    if not (torch.cuda.is_available() or torch.mps.is_available()):
        return False
    try:
        # where a Mac is virtual, PyTorch says that MPS is there and has no memory for 256 bytes
        return torch.ones(64, device="cuda" if torch.cuda.is_available() else "mps").sum().item() == 64
    except RuntimeError:
        return False


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    """Each package that has an accelerator; none is a failure, for these tests are only run where one is."""
    if not present(request.param):
        assert any(map(present, PACKAGES)), "no accelerator that MLX or PyTorch can use"
        pytest.skip(f"no accelerator that {request.param} can use")
    return request.param


def trained(package: str, config: Recipe, device: str, steps: int = 20) -> tuple[np.ndarray, Any]:
    """Mean loss a step, and the engine."""
    engine = importlib.import_module(f"{package}.engine").Engine(config, params.init_params(config.model, 3), device)
    rows = config.train.micro_batch_size
    stats = [engine.train_step(step, batch(config, step).split(rows), 1e-3) for step in range(1, steps + 1)]
    return np.array([stat.loss_sum / stat.weight for stat in stats]), engine


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("setting", [{}, {"dropout": 0.2, "micro_batch_size": 4}, {"checkpoint_activations": True}])
def test_the_curve_is_the_cpus(package: str, family: str, setting: dict[str, Any]) -> None:
    config = recipe(family, **setting)
    expected, ours = trained(package, config, "cpu")
    found, theirs = trained(package, config, "gpu")
    agree(f"{package}: step 1", found[:1], expected[:1], 1e-5)
    agree(f"{package}: loss a step", found, expected, 1e-3)
    moved = theirs.snapshot()["params"]
    for name, value in ours.snapshot()["params"].items():
        assert np.isfinite(moved[name]).all() and moved[name].shape == value.shape, name


def test_deterministic_training_repeats_its_bits(package: str) -> None:
    first, second = (trained(package, recipe(deterministic=True), "gpu")[0] for _ in range(2))
    assert (first == second).all(), package


def test_bf16_learns_as_float32_does(package: str) -> None:
    exact, rough = (trained(package, recipe("llama", compute_dtype=kind), "gpu")[0] for kind in ("float32", "bfloat16"))
    agree(f"{package}: loss a step", rough, exact, 2e-2)


def test_greedy_text_is_the_cpus(package: str) -> None:
    generate = importlib.import_module(f"{package}.generate").generate
    texts = []
    for device in ("cpu", "gpu"):
        engine = trained(package, recipe("llama"), device, steps=1)[1]
        drawn = generate(engine.model, None, [[1, 2, 3]], SampleConfig(temperature=0.0, max_tokens=16))
        texts.append(drawn[0].tokens)
    assert texts[0] == texts[1], package
