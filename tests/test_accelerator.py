"""The ladder on Metal, MPS or CUDA, each framework against its own CPU float32: ``pytest -m accelerator``.

Not measured on Metal yet: the gates are those of the CPU ladder with ten times the room, as the demo's are.
"""

import dataclasses
import functools
import importlib
from typing import Any

import numpy as np
import pytest
from compare import agree
from models import tiny
from test_engine import batch, recipe

from mlxgpt.common.config import Recipe, SampleConfig
from mlxgpt.common.model import params

pytestmark = pytest.mark.accelerator

# heads of at least 16, as FlexAttention needs
SHAPES: dict[str, dict[str, Any]] = {
    "mistral": {"n_kv_head": 2, "window": 12},
    "gemma2": {"n_kv_head": 2, "window": 12},
    "qwen3": {"n_kv_head": 2},
}


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


def on_cuda() -> None:
    """Skips what is about torch's CUDA kernels."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("PyTorch has no CUDA device here")


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "qwen3"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_packed_rows_and_windows_in_flex_attention_give_the_cpus_curve(family: str, compile: str) -> None:
    on_cuda()
    from test_torch_gpu import losses, packed

    import torch_ref.engine as engines

    config = dataclasses.replace(
        recipe(compile=compile), model=tiny(family=family, n_embd=64, **SHAPES.get(family, {}))
    )
    cpu = dataclasses.replace(config, train=dataclasses.replace(config.train, compile="off"))
    expected = losses(cpu, packed)
    with pytest.MonkeyPatch.context() as patch:
        plain = engines.Engine
        patch.setattr(engines, "Engine", lambda recipe, weights, _: plain(recipe, weights, "cuda"))
        found = losses(config, packed)
    agree(f"{family}: step 1", found[:1], expected[:1], 1e-5)
    agree(f"{family}: loss", found, expected, 1e-3)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_fused_updates_and_a_compiled_step_give_the_cpus_curve(optim: str, compile: str) -> None:
    on_cuda()
    config = recipe("llama", optim, compile=compile, micro_batch_size=4)
    expected = trained("torch_ref", recipe("llama", optim, micro_batch_size=4), "cpu")[0]
    agree("loss a step", trained("torch_ref", config, "cuda")[0], expected, 1e-3)


def test_a_step_waits_for_cuda_once() -> None:
    """PyTorch itself fails at a wait that nobody asked for; what the host reads comes with an event."""
    on_cuda()
    import torch

    config = recipe("llama", compile="off", micro_batch_size=4)
    engine = trained("torch_ref", config, "cuda", steps=1)[1]
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert engine.train_step(2, batch(config, 2).split(4), 1e-3).finite
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_float32_grouped_heads_keep_no_scores_on_cuda() -> None:
    on_cuda()
    import torch

    from torch_ref.attention import attend

    q, k = (torch.randn(1, heads, 4096, 64, device="cuda", requires_grad=True) for heads in (8, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, k, "causal", None, 0.125, 0.0).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * 4096 * 4096 * 4, "less than one array of scores"


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_deterministic_training_and_sampling_raise_nothing(top_p: float) -> None:
    on_cuda()
    import torch

    from torch_ref.generate import generate

    try:
        config = recipe("llama", deterministic=True, label_smoothing=0.1, loss_chunk=16)
        texts = []
        for _ in range(2):
            engine = trained("torch_ref", config, "cuda", steps=2)[1]
            sample = SampleConfig(max_tokens=16, top_p=top_p, top_k=30)
            texts.append(generate(engine.model, None, [[1, 2, 3], [4]], sample)[0].tokens)
        assert texts[0] == texts[1]
    finally:
        torch.use_deterministic_algorithms(False)
