"""A model's losses with the head in chunks: the plain form's, and less memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny, weights

import mlxgpt.fast
import mlxgpt.head
import mlxgpt.load
import mlxgpt.losses
import torch_ref.head
import torch_ref.load
import torch_ref.losses
from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common import rng
from mlxgpt.common.config import TrainConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.recipes import build

# isort: split
import mlx.core as mx
from head_problem import (
    CHUNKED,
    Gradients,
    gradient_of,
    hold,
)
from mlx.utils import tree_flatten, tree_unflatten


def test_the_fast_exponential():
    x = np.concatenate([np.linspace(-87, 88, 200001), np.linspace(-1, 1, 200001)]).astype(np.float32)
    found = np.array(mlxgpt.fast.exp(mx.array(x)))
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() <= 1.3e-7
    assert mlxgpt.fast.exp(mx.array(0.0)).item() == 1.0
    assert np.isnan(mlxgpt.fast.exp(mx.array(float("nan"))).item())
    assert 0 <= np.array(mlxgpt.fast.exp(mx.array(-float("inf")))) < 2e-38


def peak(function: Callable[..., Any], *args: mx.array) -> int:
    """Bytes at the peak of a compiled call beyond what was there before."""
    run = mx.compile(function)
    mx.eval(run(*args))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run(*args))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("options", "argnums", "gate"),
    [
        ({"needs": "hidden"}, (0,), 0.2),
        ({"needs": "both"}, (0, 1), 0.6),
        ({"needs": "both", "recompute": True}, (0, 1), 0.2),
    ],
    ids=["frozen", "kept", "recomputed"],
)
def test_memory_inside_the_compiled_step(options, argnums, gate):
    """Of the plain form's peak; a trainable head's own gradient is not counted on either side."""
    tokens, width, words = 512, 16, 8192
    hidden = mx.array(rng.normal(0, "hidden", shape=(tokens, width), std=1.0))
    weight = mx.array(rng.normal(0, "weight", shape=(words, width), std=1.0))
    targets = mx.array(rng.integers(0, "targets", count=tokens, high=words).astype(np.int32))
    own = weight.nbytes if 1 in argnums else 0

    def plain(h: mx.array, w: mx.array) -> mx.array:
        return mlxgpt.losses.cross_entropy(mlxgpt.head.logits(h, w), targets).sum()

    def chunked(h: mx.array, w: mx.array) -> mx.array:
        return mlxgpt.head.token_losses(h, w, targets, mlxgpt.head.Options(128, **options)).sum()

    mx.eval(hidden, weight, targets)
    costs = [peak(mx.grad(each, argnums=argnums), hidden, weight) - own for each in (chunked, plain)]
    assert costs[1] > 2 * tokens * words * 4
    assert costs[0] <= gate * costs[1], f"{costs[0] / costs[1]:.2f} of the plain form's peak"


@pytest.mark.parametrize(("needs", "share"), [("hidden", 0.1), ("both", 1.1)])
def test_what_torch_saves_for_the_backward_pass(needs, share):
    """In units of the logits' size."""
    tokens, width, words = 64, 8, 4096
    hidden, weight = torch.ones(tokens, width, requires_grad=True), torch.zeros(words, width)
    saved = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel() if tensor.data_ptr() != weight.data_ptr() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        o = torch_ref.head.Options(256, needs)
        torch_ref.head.token_losses(hidden, weight, torch.zeros(tokens, dtype=torch.int32), o).sum().backward()
    assert 0 < sum(saved) <= share * tokens * words


def objective_of(framework: str, tied: bool, config: TrainConfig, plain: bool) -> tuple[np.ndarray, Gradients]:
    """losses.lm of a tiny model, and all of its gradients."""
    model_config = tiny(family="llama", tied=tied)
    values = weights(model_config)
    draw = rng.integers(1, "tokens", count=2 * 21, high=model_config.vocab_size).reshape(2, 21).astype(np.int32)
    batch = draw[:, :-1], draw[:, 1:], np.ones((2, 20), np.float32)
    if framework == "mlx":
        from mlxgpt.model import Model

        made, arrays = (
            Model(model_config),
            mlxgpt.losses.Arrays(*[mx.array(each) for each in batch], positions=None, segments=None),
        )
        made.update(tree_unflatten([(name, mx.array(value)) for name, value in values.items()]))
        found = mlxgpt.losses.lm(made, arrays, config, plain=plain)
        if plain:
            return np.array(found), {}
        import mlx.nn as nn

        grads = nn.value_and_grad(made, lambda: mlxgpt.losses.lm(made, arrays, config).sum())()[1]
        return np.array(found), {name: np.array(grad) for name, grad in tree_flatten(grads)}
    from torch_ref.model import Model as TorchModel

    model, tensors = (
        TorchModel(model_config),
        torch_ref.losses.Arrays(*[torch.tensor(each) for each in batch], positions=None, segments=None),
    )
    model.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    losses = torch_ref.losses.lm(model, tensors, config, plain=plain)
    if plain:
        return losses.detach().numpy(), {}
    losses.sum().backward()
    return losses.detach().numpy(), {name: gradient_of(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("plain", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("framework", CHUNKED)
def test_loss_chunk_changes_a_model_by_rounding_only(framework, tied, plain):
    settings: dict[str, Any] = dict(label_smoothing=0.1, z_loss=1e-2)
    whole = objective_of(framework, tied, TrainConfig(loss_chunk=0, **settings), plain)
    for recompute in (False, True):
        config = TrainConfig(loss_chunk=32, checkpoint_activations=recompute, **settings)
        hold(objective_of(framework, tied, config, plain), whole)


@pytest.mark.parametrize("framework", CHUNKED)
def test_loss_chunk_decides_the_form(framework, monkeypatch):
    """0 takes whole logits, and so does a chunk that holds the vocabulary of 80; a smaller one never asks for them."""
    package: Any = {"mlx": mlxgpt.losses, "torch": torch_ref.losses}[framework]

    def refuse(*args: Any) -> None:
        raise RuntimeError("whole logits")

    monkeypatch.setattr(package, "cross_entropy", refuse)
    objective_of(framework, True, TrainConfig(loss_chunk=79), plain=True)
    for chunk in (0, 80):
        with pytest.raises(RuntimeError, match="whole logits"):
            objective_of(framework, True, TrainConfig(loss_chunk=chunk), plain=True)


def test_chunks_are_chosen_by_size_and_device() -> None:
    """1024 entries on a CPU; on a GPU as many logits as keep it busy, and few of them whole."""
    auto, given = TrainConfig(), TrainConfig(loss_chunk=300)
    assert auto.head_chunk(2048, 32000, gpu=False) == 1024
    assert [auto.head_chunk(2048, size, gpu=False) for size in (1024, 1025)] == [0, 1024]
    assert auto.head_chunk(12 * 1024, 50257, gpu=True) == 2560
    assert auto.head_chunk(2**20, 50257, gpu=True) == 1024
    assert auto.head_chunk(16, 151936, gpu=True) == 0
    assert auto.head_chunk(2048, 8192, gpu=True) == 8192  # one chunk: what a whole needs thrice
    for tokens, size in ((300, 50257), (5000, 32000), (12288, 50257), (40000, 262144)):
        chunk = auto.head_chunk(tokens, size, gpu=True)
        assert 1024 < chunk <= size or tokens * chunk > 2**24
        assert chunk == 1024 or tokens * chunk <= 2**25
    assert [given.head_chunk(9, size, gpu) for size in (300, 301) for gpu in (False, True)] == [0, 0, 300, 300]
    assert TrainConfig(loss_chunk=0).head_chunk(2048, 32000, gpu=True) == 0


@pytest.mark.parametrize("value", ["512", "all", -1, 1.5, True])
def test_a_chunk_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"train\.loss_chunk = .*: expected"):
        build({"train": {"loss_chunk": value}})
    assert build({"train": {"loss_chunk": 512}}).train.loss_chunk == 512
    assert build({"train": {"loss_chunk": "auto"}}).train.loss_chunk == "auto"
