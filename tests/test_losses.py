"""Head and loss in chunks of the vocabulary: the plain form's losses and gradients, any cotangents, less memory."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from compare import agree, worst
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

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

B, T, C, V = 3, 7, 24, 101  # tokens and words are no multiples of the chunks below
LOSS, GRADIENT = 1e-6, 1e-5  # gates: relative, and of the tensor's largest value

CHOICES: dict[str, dict[str, float]] = {
    "nothing": {},
    "smoothing": {"label_smoothing": 0.15},
    "z-loss": {"z_loss": 0.02},
    "cap": {"soft_cap": 3.0},
    "smoothing and z-loss": {"label_smoothing": 0.15, "z_loss": 0.02},
    "all": {"label_smoothing": 0.15, "z_loss": 0.02, "soft_cap": 3.0},
}
Gradients = dict[str, np.ndarray]


def problem(scale: float = 1.0, bias: bool = True) -> dict[str, np.ndarray]:
    """Hidden states, a head, targets at the chunks' edges, and cotangents of both signs, some of them zero."""
    made = {
        "hidden": rng.normal(0, "hidden", shape=(B, T, C), std=scale),
        "weight": rng.normal(0, "weight", shape=(V, C), std=C**-0.5),
        "cotangents": rng.normal(0, "cotangents", shape=(B, T), std=1.0),
    }
    if bias:
        made["bias"] = rng.normal(0, "bias", shape=(V,), std=1.0)
    made["targets"] = rng.integers(0, "targets", count=B * T, high=V).reshape(B, T).astype(np.int32)
    made["targets"][0] = [0, 15, 16, 17, 99, 100, 100]
    made["cotangents"][1, ::2] = 0
    return made


def judge(data: dict[str, np.ndarray], choice: dict[str, float]) -> tuple[np.ndarray, Gradients]:
    """Losses and gradients of the definition, by torch's autograd in float64."""
    leaves = {name: torch.tensor(data[name], dtype=torch.float64, requires_grad=True) for name in leaf_names(data)}
    z = leaves["hidden"] @ leaves["weight"].T + leaves.get("bias", 0.0)
    if "soft_cap" in choice:
        z = choice["soft_cap"] * torch.tanh(z / choice["soft_cap"])
    smoothing, log_p = choice.get("label_smoothing", 0.0), torch.log_softmax(z, dim=-1)
    target = torch.take_along_dim(log_p, torch.tensor(data["targets"]).long()[..., None], dim=-1)[..., 0]
    losses = -(1 - smoothing) * target - smoothing * log_p.mean(dim=-1)
    losses = losses + choice.get("z_loss", 0.0) * torch.logsumexp(z, dim=-1).square()
    (losses * torch.tensor(data["cotangents"])).sum().backward()
    return losses.detach().numpy(), {name: gradient_of(leaf) for name, leaf in leaves.items()}


def gradient_of(leaf: torch.Tensor) -> np.ndarray:
    """What the backward pass left there, in float64."""
    assert leaf.grad is not None, "no gradient"
    return leaf.grad.double().numpy()


def leaf_names(data: dict[str, np.ndarray]) -> list[str]:
    """What a gradient is asked for."""
    return [name for name in ("hidden", "weight", "bias") if name in data]


def mlx_chunked(
    data: dict[str, np.ndarray], names: list[str], compiled: bool = True, dtype: str = "float32", **options: Any
) -> tuple[np.ndarray, Gradients]:
    """Losses, and gradients by ``names``, of mlxgpt.head."""
    o = mlxgpt.head.Options(**options)
    fixed = {name: mx.array(value) for name, value in data.items()}
    fixed["hidden"] = fixed["hidden"].astype(getattr(mx, dtype))

    def objective(leaves: dict[str, mx.array], fixed: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        at = fixed | leaves
        losses = mlxgpt.head.token_losses(at["hidden"], at["weight"], at["targets"], o, at.get("bias"))
        return (losses * at["cotangents"]).sum(), losses

    run = mx.value_and_grad(objective)
    (_, losses), grads = (mx.compile(run) if compiled else run)({name: fixed[name] for name in names}, fixed)
    assert losses.dtype == mx.float32
    assert all(grads[name].dtype == fixed[name].dtype for name in names)
    return np.array(losses), {name: np.array(grad.astype(mx.float32)) for name, grad in grads.items()}


def torch_chunked(
    data: dict[str, np.ndarray], names: list[str], compiled: bool = True, dtype: str = "float32", **options: Any
) -> tuple[np.ndarray, Gradients]:
    """The same of torch_ref.head, which has nothing to compile."""
    at = {name: torch.tensor(value) for name, value in data.items()}
    at["hidden"] = at["hidden"].to(getattr(torch, dtype))
    for name in names:
        at[name].requires_grad_()
    o = torch_ref.head.Options(**options)
    losses = torch_ref.head.token_losses(at["hidden"], at["weight"], at["targets"], o, at.get("bias"))
    (losses * at["cotangents"]).sum().backward()
    assert losses.dtype == torch.float32
    return losses.detach().numpy(), {name: gradient_of(at[name]) for name in names}


CHUNKED: dict[str, Callable[..., tuple[np.ndarray, Gradients]]] = {"mlx": mlx_chunked, "torch": torch_chunked}
MODULES: dict[str, ModuleType] = {"mlx": mlxgpt.head, "torch": torch_ref.head}


def hold(found: tuple[np.ndarray, Gradients], expected: tuple[np.ndarray, Gradients]) -> None:
    """Fails unless losses and every gradient agree."""
    for loss, right in zip(found[0].flat, expected[0].flat, strict=True):
        agree("loss", loss, right, LOSS, max(abs(right), 1.0))
    for name, grad in found[1].items():
        agree(f"gradient of {name}", grad, expected[1][name], GRADIENT)


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
    hold(CHUNKED[framework](data, leaf_names(data), chunk=chunk), judge(data, {}))


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


def mlx_plain(data: dict[str, np.ndarray], dtype: str, **choice: float) -> tuple[np.ndarray, Gradients]:
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
        return mlxgpt.head.token_losses(h, w, targets, mlxgpt.head.Options(64, **options)).sum()

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
