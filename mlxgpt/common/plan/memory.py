"""Bytes: what a framework's footprint says of a training step, by component, and what fits into how much."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.model import adapters, params

COMPONENTS = ("weights", "moments", "gradients", "logits", "activations")


class Piece(NamedTuple):
    """Memory that was held at the peak: whose it is, where that is known, the array's shape, and bytes."""

    label: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Footprint:
    """The most bytes that a step holds at a time, and what they are."""

    peak: int
    pieces: list[Piece]


Measure = Callable[[Recipe, int, int, int], Footprint]
"""``footprint`` of a framework: recipe, rows and length of a micro-batch, number of micro-batches."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run. ``peak`` is what the framework holds at most; ``copy`` the writer's, on the host."""

    peak: int
    components: dict[str, int]
    copy: int

    @property
    def whole(self) -> int:
        """What a machine of one memory has to have."""
        return self.peak + self.copy


def micro_batch(recipe: Recipe) -> tuple[int, int]:
    """Rows of a micro-batch, and how many make a step."""
    rows = min(recipe.train.micro_batch_size or recipe.train.batch_size, recipe.train.batch_size)
    return rows, -(-recipe.train.batch_size // rows)


def length(recipe: Recipe) -> int:
    """Tokens of a row."""
    asked = recipe.tune.block_size if recipe.tune else 0
    limit = 2048 if recipe.tune else recipe.model.block_size
    return min(asked or limit, recipe.model.block_size)


def plan(recipe: Recipe, measure: Measure) -> Memory:
    """The memory of a recipe whose vocabulary is known, from the framework's ``footprint``."""
    rows, count = micro_batch(recipe)
    found = measure(recipe, rows, length(recipe), count)
    return Memory(found.peak, components(recipe, found), checkpoint_copy(recipe))


def components(recipe: Recipe, found: Footprint) -> dict[str, int]:
    """Component -> bytes at the peak; they add up to it. A tensor shaped like one that trains is a gradient."""
    trains = {param.shape for param in adapters.trainable(recipe).values()}
    trains |= {shape[::-1] for shape in trains}
    vocabulary, chunk = recipe.model.vocab_size, recipe.train.loss_chunk
    wide = {vocabulary, *((chunk, vocabulary % chunk) if 0 < chunk < vocabulary else ())}
    made: dict[str, int] = {name: 0 for name in COMPONENTS}
    for label, shape, size in found.pieces:
        if not label:
            core = tuple(n for n in shape if n > 1)
            label = "gradients" if core in trains else "logits" if shape and shape[-1] in wide else "activations"
        made[label] = made.get(label, 0) + size
    return made


def checkpoint_copy(recipe: Recipe) -> int:
    """The copy of what trains and its moments that a checkpoint is written from."""
    return 4 * sum(3 * elements(param.shape) for param in adapters.trainable(recipe).values())


def elements(shape: tuple[int, ...]) -> int:
    """Elements."""
    return prod(shape)


def per_layer(recipe: Recipe, measure: Measure, again: bool) -> int:
    """Bytes of activations that one more layer adds, kept or recomputed (``again``)."""
    train = dataclasses.replace(recipe.train, checkpoint_activations=again)
    made = []
    for layers in (6, 8):  # past the layers that MLX frees late
        model = dataclasses.replace(recipe.model, n_layer=layers, no_rope=(), window_layers=(), window=0)
        plain = dataclasses.replace(recipe, model=model, train=train, adapter=None, tune=None)
        rows, _ = micro_batch(recipe)
        made.append(components(plain, measure(plain, rows, length(recipe), 1))["activations"])
    return max(0, made[1] - made[0]) // 2


def kv_cache(model: ModelConfig, rows: int, tokens: int, itemsize: int) -> int:
    """Keys and values of ``rows`` texts of ``tokens`` tokens."""
    return 2 * model.n_layer * model.n_kv_head * model.head_dim * rows * tokens * itemsize


def at_most(recipe: Recipe) -> int:
    """More than a step can hold, without looking: a bound that is quick, for runs that are far from any limit.

    Of weights five copies (gradients and what replaces weights and moments included), of each block 48 arrays of its
    width, 24 of its MLP's and 16 of its attention's, all scores eight times, the logits eight times, in float32.
    """
    model, tokens = recipe.model, micro_batch(recipe)[0] * length(recipe)
    attention = (model.n_head + 2 * model.n_kv_head) * model.head_dim
    block = tokens * (48 * model.n_embd + 24 * model.n_hidden + 16 * attention + 8 * model.n_head * length(recipe))
    words = tokens * 8 * model.vocab_size + tokens * 16 * model.n_embd
    return 4 * (7 * params.count(model) + model.n_layer * block + words) + checkpoint_copy(recipe)


def largest_rows(recipe: Recipe, measure: Measure, limit: int, most: int = 4096) -> int:
    """Rows of the largest micro-batch whose step stays within ``limit`` bytes; 0 if not even one row does.

    Bytes grow by the same amount a row, so two footprints say where the limit is reached; a third one proves it.
    """

    def bytes_of(rows: int) -> int:
        train = dataclasses.replace(recipe.train, micro_batch_size=rows, batch_size=rows)
        return plan(dataclasses.replace(recipe, train=train), measure).whole

    one, four = bytes_of(1), bytes_of(4)
    if one > limit:
        return 0
    slope = max((four - one) / 3, 1.0)
    rows = min(most, max(1, int(1 + (limit - one) / slope)))
    while rows > 1 and bytes_of(rows) > limit:
        rows = max(1, int(rows * 0.95))
    return rows


def longest(recipe: Recipe, measure: Measure, limit: int, most: int = 2**20) -> int:
    """The longest row, in tokens, whose step stays within ``limit`` bytes with the micro-batch as it is; 0: none.

    Bytes are a square of the length (attention scores); three footprints say which, and more prove it.
    """
    rows, count = micro_batch(recipe)

    def bytes_of(tokens: int) -> int:
        model = dataclasses.replace(recipe.model, block_size=max(tokens, recipe.model.block_size))
        changed = dataclasses.replace(recipe, model=model)
        return measure(changed, rows, tokens, count).peak + checkpoint_copy(changed)

    one, two, four = (bytes_of(tokens) for tokens in (128, 256, 512))
    square = max((four - 3 * two + 2 * one) / (6 * 128**2), 0.0)
    slope = max((two - one) / 128 - 3 * 128 * square, 1.0)
    left = limit - (one - 128 * slope - 128**2 * square)
    root = (slope * slope + 4 * square * left) ** 0.5 if left > 0 else 0.0
    tokens = min(most, int(2 * left / (slope + root)) if left > 0 else 0)
    while tokens >= 16 and bytes_of(tokens) > limit:
        tokens = int(tokens * 0.95)
    return tokens if tokens >= 16 else 0


def fitting(recipe: Recipe, measure: Measure, limit: int) -> dict[str, object] | None:
    """Settings of ``[train]`` with which the recipe stays within ``limit``: a smaller micro-batch, then less kept."""
    rows, _ = micro_batch(recipe)
    for more in ({}, {"checkpoint_activations": True}):
        if more and recipe.train.checkpoint_activations:
            continue
        some = rows
        while some:
            settings: dict[str, object] = {**more, **({"micro_batch_size": some} if some != rows else {})}
            train = dataclasses.replace(recipe.train, **settings)
            changed = dataclasses.replace(recipe, train=train)
            if settings and plan(changed, measure).whole <= limit:
                return settings
            some //= 2
    return None
