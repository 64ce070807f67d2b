"""An update in which the host neither waits for the norm nor starts a kernel a tensor: what it takes is decided there.

The rules are those of optim.py, with other rounding: PyTorch's fused AdamW on the CPU and on CUDA, which does nothing
where it is told that a gradient is not finite, and Muon on stacks of matrices of one shape.
"""

from collections.abc import Iterable, Mapping

import torch

from mlxgpt.common.config import OptimConfig
from mlxgpt.common.model.params import Param
from torch_ref import optim
from torch_ref.layers import Array


def groups(table: Mapping[str, Param], muon: set[str]) -> list[list[str]]:
    """Names of the tensors that one call updates: AdamW's of one rate, Muon's of one shape."""
    found: dict[tuple, list[str]] = {}
    for name, param in table.items():
        key = ("muon", *param.shape) if name in muon else ("adamw", param.lr, param.decay)
        found.setdefault(key, []).append(name)
    return list(found.values())


def verdict(terms: Array, squares: Array, weight: float, clip: float) -> tuple[Array, Array]:
    """``shrink``, by which summed gradients are divided (mean, clipped), and ``skip``, 1 if a value is not finite."""
    norm = squares.double().sum().sqrt()
    skip = 1 - (norm.isfinite() & terms.isfinite().all()).float()
    excess = ((norm + 1e-6) / clip).clamp(min=1) if clip else torch.ones_like(norm)
    return (excess * weight).float(), skip


def adamw(
    tensors: Iterable[tuple[Array, Array, Array, Array]],
    lr: float,
    t: int,
    shrink: Array,
    skip: Array,
    param: Param,
    config: OptimConfig,
) -> None:
    """optim.adamw of (p, g / shrink, m, v) each, in place, if ``skip`` is 0; ``t`` counts from 1."""
    p, g, m, v = (list(group) for group in zip(*tensors, strict=True))
    decay, steps = config.weight_decay if param.decay else 0.0, [torch.full_like(skip, t)] * len(p)
    kernel = torch._fused_adamw_  # type: ignore[reportPrivateImportUsage]
    kernel(
        p, g, m, v, [], steps, lr=lr * param.lr, beta1=config.beta1, beta2=config.beta2, weight_decay=decay,
        eps=config.eps, amsgrad=False, maximize=False, grad_scale=shrink, found_inf=skip,
    )  # fmt: skip


def muon(
    tensors: list[tuple[Array, Array, Array]], shrink: Array, skip: Array, s: list[float], config: OptimConfig
) -> None:
    """optim.muon of matrices (p, g / shrink, m) of one shape, in place, if ``skip`` is 0; ``s`` from scalars()."""
    p, g, m = (torch.stack(group) for group in zip(*tensors, strict=True))
    optim.muon(p, g.div_(shrink), m, s, config)
    for (weight, _, moment), new_weight, new_moment in zip(tensors, p, m, strict=True):
        weight.copy_(torch.where(skip == 0, new_weight, weight))
        moment.copy_(torch.where(skip == 0, new_moment, moment))
