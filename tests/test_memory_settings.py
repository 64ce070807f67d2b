"""train.memory_limit, cache_limit, clear_cache, wired_limit: each does what it says, or says that it does nothing."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import mlxgpt.device
import torch_ref.device
import torch_ref.engine
from mlxgpt import cli
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import Recipe, TrainConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params, quantize_base
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.plan import machine
from mlxgpt.common.recipes import build
from mlxgpt.engine import Engine
from torch_ref import sampled

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


# ---- limits above what there is, before any work


@pytest.mark.parametrize(
    ("setting", "capacity", "expected"),
    [
        ("memory_limit", {}, "train.memory_limit = 9000: the memory is 8192 MiB; expected at most that, or 0"),
        ("cache_limit", {}, "train.cache_limit = 9000: the memory is 8192 MiB; expected at most that, or 0"),
        (
            "wired_limit",
            {"recommended": 5461 * MIB},
            "train.wired_limit = 9000: the device's recommended working set is 5461 MiB; expected at most that, or 0",
        ),
        (
            "wired_limit",
            {"recommended": 0},
            "train.wired_limit = 9000: the memory is 8192 MiB; expected at most that, or 0",
        ),
        (
            "memory_limit",
            {"total": 4096 * MIB, "free": 100},
            "train.memory_limit = 9000: the memory is 4096 MiB; expected at most that, or 0",
        ),
    ],
)
def test_a_limit_above_what_there_is_is_refused(
    setting: str, capacity: dict[str, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "total", lambda: 8192 * MIB)
    machine.check_limits(TrainConfig(memory_limit=4096, cache_limit=4096, wired_limit=4096), capacity)
    with pytest.raises(UserError) as caught:
        machine.check_limits(dataclasses.replace(TrainConfig(), **{setting: 9000}), capacity)
    assert str(caught.value) == expected


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_train_refuses_such_a_limit_before_it_reads_data(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "pydocs", "--backend", backend, "--device", "cpu", "--out", str(tmp_path / "run")]
    asked = machine.total() // MIB + 1
    assert cli.main([*given, "--set", f"train.memory_limit={asked}", "--set", "data.source=/no/such/file"]) == 2
    error = capsys.readouterr().err
    assert f"train.memory_limit = {asked}: the memory is {machine.total() // MIB} MiB" in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


# ---- what a device has


def test_metal_names_a_working_set_and_cuda_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, info = mx.Device(mx.gpu), {"max_recommended_working_set_size": 7 * MIB, "memory_size": 9 * MIB}
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    assert mlxgpt.device.capacity(gpu) == {"recommended": 7 * MIB}
    info = {"device_name": "NVIDIA H200", "total_memory": 9 * MIB, "free_memory": 5 * MIB}
    assert mlxgpt.device.capacity(gpu) == {"total": 9 * MIB, "free": 5 * MIB}
    assert mlxgpt.device.capacity(CPU) == {}


def test_a_quantized_base_asks_the_function_that_all_plans_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"h.0.attn.c_attn.weight": Quantized.of(np.ones((64, 64), np.float32), 4, 64)}
    for package in (mlxgpt, torch_ref):
        monkeypatch.setattr(machine, "_limits", lambda: [(64 * 64 * 4 + 1, 0)])  # a container: half of it is too little
        cpu = package.device.use("cpu")
        assert quantize_base.widen(weights, package.device.room(cpu))[1].startswith("1 quantized matrices stay")
        monkeypatch.setattr(machine, "_limits", lambda: [(64 * 64 * 8, 0)])
        assert quantize_base.widen(weights, package.device.room(cpu))[1].startswith("1 quantized matrices dequantized")
    assert mlxgpt.device.room(mx.Device(mx.gpu)) is None and torch_ref.device.room(torch.device("mps")) is None


def test_free_memory_is_half_of_all_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> int:
        raise FileNotFoundError("vm_stat")

    monkeypatch.setattr(machine, "_free", missing)
    monkeypatch.setattr(machine, "_limits", list)
    assert machine.free() == machine.total() // 2


# ---- MPS, which counts only what is held now


def test_the_peak_on_mps_is_that_of_any_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double's memory is high for one operation in the middle of the backward pass alone, as logits are."""
    now = [100]
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: now[0])
    monkeypatch.setattr(sampled, "PEAK", sampled.Peak())
    made = recipe()
    engine = torch_ref.engine.Engine(made, params.init_params(made.model, 1), device="cpu")
    monkeypatch.setattr(torch_ref.engine.fast, "kind", lambda _: "mps")

    def high(grad: torch.Tensor) -> torch.Tensor:
        now[0] = 900
        high_one = grad * 1
        now[0] = 200
        return high_one

    engine.weights["h.0.mlp.c_fc.weight"].register_hook(high)
    assert np.isfinite(step(engine, made))
    assert torch_ref.device.memory(torch.device("mps")) == {"active": 200, "peak": 900}
    now[0] = 1000
    assert torch_ref.device.memory(torch.device("mps"))["peak"] == 1000


def test_only_the_first_steps_are_watched_operation_by_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [0]

    def current() -> int:
        looks[0] += 1
        return 1

    monkeypatch.setattr(torch.mps, "current_allocated_memory", current)
    made = recipe()
    engine = torch_ref.engine.Engine(made, params.init_params(made.model, 1), device="cpu")
    plain = step(engine, made)
    assert looks == [0]  # a device that counts by itself
    watched = torch_ref.engine.Engine(made, params.init_params(made.model, 1), device="cpu")
    monkeypatch.setattr(torch_ref.engine.fast, "kind", lambda _: "mps")
    counts = []
    for _ in range(4):
        looks[0] = 0
        loss = step(watched, made)
        counts.append(looks[0])
        if len(counts) == 1:
            assert loss == pytest.approx(plain, rel=1e-6)
    assert min(counts[:2]) > 100 and counts[2:] == [2, 2]
