"""A smaller copy of a training step that needs the same memory, but for a factor.

Widths, row length, vocabulary, the vocabulary's chunks and whatever size the code chooses by are divided by one number,
the scale s; depth, rows, heads and micro-batches stay. Then weights (C^2), activations (T C), attention scores (T^2)
and logits (T V) all shrink by s^2, the graph of the step stays what it was, and so does which of its moments is the
peak: bytes of the step = s^2 times bytes of the copy. Its products take 1 / s^3 of the FLOPs. What does not follow are
vectors (biases, one number a token), which are over-counted by s.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mlxgpt.common.batch import Batch
from mlxgpt.common.config import AdapterConfig, Recipe
from mlxgpt.common.model import adapters, params, rotary
from mlxgpt.common.plan import closed, compute
from mlxgpt.common.plan.memory import Footprint
from mlxgpt.common.plan.worker import Job

STEPS = 2  # of a measurement: the first one compiles


def scales(recipe: Recipe) -> list[int]:
    """What this recipe's sizes can be divided by, 1 first: heads stay even, groups of a quantized base whole."""
    model = recipe.model
    least = 4 if model.rotary_dim else 2  # rope turns halves of heads, and one number is no row
    return [
        s for s in range(1, max(model.head_dim // least, 1) + 1) if not model.head_dim % s and _same_groups(recipe, s)
    ]


def _same_groups(recipe: Recipe, scale: int) -> bool:
    """Whether the copy quantizes the matrices that the recipe does."""
    adapter = recipe.adapter
    if not (adapter and adapter.bits) or scale == 1:
        return True
    copy = similar(recipe, 1, recipe.model.block_size, scale)[0]
    assert copy.adapter
    own, copied = params.table(recipe.model), params.table(copy.model)
    whole = [name for name, param in own.items() if param.adaptable and not param.shape[1] % adapter.group_size]
    return all(copied[name].shape[1] % copy.adapter.group_size == 0 for name in whole)


def similar(recipe: Recipe, rows: int, length: int, scale: int, gpu: bool = False) -> tuple[Recipe, int]:
    """The copy's recipe, and the tokens of its rows."""

    def part(size: int) -> int:
        return size and max(1, round(size / scale))

    if scale == 1:
        return recipe, length
    model, train = recipe.model, recipe.train
    width, tokens, chunk = (
        model.head_dim // scale,
        part(length),
        train.head_chunk(rows * recipe.together * length, model.vocab_size, gpu),
    )
    vocabulary = part(model.vocab_size)
    if chunk:
        chunk = part(chunk)
        vocabulary = max(vocabulary, chunk + 1)
    least = 4 if model.rope_scaling == "dynamic" else 2
    turned = model.rotary_dim and max(least, min(width // 2, round(model.rotary_dim / scale / 2)) * 2)
    sizes = dict(
        head_dim=width,
        n_embd=part(model.n_embd),
        n_hidden=part(model.n_hidden),
        block_size=max(tokens, part(model.block_size)),
        vocab_size=vocabulary,
        rotary_dim=turned,
        rope_original=max(2, part(model.rope_original)) if rotary.by_length(model) else model.rope_original,
        rope_short=model.rope_short[: turned // 2],
        rope_long=model.rope_long[: turned // 2],
        window=part(model.window),
        attn_scale=model.attn_scale or model.head_dim**-0.5,  # a constant in a kernel, which is compiled once
    )
    adapter = recipe.adapter and _thinner(recipe.adapter, scale)
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(model, **sizes),
        train=dataclasses.replace(train, loss_chunk=chunk),
        adapter=adapter,
    ), tokens


def _thinner(adapter: AdapterConfig, scale: int) -> AdapterConfig:
    """The adapter with a smaller rank, and of a quantized base the smallest groups."""
    if adapter.method == "full":
        return adapter
    group = 32 if adapter.bits else adapter.group_size
    ranks = tuple(
        f"{name}={max(1, int(rank) // scale)}" for name, _, rank in (r.rpartition("=") for r in adapter.ranks)
    )
    return dataclasses.replace(adapter, rank=max(1, adapter.rank // scale), ranks=ranks, group_size=group)


def flops(recipe: Recipe, rows: int, length: int, micro_batches: int) -> float:
    """FLOPs of one step."""
    whole = rows * micro_batches
    return compute.flops(recipe, length, whole).exact * whole * recipe.together * length


def smallest_scale(
    recipe: Recipe, rows: int, length: int, micro_batches: int, budget: float, gpu: bool = False
) -> int | None:
    """The scale nearest to 1 whose copy's measurement takes at most ``budget`` FLOPs; None: there is none."""
    for scale in scales(recipe):
        copy, tokens = similar(recipe, rows, length, scale, gpu)
        if STEPS * flops(copy, rows, tokens, micro_batches) <= budget:
            return scale
    return None


def state(recipe: Recipe, gpu: bool = False) -> dict[str, int]:
    """Bytes that a step finds and leaves: ``weights`` and ``moments``."""
    found = {piece.label: piece.size for piece in closed.footprint(recipe, 1, 1, gpu=gpu).pieces}
    return {name: found.get(name, 0) for name in ("weights", "moments")}


def grown(recipe: Recipe, job: Job, answer: dict[str, int], gpu: bool = False) -> int:
    """Peak bytes of ``recipe``'s step, from what was measured of its copy; weights and moments are known exactly."""
    true, copied = (sum(state(each, gpu).values()) for each in (recipe, job.recipe))
    return job.scale**2 * (answer["peak"] - copied) + true + answer["fixed"]


def batch(recipe: Recipe, rows: int, length: int) -> Batch:
    """Rows of random tokens, as the recipe's data would come: packed in fine-tuning, where packing is on.

    Where the recipe trains on pairs, ``rows`` counts them.
    """
    rows *= recipe.together
    tokens, targets = np.random.default_rng(0).integers(0, recipe.model.vocab_size, (2, rows, length)).astype(np.int32)
    targets = targets % len(recipe.model.labels) if recipe.model.labels else targets
    made = Batch(tokens, targets, np.ones((rows, length), np.float32))
    tune = recipe.tune
    if recipe.prefer:
        return _judged(recipe, made)
    if not (tune and tune.packing and tune.task == "lm"):
        return made
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
    return dataclasses.replace(made, positions=places, segments=np.ones((rows, length), np.int32))


def _judged(recipe: Recipe, made: Batch) -> Batch:
    """The batch as one of preferences, with all that any of their objectives reads."""
    zeros = np.zeros(len(made.tokens), np.float32)
    beside = {"reference": zeros, "margin": zeros, "good": zeros, "kl": zeros}
    prefer = recipe.prefer
    if prefer and (prefer.sft or prefer.loss == "orpo"):
        beside["nll"] = np.full_like(made.weights, 1 / made.weights.size)
    return dataclasses.replace(made, beside=beside, together=recipe.together, each=1 / recipe.together)


def tensors(recipe: Recipe) -> dict[str, np.ndarray]:
    """Weights that cost nothing to make: memory is a matter of shapes."""
    return {name: np.full(shape, 0.01, np.float32) for name, shape in adapters.shapes(recipe).items()}


def footprint(
    measure: Callable[[Job], dict[str, int]], recipe: Recipe, rows: int, length: int, count: int
) -> Footprint:
    """Of a copy that ``measure`` measures in this process and in a moment."""
    scale = smallest_scale(recipe, rows, length, min(count, 2), 4e9) or scales(recipe)[-1]
    copy, tokens = similar(recipe, rows, length, scale)
    job = Job(copy, rows, tokens, min(count, 2), scale, STEPS)
    return Footprint(grown(recipe, job, measure(job)), [])
