"""Update rules as functions of one tensor. Rates and bias corrections are computed on the host, in Python floats."""

from typing import Any

import torch

from mlxgpt.common.config import OptimConfig
from mlxgpt.common.model.params import Param
from torch_ref.layers import Array


def uses_muon(name: str, param: Param, config: OptimConfig) -> bool:
    """Muon updates the blocks' matrices; embeddings, head, norms and biases stay with AdamW."""
    return config.name == "muon" and name.startswith("h.") and len(param.shape) == 2


def scalars(config: OptimConfig, lr: float, t: int) -> list[float]:
    """Of update ``t`` (from 1): AdamW's step size, 1 / root of v's correction, decay factor; Muon's rate and factor."""
    muon_lr = lr * config.muon_lr / config.lr
    return [
        lr / (1 - config.beta1**t),
        1 / (1 - config.beta2**t) ** 0.5,
        1 - lr * config.weight_decay,
        muon_lr,
        1 - muon_lr * config.weight_decay,
    ]


def own_rate(param: Param, s: Any) -> tuple[Any, Any]:
    """AdamW's step size and decay factor, of a rate times param.lr (Hayou et al. 2024, LoRA+)."""
    if param.lr == 1:
        return s[0], s[2]
    return s[0] * param.lr, 1 - (1 - s[2]) * param.lr


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    s: list[float],
    param: Param,
    config: OptimConfig,
) -> None:
    """AdamW (Loshchilov and Hutter 2019), in place: p (1 - lr wd) - lr m^ / (sqrt(v^) + eps); ``s`` from scalars()."""
    m.lerp_(g, 1 - config.beta1)
    v.mul_(config.beta2).addcmul_(g, g, value=1 - config.beta2)
    rate, keep = own_rate(param, s)
    if param.decay:
        p.mul_(keep)
    p.addcdiv_(m, v.sqrt().mul_(s[1]).add_(config.eps), value=-rate)


def orthogonalize(g: Array) -> Array:
    """About U V^T of g = U S V^T: five Newton-Schulz steps in float32 (Jordan et al. 2024, Muon)."""
    if g.ndim == 3:  # a stack of them
        return torch.vmap(orthogonalize)(g)
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[0] > g.shape[1]
    x = g.T if tall else g
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def muon(p: Array, g: Array, m: Array, s: list[float], config: OptimConfig) -> None:
    """Muon, in place: Nesterov momentum, orthogonalized, scaled by sqrt(max(1, rows / columns)), decoupled decay."""
    m.lerp_(g, 1 - config.muon_momentum)
    u = orthogonalize(g + config.muon_momentum * (m - g))
    scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
    p.mul_(s[4]).sub_(u, alpha=s[3] * scale)
