"""What becomes of a base's matrices before training or inference: quantized, left so, or dequantized once."""

from collections.abc import Callable, Mapping

import numpy as np

from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import adapters, params
from mlxgpt.common.model.affine import Quantized

Room = Callable[[], int]
WORKING = (2, 4, 8)  # bits that both frameworks compute with; others are dequantized in any case
_SHARE = 0.5  # of the memory that is free, what dequantized matrices may take


def prepare(
    recipe: Recipe, weights: Mapping[str, np.ndarray | Quantized], room: Room | None
) -> tuple[dict[str, np.ndarray | Quantized], str]:
    """The base's tensors among ``weights`` as training is to have them, and a line that says what was done or ''.

    ``room`` as ``widen`` has it.

    Raises:
        UserError: what is to train is quantized.
    """
    base = {name: weights[name] for name in params.table(recipe.model)}
    for name in adapters.trainable(recipe):
        if isinstance(base.get(name), Quantized):
            raise UserError(f"{name} is quantized, so it cannot train: expected an adapter, or a base in float32")
    return widen(quantize(recipe, base), room, recipe.adapter.dequantize if recipe.adapter else "auto")


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
    weights: Mapping[str, np.ndarray | Quantized], room: Room | None, choice: str = "auto"
) -> tuple[dict[str, np.ndarray | Quantized], str]:
    """``weights``, dequantized once where a CPU computes and memory allows, and a line that says what was done or ''.

    Args:
        weights: the base's tensors by name.
        room: says how many bytes can be had where a CPU computes; None: another device does.
        choice: adapter.dequantize, auto or never.
    """
    found = {name: each for name, each in weights.items() if isinstance(each, Quantized)}
    made = dict(weights)
    for name, each in found.items():
        if each.bits not in WORKING:
            made[name] = each.dequantize()
    rest = [name for name in found if isinstance(made[name], Quantized)]
    if not rest:
        return made, ""
    what = f"{len(rest)} quantized matrices"
    if room is None or choice == "never":
        return made, f"{what} stay quantized"
    size, free = 4 * sum(int(np.prod(found[name].shape)) for name in rest), room()
    if size > _SHARE * free:
        return made, f"{what} stay quantized: {size / 2**20:,.0f} MiB in float32, {free / 2**20:,.0f} free"
    for name in rest:
        made[name] = found[name].dequantize()
    return made, f"{what} dequantized once, {size / 2**20:,.0f} MiB: a CPU computes faster so"


def environment(base: Mapping[str, np.ndarray | Quantized], note: str) -> dict[str, str]:
    """The part of the environment key that ``prepare`` decides: how a quantized base's products are rounded.

    ``note``: the line of ``prepare``; empty where nothing was quantized, and then there is no part.
    """
    if not note:
        return {}
    return {"base": "quantized" if any(isinstance(each, Quantized) for each in base.values()) else "dequantized"}
