"""GPUs that compute wrongly, each in one way: what doctor's ladder must see, and in which rungs (test_doctor.py).

MLX's GPU is the Metal double; PyTorch's is a CPU that says that it is one. Each computes as the CPU does until one of
these is applied.
"""

import dataclasses
import importlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import pytest
import torch

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.doctor.measure import RUNGS

# isort: split
import mlx.core as mx

GPU = {"torch": False}  # whether PyTorch's double was chosen last
LIBRARY: dict[str, Any] = {"mlx": mx, "torch": torch}
Wrong = Callable[..., Any]
"""(framework, the real function, its arguments) -> what the broken GPU computes."""


class Mutation(NamedTuple):
    """``wrong`` replaces MODULE.NAME of either package on its GPU; ``rungs`` fail, and no others."""

    place: str
    wrong: Wrong
    rungs: Collection[str]


def on_gpu(framework: str) -> bool:
    """Whether what is computed now is computed on the framework's double."""
    return GPU["torch"] if framework == "torch" else mx.default_device() == mx.Device(mx.gpu)


def tf32(framework: str, x: Any) -> Any:
    """Rounded to ten bits of mantissa; the gradient passes as it is."""
    if "float32" not in str(x.dtype):
        return x
    if framework == "torch":
        bits = x.detach().contiguous().view(torch.int32)
        return x + (((bits + 0x1000) & ~0x1FFF).view(torch.float32) - x).detach()
    rounded = ((x.view(mx.uint32) + 0x1000) & mx.array(0xFFFFE000, mx.uint32)).view(mx.float32)
    return x + mx.stop_gradient(rounded - x)


def rounded_product(framework: str, real: Any, module: Any, x: Any, bias: Any = None) -> Any:
    y = tf32(framework, x) @ tf32(framework, module.weight.astype(x.dtype) if framework == "mlx" else
                                  module.weight.to(x.dtype)).T  # fmt: skip
    return y if bias is None else y + (bias.astype(x.dtype) if framework == "mlx" else bias.to(x.dtype))


def sees_the_next(framework: str, real: Any, model: Any, T: int, S: int, *rest: Any, **more: Any) -> Any:
    if T == 1:
        return real(model, T, S, *rest, **more)
    xp = LIBRARY[framework]
    return xp.arange(S)[None, :] <= xp.arange(S - T, S)[:, None] + 1


def bf16_sees_the_next(framework: str, real: Any, model: Any, *rest: Any, **more: Any) -> Any:
    wrong = "bfloat16" in str(model._dtype)
    return sees_the_next(framework, real, model, *rest, **more) if wrong else real(model, *rest, **more)


def shifted_cache(framework: str, real: Any, *args: Any) -> Any:
    keys, values = real(*args)
    return LIBRARY[framework].roll(keys, 1, 2), values


def unscaled(framework: str, real: Any, update: Any, *args: Any) -> Any:
    return real(dataclasses.replace(update, scale=1.0), *args)


def without_biases(framework: str, real: Any, matrix: Any) -> Any:
    words, scales, biases = real(matrix)
    return [words, scales, biases * 0]


def refused(framework: str, real: Any, matrix: Any) -> Any:
    raise RuntimeError("[METAL] Command buffer execution failed: /Users/jane.doe/Library/x, of jane.doe")


def no_correction(framework: str, real: Any, config: Any, lr: float, t: int) -> Any:
    return real(config, lr, t + 1000)


def other_masks(framework: str, real: Any, x: Any) -> Any:
    return real(x ^ 1)


def twice_the_gradient(framework: str, real: Any, module: Any, index: Any) -> Any:
    y = real(module, index)
    return 2 * y - (y.detach() if framework == "torch" else mx.stop_gradient(y))


def not_a_number(framework: str, real: Any, *args: Any) -> Any:
    return real(*args) * float("nan")


MUTATIONS = {
    "products in TF32": Mutation(
        "layers.Matrix.matmul", rounded_product, {"logits", "gradients", "cache", "lora"}),
    "every query sees the next token": Mutation("model.Model.mask", sees_the_next, set(RUNGS) - {"bf16"}),
    "in bfloat16 it does": Mutation("model.Model.mask", bf16_sees_the_next, {"bf16"}),
    "keys of the cache are off by one": Mutation("attention.Cache.append", shifted_cache, {"cache"}),
    "the scale of LoRA is dropped": Mutation("adapters.LowRankUpdate.linear", unscaled, {"lora", "quantized"}),
    "quantized without biases": Mutation("quant.parts", without_biases, {"quantized"}),
    "quantized is refused": Mutation("quant.parts", refused, {"quantized"}),
    "no bias correction": Mutation("optim.scalars", no_correction, {"training"}),
    "other dropout masks": Mutation("noise.mix", other_masks, {"training"}),
    "the embedding's gradient twice": Mutation("layers.Embedding.rows", twice_the_gradient, {"gradients", "training"}),
    "not a number": Mutation("layers.Norm.forward", not_a_number, RUNGS),
}  # fmt: skip


def apply(mutation: Mutation, framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks the framework's GPU; its CPU computes on as it did."""
    module, _, names = mutation.place.partition(".")
    owner: Any = importlib.import_module(f"{PACKAGES[framework]}.{module}")
    *path, name = names.split(".")
    for each in path:
        owner = getattr(owner, each)
    name = "__call__" if (name, framework) == ("forward", "mlx") else name
    real = getattr(owner, name)

    def call(*args: Any, **more: Any) -> Any:
        return mutation.wrong(framework, real, *args, **more) if on_gpu(framework) else real(*args, **more)

    monkeypatch.setattr(owner, name, call)
