"""What becomes of a base's matrices before training or inference: quantized, left so, or dequantized once."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import adapters, params
from mlxgpt.common.model.affine import Quantized

WORKING = (2, 4, 8)  # bits that both frameworks compute with; others are dequantized in any case
_SHARE = 0.5  # of the memory that is free, what dequantized matrices may take


def prepare(
    recipe: Recipe, weights: Mapping[str, np.ndarray | Quantized], cpu: bool
) -> tuple[dict[str, np.ndarray | Quantized], str]:
    """The base's tensors among ``weights`` as training is to have them, and a line that says what was done or ''.

    Raises:
        UserError: what is to train is quantized.
    """
    base = {name: weights[name] for name in params.table(recipe.model)}
    for name in adapters.trainable(recipe):
        if isinstance(base.get(name), Quantized):
            raise UserError(f"{name} is quantized, so it cannot train: expected an adapter, or a base in float32")
    return widen(quantize(recipe, base), cpu, recipe.adapter.dequantize if recipe.adapter else "auto")


def quantize(recipe: Recipe, weights: Mapping[str, np.ndarray | Quantized]) -> dict[str, np.ndarray | Quantized]:
    """``weights`` with the frozen matrices in adapter.bits, as mlx-lm does it: embedding and head too.

    What is quantized already stays; so does a matrix whose rows groups of adapter.group_size do not divide.
    """
    made, adapter = dict(weights), recipe.adapter
    if adapter is None or not adapter.bits:
        return made
    trains = adapters.trainable(recipe)
    for name, param in params.table(recipe.model).items():
        array = made[name]
        fits = param.adaptable and array.shape[1] % adapter.group_size == 0
        if fits and name not in trains and isinstance(array, np.ndarray):
            made[name] = Quantized.of(array, adapter.bits, adapter.group_size)
    return made


def widen(
    weights: Mapping[str, np.ndarray | Quantized], cpu: bool, choice: str = "auto"
) -> tuple[dict[str, np.ndarray | Quantized], str]:
    """``weights``, dequantized once where a CPU computes and memory allows, and a line that says what was done or ''.

    ``choice`` is adapter.dequantize: auto or never.
    """
    found = {name: each for name, each in weights.items() if isinstance(each, Quantized)}
    made = dict(weights)
    for name, each in found.items():
        if each.bits not in WORKING:
            made[name] = each.dequantize()
    rest = [name for name in found if isinstance(made[name], Quantized)]
    if not rest:
        return made, ""
    size, free = 4 * sum(int(np.prod(found[name].shape)) for name in rest), available()
    what = f"{len(rest)} quantized matrices"
    if not cpu or choice == "never" or size > _SHARE * free:
        why = "" if choice == "never" or not cpu else f": {size / 2**20:,.0f} MiB in float32, {free / 2**20:,.0f} free"
        return made, f"{what} stay quantized{why}"
    for name in rest:
        made[name] = found[name].dequantize()
    return made, f"{what} dequantized once, {size / 2**20:,.0f} MiB: a CPU computes faster so"


def available() -> int:
    """Bytes of memory that can be had now without swapping; where the system does not say, half of all."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
