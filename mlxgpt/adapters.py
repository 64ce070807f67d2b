"""Matrices that compute as W + scale B A, in MLX; common/model/adapters.py has the formulas and the tensors' names.

An adapted module of model.py keeps its weight and its names, and has the update's tensors beside it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt import noise
from mlxgpt.common.model import adapters
from mlxgpt.common.model.adapters import Target
from mlxgpt.layers import Array, Dropout, Embedding, Linear, gather
from mlxgpt.model import Model


@dataclass(frozen=True)
class LowRankUpdate:
    """How a module computes with the tensors of its update, which are its attributes."""

    scale: float
    site: int  # of Dropout.adapter_keys, its own
    squares: Array | None  # dora: the squared norms of the rows of W, which is frozen

    def linear(self, module: Linear, x: Array, drop: Dropout | None) -> Array:
        """W x + b + scale B A x; dora: g (W x + scale B A x) + b with g = magnitude / norm."""
        given, bias = self.dropped(x, drop), module.bias if "bias" in module else None
        z = low_rank(given, module.lora_a, module.lora_b, self.scale)
        if "start_a" in module:
            z = z - low_rank(x, module.start_a, module.start_b, self.scale)
        if self.squares is None:
            return module.matmul(x, bias) + z
        g = self.gain(module, module.lora_a, module.lora_b, *start(module)).astype(x.dtype)
        # as PEFT has it: what dropout left is what the whole of dora's change reads
        y = g * (module.matmul(x) + z) if given is x else module.matmul(x) + (g - 1) * module.matmul(given) + g * z
        return y if bias is None else y + bias.astype(x.dtype)

    def rows(self, module: Embedding, index: Array) -> Array:
        """Rows of W + scale A^T B^T; dora: at their magnitude. Nothing is dropped: ids are not."""
        y = module.rows(index)

        def changed(a: Array, b: Array) -> Array:
            rows: Any = gather(a.T, index) if module._deterministic else a.T[index]
            return (rows @ b.T) * self.scale

        y = y + changed(module.lora_a, module.lora_b).astype(y.dtype)
        if "start_a" in module:
            y = y - changed(module.start_a, module.start_b).astype(y.dtype)
        if self.squares is None:
            return y
        norm = mx.stop_gradient(mx.sqrt(mx.square(y.astype(mx.float32)).sum(axis=-1)))
        magnitude: Any = gather(module.magnitude, index) if module._deterministic else module.magnitude[index]
        return (magnitude / norm)[..., None].astype(y.dtype) * y

    def head(self, module: Embedding, x: Array) -> Array:
        """x (W + scale A^T B^T)^T; dora: its rows at their magnitude."""
        turned = [each.T for each in (module.lora_b, module.lora_a, *start(module)[::-1])]
        y = module.matmul(x) + low_rank(x, turned[0], turned[1], self.scale)
        if turned[2:]:
            y = y - low_rank(x, turned[2], turned[3], self.scale)
        return y if self.squares is None else y * self.gain(module, *turned).astype(x.dtype)

    def factors(self, module: Any, x: Array, drop: Dropout | None) -> tuple[Array, Array]:
        """u (..., r) and B (n_out, r) of what is added to x W^T, u B^T, where the module is a head."""
        if isinstance(module, Embedding):
            turned = [each.T for each in (module.lora_b, module.lora_a, *start(module)[::-1])]
        else:
            turned = [module.lora_a, module.lora_b, *start(module)]
        u, b = self.dropped(x, drop if isinstance(module, Linear) else None) @ turned[0].astype(x.dtype).T, turned[1]
        if turned[2:]:
            u, b = (
                mx.concatenate([u, -(x @ turned[2].astype(x.dtype).T)], axis=-1),
                mx.concatenate([b, turned[3]], axis=-1),
            )
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
            a, b = mx.concatenate([a, start_a]), mx.concatenate([b, -start_b], axis=1)
        a, b = mx.stop_gradient(a), mx.stop_gradient(b)
        cross = (b * module.matmul(a).T).sum(axis=-1)
        own = ((b @ (a @ a.T)) * b).sum(axis=-1)
        return module.magnitude / mx.sqrt(self.squares + 2 * self.scale * cross + self.scale**2 * own)


def low_rank(x: Array, a: Array, b: Array, scale: float) -> Array:
    """scale B A x, in x's dtype; x (..., n_in) to (..., n_out).

    Where a gradient goes on through x, it waits for those of A and B: MLX would put them off to the end of the backward
    pass, and keep the cotangents of all layers until then.
    """

    @mx.custom_function
    def run(x: Array, a: Array, b: Array) -> tuple[Array, Array]:
        h = (x @ a.T) * scale
        return h @ b.T, h

    @run.vjp
    def run_vjp(
        primals: tuple[Array, Array, Array], cotangents: tuple[Array, ...], outputs: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        (x, a, b), c, h = primals, cotangents[0], outputs[1]
        back = (c @ b) * scale
        grad_a = back.reshape(-1, a.shape[0]).T @ x.reshape(-1, x.shape[-1])
        grad_b = c.reshape(-1, c.shape[-1]).T @ h.reshape(-1, h.shape[-1])
        return mx.depends([back @ a], [grad_a, grad_b])[0], grad_a, grad_b

    made: Any = run(x, a.astype(x.dtype), b.astype(x.dtype))
    return made[0]


def start(module: Any) -> tuple[Array, ...]:
    """What the update of a module started from, (A0, B0), where that is taken off."""
    return (module.start_a, module.start_b) if "start_a" in module else ()


def adapt(model: Model, targets: Mapping[str, Target], params: Mapping[str, Any]) -> None:
    """Gives the modules at the targets their updates, of whose tensors ``params`` are the values; weights are set."""
    for site, (path, target) in enumerate(targets.items()):
        module, squares = model.at(path), None
        for kind in adapters.KINDS:
            if f"{path}.{kind}" in params:
                setattr(module, kind, mx.array(params[f"{path}.{kind}"]))
        if f"{path}.magnitude" in params:
            squares = mx.square(module.matrix().astype(mx.float32)).sum(axis=-1)
            mx.eval(squares)
        module.adapter = LowRankUpdate(target.scale, site, squares)


def train_alone(model: Model, names: Iterable[str]) -> None:
    """Freezes all but the updates among the tensors ``names``; where they started from is frozen, too."""
    model.freeze()
    for name in names:
        path, _, kind = name.rpartition(".")
        if not kind.startswith("start_"):
            model.at(path).unfreeze(recurse=False, keys=kind)
