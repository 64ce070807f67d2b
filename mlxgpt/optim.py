"""Update rules as functions of one tensor. Rates and bias corrections are computed on the host, in Python floats."""

from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt.common.config import OptimConfig
from mlxgpt.common.model.params import Param
from mlxgpt.layers import Array


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


NOTHING = (0.0, 1.0, 1.0, 0.0, 1.0)
"""What scalars() would list for an update that leaves p as it is."""


def adamw(
    p: Array, g: Array, m: Array, v: Array, s: Array, finite: Array, param: Param, config: OptimConfig
) -> tuple[Array, Array, Array]:
    """AdamW (Loshchilov and Hutter 2019): p (1 - lr wd) - lr m^ / (sqrt(v^) + eps), m, v; ``s`` from scalars().

    Unless ``finite``, m and v stay, and with NOTHING for s so does p. Three kernels, each of which writes where it
    reads: MLX never gives a kernel of several outputs the memory of its inputs.
    """
    m = mx.where(finite, m + (1 - config.beta1) * (g - m), m)
    v = mx.where(finite, config.beta2 * v + (1 - config.beta2) * g * g, v)
    first, second = mx.depends([m, v], [g])
    rate, keep = own_rate(param, s)
    p = p * keep if param.decay else p
    return p - rate * first / (mx.sqrt(second) * s[1] + config.eps), m, v


def orthogonalize(g: Array) -> Array:
    """About U V^T of g = U S V^T: five Newton-Schulz steps in float32 (Jordan et al. 2024, Muon)."""
    if g.ndim == 3:  # a stack of them
        return mx.vmap(orthogonalize)(g)
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[0] > g.shape[1]
    x = g.T if tall else g
    x = x / (mx.sqrt(mx.square(x).sum()) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def muon(p: Array, g: Array, m: Array, s: Array, finite: Array, config: OptimConfig) -> tuple[Array, Array]:
    """Muon: Nesterov momentum, orthogonalized, scaled by sqrt(max(1, rows / columns)), decoupled decay; p, m."""
    m_new = m + (1 - config.muon_momentum) * (g - m)
    u = orthogonalize(g + config.muon_momentum * (m_new - g))
    scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
    return mx.where(finite, p * s[4] - s[3] * scale * u, p), mx.where(finite, m_new, m)
