"""train.memory_limit, cache_limit, clear_cache, wired_limit: each does what it says, or says that it does nothing."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

import mlxgpt.device
import torch_ref.engine
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import Recipe, TrainConfig
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build
from mlxgpt.engine import Engine

CPU = mx.Device(mx.cpu)
MIB = 2**20


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    memory, cache = mx.get_memory_limit(), mx.set_cache_limit(0)
    mx.set_cache_limit(cache)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


def recipe(**settings: int) -> Recipe:
    model = {"n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 64, "vocab_size": 512}
    return build({"model": model, "train": {"batch_size": 8, **settings}}, "test")


def step(engine: object, made: Recipe) -> float:
    tokens = np.arange(8 * 64, dtype=np.int32).reshape(8, 64) % 512
    batch = Batch(tokens, tokens, np.ones(tokens.shape, np.float32))
    return engine.train_step(1, [batch], 1e-3).loss_sum  # type: ignore[attr-defined]


def trained(**settings: int) -> float:
    made = recipe(**settings)
    mx.clear_cache()
    return step(Engine(made, params.init_params(made.model, 1), device="cpu"), made)


def test_the_memory_limit_is_set_on_a_gpu_alone() -> None:
    """On a CPU MLX takes the figure, and keeps what it frees: measured, so it is said and not set."""
    before = mx.get_memory_limit()
    assert mlxgpt.device.limit(CPU, TrainConfig(memory_limit=100)) == ["train.memory_limit: no effect in MLX on a CPU"]
    assert mx.get_memory_limit() == before
    assert mlxgpt.device.limit(mx.Device(mx.gpu), TrainConfig(memory_limit=100)) == []
    assert mx.get_memory_limit() == 100 * MIB


def test_the_cache_limit_bounds_what_is_kept() -> None:
    free = trained()
    assert mx.get_cache_memory() > 2 * MIB
    assert trained(cache_limit=1) == free
    assert mx.get_cache_memory() <= MIB


def test_the_cache_is_cleared_above_its_threshold() -> None:
    free = trained()
    kept = mx.get_cache_memory()
    assert trained(clear_cache=1) == free
    assert mx.get_cache_memory() < kept / 2
    trained(clear_cache=10_000)
    assert mx.get_cache_memory() > kept / 2


def test_the_wired_limit_is_touched_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", asked.append)
    gpu = mx.Device(mx.gpu)
    assert mlxgpt.device.limit(gpu, TrainConfig(memory_limit=1000, cache_limit=100)) == []
    assert asked == []
    assert mlxgpt.device.limit(gpu, TrainConfig(wired_limit=7)) == []
    assert asked == [7 * MIB]
    assert mlxgpt.device.limit(CPU, TrainConfig(wired_limit=7)) == ["train.wired_limit: no effect in MLX on a CPU"]
    assert asked == [7 * MIB]


def test_pytorch_says_what_has_no_effect_on_a_cpu() -> None:
    made = recipe(memory_limit=1, cache_limit=1, clear_cache=1, wired_limit=1)
    engine = torch_ref.engine.Engine(made, params.init_params(made.model, 1), device="cpu")
    names = [line.partition(":")[0] for line in engine.unused_limits]
    assert names == ["train.memory_limit", "train.cache_limit", "train.clear_cache", "train.wired_limit"]
    assert np.isfinite(step(engine, made))
