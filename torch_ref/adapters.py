"""Matrices that compute as W + scale B A, in PyTorch; common/model/adapters.py has the formulas and the tensors' names.

An adapted module of model.py keeps its weight and its names, and has the update's tensors beside it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mlxgpt.common.model import adapters
from mlxgpt.common.model.adapters import Target
from torch_ref import fast, noise
from torch_ref.layers import Array, Dropout, Embedding, Linear
from torch_ref.model import Model


@dataclass(frozen=True)
class LowRankUpdate:
    """How a module computes with the tensors of its update, which are its attributes."""

    scale: float
    site: int  # of Dropout.adapter_keys, its own
    squares: Array | None  # dora: the squared norms of the rows of W, which is frozen

    def linear(self, module: Linear, x: Array, drop: Dropout | None) -> Array:
        """W x + b + scale B A x; dora: g (W x + scale B A x) + b with g = magnitude / norm."""
        given, bias = self.dropped(x, drop), module.bias
        z = low_rank(given, module.lora_a, module.lora_b, self.scale)
        if hasattr(module, "start_a"):
            z = z - low_rank(x, module.start_a, module.start_b, self.scale)
        if self.squares is None:
            return module.matmul(x, bias) + z
        g = self.gain(module, module.lora_a, module.lora_b, *start(module)).to(x.dtype)
        # as PEFT has it: what dropout left is what the whole of dora's change reads
        y = g * (module.matmul(x) + z) if given is x else module.matmul(x) + (g - 1) * module.matmul(given) + g * z
        return y if bias is None else y + bias.to(x.dtype)

    def rows(self, module: Embedding, index: Array) -> Array:
        """Rows of W + scale A^T B^T; dora: at their magnitude. Nothing is dropped: ids are not."""
        y = module.rows(index)

        def changed(a: Array, b: Array) -> Array:
            return fast.linear(F.embedding(index, a.T), b) * self.scale

        y = y + changed(module.lora_a, module.lora_b).to(y.dtype)
        if hasattr(module, "start_a"):
            y = y - changed(module.start_a, module.start_b).to(y.dtype)
        if self.squares is None:
            return y
        norm = y.detach().to(torch.promote_types(y.dtype, torch.float32)).square().sum(dim=-1).sqrt()
        return (module.magnitude[index] / norm)[..., None].to(y.dtype) * y

    def head(self, module: Embedding, x: Array) -> Array:
        """x (W + scale A^T B^T)^T; dora: its rows at their magnitude."""
        turned = [each.T for each in (module.lora_b, module.lora_a, *start(module)[::-1])]
        y = module.matmul(x) + low_rank(x, turned[0], turned[1], self.scale)
        if turned[2:]:
            y = y - low_rank(x, turned[2], turned[3], self.scale)
        return y if self.squares is None else y * self.gain(module, *turned).to(x.dtype)

    def factors(self, module: Any, x: Array, drop: Dropout | None) -> tuple[Array, Array]:
        """u (..., r) and B (n_out, r) of what is added to x W^T, u B^T, where the module is a head."""
        if isinstance(module, Embedding):
            turned = [each.T for each in (module.lora_b, module.lora_a, *start(module)[::-1])]
        else:
            turned = [module.lora_a, module.lora_b, *start(module)]
        given = self.dropped(x, drop if isinstance(module, Linear) else None)
        u, b = fast.linear(given, turned[0].to(x.dtype)), turned[1]
        if turned[2:]:
            u, b = torch.cat([u, -fast.linear(x, turned[2].to(x.dtype))], dim=-1), torch.cat([b, turned[3]], dim=-1)
        return u * self.scale, b

    def dropped(self, x: Array, drop: Dropout | None) -> Array:
        """What the update reads of x."""
        if not (drop and drop.adapter_rate):
            return x
        return noise.dropout(x, drop.adapter_rate, drop.adapter_keys[self.site], drop.first_row)

    def gain(
        self,
        module: Linear | Embedding,
        a: Array,
        b: Array,
        start_a: Array | None = None,
        start_b: Array | None = None,
    ) -> Array:
        """magnitude / norms of the rows of the changed matrix; no gradient flows through the norms.

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T, so that nothing of the matrix's size is made.
        """
        assert self.squares is not None
        if start_a is not None and start_b is not None:
            a, b = torch.cat([a, start_a]), torch.cat([b, -start_b], dim=1)
        a, b = a.detach(), b.detach()
        cross = (b * module.matmul(a).T).sum(dim=-1)
        own = ((b @ (a @ a.T)) * b).sum(dim=-1)
        return module.magnitude / (self.squares + 2 * self.scale * cross + self.scale**2 * own).sqrt()


def low_rank(x: Array, a: Array, b: Array, scale: float) -> Array:
    """scale B A x, in x's dtype."""
    return fast.linear(fast.linear(x, a.to(x.dtype)) * scale, b.to(x.dtype))


def start(module: Any) -> tuple[Array, ...]:
    """What the update of a module started from, (A0, B0), where that is taken off."""
    return (module.start_a, module.start_b) if hasattr(module, "start_a") else ()


def adapt(model: Model, targets: Mapping[str, Target], params: Mapping[str, Any]) -> None:
    """Gives the modules at the targets their updates, of whose tensors ``params`` are the values; weights are set."""
    device = model.device
    for site, (path, target) in enumerate(targets.items()):
        module, squares = model.at(path), None
        for kind in adapters.KINDS:
            if f"{path}.{kind}" in params:
                setattr(
                    module, kind, nn.Parameter(torch.from_numpy(params[f"{path}.{kind}"]).to(device, copy=True), False)
                )
        if f"{path}.magnitude" in params:
            squares = module.matrix().detach().to(torch.float32).square().sum(dim=-1)
        module.adapter = LowRankUpdate(target.scale, site, squares)


def train_alone(model: Model, names: Iterable[str]) -> None:
    """Freezes all but the updates among the tensors ``names``; where they started from is frozen, too."""
    model.requires_grad_(False)
    for name in names:
        path, _, kind = name.rpartition(".")
        if not kind.startswith("start_"):
            getattr(model.at(path), kind).requires_grad_()
