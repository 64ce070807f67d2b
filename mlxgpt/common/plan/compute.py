"""FLOPs, tokens and time of a run."""

from dataclasses import dataclass

from mlxgpt.common.config import Recipe
from mlxgpt.common.model import adapters, params
from mlxgpt.common.plan import chips
from mlxgpt.common.plan.chips import Chip

_LOOKED_UP = ("wte.weight", "wpe.weight")


@dataclass(frozen=True)
class Flops:
    """FLOPs of one training token: by the rule of thumb, and counted."""

    rule: float
    exact: float


def flops(recipe: Recipe, length: int, rows: int) -> Flops:
    """FLOPs of a token in rows of ``length``, ``rows`` (or pairs of rows) per step.

    rule: 6 N + 12 L H D T (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B). exact: every matrix product
    once forward, once for what it reads and once for its weight if that trains; attention over the positions that a
    token may see; blocks once more where activations are recomputed; the optimizer's share.
    """
    model = recipe.model
    trains = adapters.trainable(recipe)
    sizes = {name: param.shape[0] * param.shape[1] for name, param in params.table(model).items()
             if len(param.shape) == 2 and name not in _LOOKED_UP}  # fmt: skip
    if model.tied:
        sizes["wte.weight"] = model.vocab_size * model.n_embd
    blocks = sum(size for name, size in sizes.items() if name.startswith("h."))
    added = {name: param.shape[0] * param.shape[1] for name, param in trains.items()
             if name.endswith((".lora_a", ".lora_b"))}  # fmt: skip
    forward = 2.0 * (sum(sizes.values()) + sum(added.values()))
    weights = 2.0 * (sum(size for name, size in sizes.items() if name in trains) + sum(added.values()))
    seen = sum(_seen(length, model.window if n in model.window_layers else 0) for n in range(model.n_layer))
    attention = 4.0 * model.n_head * model.head_dim * seen  # q k^T and the weighted sum of v
    again = 2.0 * blocks + attention if recipe.train.checkpoint_activations else 0.0
    update = sum(_update_flops(name, param.shape, recipe) for name, param in trains.items()) / (
        rows * recipe.together * length
    )
    rule = chips.training_flops(model)
    return Flops(rule, 2 * forward + weights + 3 * attention + again + update)


def _seen(length: int, window: int) -> float:
    """Positions that a token attends to on average."""
    if not window or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def _update_flops(name: str, shape: tuple[int, ...], recipe: Recipe) -> float:
    """FLOPs of one update of a tensor: about 12 per element for AdamW; five Newton-Schulz steps for Muon."""
    if len(shape) == 2 and recipe.optim.name == "muon" and name.startswith("h."):
        short, long = sorted(shape)
        return 5.0 * (4 * short * short * long + 2 * short**3)
    size = 1
    for n in shape:
        size *= n
    return 12.0 * size


def tokens(recipe: Recipe, length: int) -> int:
    """Tokens of the whole schedule."""
    return recipe.train.steps * recipe.train.batch_size * recipe.together * length


def seconds(recipe: Recipe, length: int, chip: Chip) -> float:
    """Time of the whole schedule on a chip at its assumed utilization: the counted FLOPs, updates included."""
    each = flops(recipe, length, recipe.train.batch_size).exact
    return each * tokens(recipe, length) / (chip.flops(recipe.train.compute_dtype) * chip.utilization)
