"""The chunked head of both frameworks on one problem, and the float64 judge of its losses and gradients."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from compare import agree

import mlxgpt.fast
import mlxgpt.head
import mlxgpt.load
import mlxgpt.losses
import torch_ref.head
import torch_ref.load
import torch_ref.losses
from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common import rng

# isort: split
import mlx.core as mx

B, T, C, V = 3, 7, 24, 101  # tokens and vocabulary entries are no multiples of the chunks below
LOSS, GRADIENT = 1e-6, 1e-5  # gates: relative, and of the tensor's largest value

CHOICES: dict[str, dict[str, float]] = {
    "nothing": {},
    "smoothing": {"label_smoothing": 0.15},
    "z-loss": {"z_loss": 0.02},
    "cap": {"soft_cap": 3.0},
    "smoothing and z-loss": {"label_smoothing": 0.15, "z_loss": 0.02},
    "scale": {"logit_scale": 0.4},
    "all": {"label_smoothing": 0.15, "z_loss": 0.02, "soft_cap": 3.0, "logit_scale": 1.7},
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
    z = z * choice.get("logit_scale", 1.0)
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
