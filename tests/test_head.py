"""Head and loss in chunks of the vocabulary: the definition's losses and gradients, any cotangents."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from compare import agree, worst

import mlxgpt.fast
import mlxgpt.head
import mlxgpt.load
import mlxgpt.losses
import torch_ref.head
import torch_ref.load
import torch_ref.losses
from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
from head_problem import (
    CHOICES,
    CHUNKED,
    GRADIENT,
    LOSS,
    MODULES,
    Gradients,
    V,
    gradient_of,
    hold,
    judge,
    leaf_names,
    mlx_chunked,
    problem,
    torch_chunked,
)


def breaks(found: tuple[np.ndarray, Gradients], expected: tuple[np.ndarray, Gradients]) -> list[str]:
    """The gradients over the gate."""
    return [name for name, grad in found[1].items() if worst(name, grad, expected[1][name]) > GRADIENT]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("framework", CHUNKED)
def test_trainable_head_gives_the_definitions_losses_and_gradients(framework, choice, recompute):
    data = problem()
    found = CHUNKED[framework](data, leaf_names(data), chunk=16, recompute=recompute, **CHOICES[choice])
    hold(found, judge(data, CHOICES[choice]))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("framework", CHUNKED)
def test_frozen_head_gives_the_hidden_states_the_same_gradient(framework, choice):
    data = problem()
    hold(
        CHUNKED[framework](data, ["hidden"], chunk=16, needs="hidden", **CHOICES[choice]), judge(data, CHOICES[choice])
    )


@pytest.mark.parametrize("chunk", [1, 17, 50, 100, 101, 5000])
@pytest.mark.parametrize("framework", CHUNKED)
def test_any_chunk_gives_the_same_without_a_bias(framework, chunk):
    data = problem(bias=False)
    found = CHUNKED[framework](data, leaf_names(data), chunk=chunk)
    hold(found, judge(data, {}))


def test_chunks_share_their_compiled_kernels():
    """No constant of the graph belongs to one chunk: it would be compiled into kernels of that chunk alone."""

    def constants(chunks: int) -> int:
        records: list[dict[str, Any]] = []
        h, w, y = mx.zeros((6, 8)), mx.zeros((64, 8)), mx.zeros((6,), mx.int32)
        options = mlxgpt.head.Options(64 // chunks)
        mx.export_function(
            records.append, lambda *given: mlxgpt.head.sweep(given[0], [given[1]], given[2], None, options)[0], h, w, y
        )
        found = [each for record in records if record["type"] == "constants" for _, each in record["constants"]]
        return len({(str(each.dtype), each.item()) for each in found if each.size == 1})

    assert 0 < constants(8) <= constants(2)


@pytest.mark.parametrize("framework", CHUNKED)
def test_large_logits_whose_maximum_moves_from_chunk_to_chunk(framework):
    data = problem(scale=30.0)
    data["bias"] = np.linspace(-150, 150, V, dtype=np.float32)
    found = CHUNKED[framework](data, leaf_names(data), chunk=16, z_loss=0.02)
    hold(found, judge(data, {"z_loss": 0.02}))


def test_uncompiled_mlx_gives_the_same():
    data = problem()
    options: dict[str, Any] = {"chunk": 16, **CHOICES["all"]}
    hold(mlx_chunked(data, leaf_names(data), compiled=False, **options), judge(data, CHOICES["all"]))


def test_both_frameworks_agree():
    data = problem()
    hold(*(chunked(data, leaf_names(data), chunk=16, **CHOICES["all"]) for chunked in CHUNKED.values()))


@pytest.mark.parametrize("framework", CHUNKED)
def test_a_head_that_needs_nothing_gives_losses_alone(framework):
    data, choice = problem(), CHOICES["all"]
    head, array = MODULES[framework], {"mlx": mx.array, "torch": torch.tensor}[framework]
    at = {name: array(value) for name, value in data.items()}
    losses = head.token_losses(
        at["hidden"], at["weight"], at["targets"], head.Options(16, "none", **choice), at["bias"]
    )
    agree("losses", np.asarray(losses), judge(data, choice)[0], LOSS)


@pytest.mark.parametrize("framework", CHUNKED)
def test_what_is_not_needed_gets_no_gradient(framework):
    data = problem(bias=False)
    if framework == "mlx":
        assert not mlx_chunked(data, leaf_names(data), chunk=16, needs="hidden")[1]["weight"].any()
    else:
        with pytest.raises(AssertionError, match="no gradient"):
            torch_chunked(data, leaf_names(data), chunk=16, needs="hidden")


@pytest.mark.parametrize("framework", CHUNKED)
def test_bfloat16_hidden_states_are_as_exact_as_in_the_plain_form(framework):
    """Losses equal the plain form's; gradients are at most 1.5 times as far from float64 as the plain form's."""
    data = problem(bias=False)
    exact = data | {"hidden": torch.tensor(data["hidden"]).bfloat16().float().numpy()}
    right = judge(exact, {})
    found = CHUNKED[framework](exact, leaf_names(data), chunk=16, dtype="bfloat16")
    plain = PLAIN[framework](exact, "bfloat16")
    agree("losses", found[0], plain[0], LOSS)
    for name in leaf_names(data):
        limit = 1.5 * worst(f"plain {name}", plain[1][name], right[1][name])
        assert 0 < worst(f"chunked {name}", found[1][name], right[1][name]) <= limit


def mlx_plain(data: dict[str, np.ndarray], dtype: str, **choice: Any) -> tuple[np.ndarray, Gradients]:
    """losses.cross_entropy of whole logits, in MLX."""
    h, w, y, c = (mx.array(data[name]) for name in ("hidden", "weight", "targets", "cotangents"))

    def objective(h: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
        losses = mlxgpt.losses.cross_entropy(mlxgpt.head.logits(h, w), y, **choice)
        return (losses * c).sum(), losses

    (_, losses), grads = mx.value_and_grad(objective, argnums=(0, 1))(h.astype(getattr(mx, dtype)), w)
    named = zip(("hidden", "weight"), grads, strict=True)
    return np.array(losses), {name: np.array(grad.astype(mx.float32)) for name, grad in named}


def torch_plain(data: dict[str, np.ndarray], dtype: str, **choice: float) -> tuple[np.ndarray, Gradients]:
    """losses.cross_entropy of whole logits, in PyTorch."""
    h = torch.tensor(data["hidden"], dtype=getattr(torch, dtype), requires_grad=True)
    w = torch.tensor(data["weight"], requires_grad=True)
    losses = torch_ref.losses.cross_entropy(torch_ref.head.logits(h, w), torch.tensor(data["targets"]), **choice)
    (losses * torch.tensor(data["cotangents"])).sum().backward()
    return losses.detach().numpy(), {"hidden": gradient_of(h), "weight": gradient_of(w)}


PLAIN: dict[str, Callable[..., tuple[np.ndarray, Gradients]]] = {"mlx": mlx_plain, "torch": torch_plain}


@pytest.mark.parametrize("framework", PLAIN)
def test_the_plain_form_is_the_definition_too(framework):
    data, choice = problem(bias=False), CHOICES["smoothing and z-loss"]
    hold(PLAIN[framework](data, "float32", **choice), judge(data, choice))


# Mutations: each of these mistakes, made in a gradient, must be seen.
def drop_cotangents(head: ModuleType, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    real = head.weight_gradient
    monkeypatch.setattr(head, "weight_gradient", lambda h, w, y, b, c, done, o: real(h, w, y, b, 0 * c + 1, done, o))


def forget_z_loss(head: ModuleType, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    real = head.weight_gradient
    monkeypatch.setattr(
        head, "weight_gradient", lambda h, w, y, b, c, done, o: real(h, w, y, b, c, done, o._replace(z_loss=0.0))
    )


def miss_the_target(head: ModuleType, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    real = head.weight_gradient
    monkeypatch.setattr(head, "weight_gradient", lambda h, w, y, b, c, done, o: real(h, w, (y + 1) % V, b, c, done, o))


def forget_z_loss_for_hidden(head: ModuleType, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    real = head.sweep

    def sweep(h: Any, w: Any, y: Any, b: Any, o: Any) -> Any:
        return real(h, w, y, b, o)._replace(gradient=real(h, w, y, b, o._replace(z_loss=0.0)).gradient)

    monkeypatch.setattr(head, "sweep", sweep)


def miss_the_target_for_hidden(head: ModuleType, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    real = head.sweep

    def sweep(h: Any, w: Any, y: Any, b: Any, o: Any) -> Any:
        return real(h, w, y, b, o)._replace(gradient=real(h, w, (y + 1) % V, b, o).gradient)

    monkeypatch.setattr(head, "sweep", sweep)


def forget_the_rescaling(head: ModuleType, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept chunks taken as if their running maximum had been the last one."""
    real = head.sweep

    def sweep(h: Any, w: Any, y: Any, b: Any, o: Any) -> Any:
        done = real(h, w, y, b, o)
        return done._replace(tops=[done.tops[-1]] * len(done.tops))

    monkeypatch.setattr(head, "sweep", sweep)


MUTATIONS = {
    drop_cotangents: {"weight", "bias"},
    forget_z_loss: {"weight", "bias"},
    miss_the_target: {"weight", "bias"},
    forget_z_loss_for_hidden: {"hidden"},
    miss_the_target_for_hidden: {"hidden"},
    forget_the_rescaling: {"weight", "bias"},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("framework", CHUNKED)
def test_a_wrong_gradient_is_seen(framework, mutation, monkeypatch):
    data, choice = problem(), CHOICES["smoothing and z-loss"]
    mutation(MODULES[framework], data, monkeypatch)
    found = CHUNKED[framework](data, leaf_names(data), chunk=16, **choice)
    assert set(breaks(found, judge(data, choice))) == MUTATIONS[mutation]


@pytest.mark.parametrize("framework", CHUNKED)
def test_uniform_cotangents_would_hide_that_they_are_dropped(framework, monkeypatch):
    """Why the problem draws them: with ones everywhere the mutation above passes."""
    data = problem()
    data["cotangents"] = np.ones_like(data["cotangents"])
    drop_cotangents(MODULES[framework], data, monkeypatch)
    assert not breaks(CHUNKED[framework](data, leaf_names(data), chunk=16), judge(data, {}))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("framework", CHUNKED)
def test_a_broken_hidden_state_breaks_its_own_loss_alone(framework, broken):
    data = problem()
    data["hidden"][1, 2, 3] = broken
    losses, _ = CHUNKED[framework](data, ["hidden"], chunk=16)
    assert not np.isfinite(losses[1, 2])
    assert np.isfinite(losses).sum() == losses.size - 1
