"""Memory of a training step, by component, from a framework's footprint; and the largest settings that fit."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from mlxgpt.common.config import Recipe
from mlxgpt.common.model import adapters, params

ROWS = 256  # of a micro-batch that is measured; more are extrapolated
SOME = 4  # rows of long rows: MLX on a CPU computes attention row by row, in so many more operations
COMPONENTS = ("weights", "moments", "gradients", "logits", "activations")


class Piece(NamedTuple):
    """Memory held at the peak: the component, if known, the array's shape, and bytes."""

    label: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of a step, and the arrays that they consist of."""

    peak: int
    pieces: list[Piece]


Measure = Callable[[Recipe, int, int, int], Footprint]
"""``footprint`` of a framework: recipe, rows and length of a micro-batch, number of micro-batches."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run. ``peak`` is the framework's; ``copy`` the checkpoint writer's, on the host."""

    peak: int
    components: dict[str, int]
    copy: int

    @property
    def whole(self) -> int:
        """The need of a machine with unified memory."""
        return self.peak + self.copy


def micro_batch(recipe: Recipe) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches per step."""
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
    """Component -> bytes at the peak; they sum to it. An array shaped like a trainable tensor counts as a gradient."""
    trains = {param.shape for param in adapters.trainable(recipe).values()}
    trains |= {shape[::-1] for shape in trains}
    vocabulary, tokens = recipe.model.vocab_size, micro_batch(recipe)[0] * recipe.together * length(recipe)
    chunks = {recipe.train.head_chunk(tokens, vocabulary, gpu) for gpu in (False, True)} - {0}
    wide = {vocabulary, *(n for chunk in chunks for n in (chunk, vocabulary % chunk) if n)}
    made: dict[str, int] = {name: 0 for name in COMPONENTS}
    for label, shape, size in found.pieces:
        if not label:
            core = tuple(n for n in shape if n > 1)
            label = "gradients" if core in trains else "logits" if shape and shape[-1] in wide else "activations"
        made[label] = made.get(label, 0) + size
    return made


def checkpoint_copy(recipe: Recipe) -> int:
    """Bytes of the copy of trainable weights and moments that a checkpoint is written from."""
    return 4 * sum(3 * elements(param.shape) for param in adapters.trainable(recipe).values())


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    return prod(shape)


def per_layer(recipe: Recipe, measure: Measure, again: bool) -> int:
    """Bytes of activations that one more layer adds, kept or recomputed (``again``)."""
    train = dataclasses.replace(recipe.train, checkpoint_activations=again)
    rows, tokens = micro_batch(recipe)[0] * recipe.together, length(recipe)
    more = max(1, -(-recipe.model.n_embd // (rows * tokens)))  # so many that weights do not hide activations
    made = []
    for layers in (4, 6):  # beyond the layers that MLX frees late
        model = dataclasses.replace(recipe.model, n_layer=layers, no_rope=(), window_layers=(), window=0)
        plain = dataclasses.replace(recipe, model=model, train=train, adapter=None, tune=None, prefer=None)
        found = components(plain, measure(plain, rows * more, tokens, 1))
        made.append(sum(found.values()) - found["weights"] - found["moments"])
    item = 2 if train.compute_dtype == "bfloat16" else 4
    least = rows * tokens * recipe.model.n_embd * item  # what goes in, which is kept in any case
    return max(least, (made[1] - made[0]) // (2 * more))


def at_most(recipe: Recipe) -> int:
    """An upper bound on the memory of a step that is quick to compute, for runs far from any limit.

    Seven copies of the weights (gradients and the new weights and moments included), for each block 48 arrays of its
    width, 24 of the MLP's and 16 of the attention's, eight copies of all scores and of the logits, in float32.
    """
    model, tokens = recipe.model, micro_batch(recipe)[0] * recipe.together * length(recipe)
    attention = (model.n_head + 2 * model.n_kv_head) * model.head_dim
    block = tokens * (48 * model.n_embd + 24 * model.n_hidden + 16 * attention + 8 * model.n_head * length(recipe))
    head = tokens * 8 * model.vocab_size + tokens * 16 * model.n_embd
    return 4 * (7 * params.count(model) + model.n_layer * block + head) + checkpoint_copy(recipe)


def largest_rows(recipe: Recipe, measure: Measure, limit: int, most: int = 4096) -> int:
    """Rows of the largest micro-batch whose step stays within ``limit`` bytes; 0 if not even one row does.

    Where those are fewer than the batch, a step takes several, which keep the gradients' sum besides.
    """
    rows = _rows_within(recipe, measure, limit, most)
    if rows >= recipe.train.batch_size or not rows:
        return rows
    sums = 4 * sum(elements(param.shape) for param in adapters.trainable(recipe).values())
    return min(rows, _rows_within(recipe, measure, limit - sums, most))


def _rows_within(recipe: Recipe, measure: Measure, limit: int, most: int) -> int:
    """Rows of the largest single micro-batch whose step stays within ``limit`` bytes; 0: none.

    Bytes are a maximum of lines, one for each moment of a step: where two footprints further, fourfold each, no other
    line begins, the last one is followed to the limit.
    """

    def bytes_of(rows: int) -> int:
        train = dataclasses.replace(recipe.train, micro_batch_size=rows, batch_size=rows)
        return plan(dataclasses.replace(recipe, train=train), measure).whole

    rows, found = 1, bytes_of(1)
    alone = found
    if found > limit:
        return 0
    slope = 0.0
    while rows < most:
        more = min(4 * rows, most)
        then = bytes_of(more)
        before, slope = slope, max((then - found) / (more - rows), 1.0)
        if then > limit:
            return min(int(rows + (limit - found) / slope), more - 1)
        rows, found = more, then
        if (slope < 1.1 * before and found > 1.5 * alone) or rows >= ROWS:
            break
    return min(most, int(rows + (limit - found) / slope)) if rows < most else most


def longest(recipe: Recipe, measure: Measure, limit: int, most: int = 2**20) -> int:
    """The longest row, in tokens, whose step stays within ``limit`` bytes with the micro-batch as it is; 0: none.

    Bytes are quadratic in the length at most (attention scores): three footprints give the polynomial, of some rows,
    since those of activations are as many times more as there are rows more.
    """
    rows, count = micro_batch(recipe)
    some = min(rows, SOME)

    def at(tokens: int) -> Recipe:
        model = dataclasses.replace(recipe.model, block_size=max(tokens, recipe.model.block_size))
        return dataclasses.replace(recipe, model=model)

    def state(tokens: int) -> int:
        """Weights and moments: learned positions grow with the length."""
        trains = sum(elements(param.shape) for param in adapters.trainable(at(tokens)).values())
        return 4 * params.count(at(tokens).model) + 8 * trains

    def bytes_of(tokens: int) -> int:
        return (measure(at(tokens), some, tokens, count).peak - state(tokens)) * rows // some

    first = 128
    while first * some < recipe.model.n_embd:  # so many that weights do not hide activations
        first *= 2
    one, two, four = (bytes_of(first * times) for times in (1, 2, 4))
    square = max((four - 3 * two + 2 * one) / (6 * first**2), 0.0)
    slope = max((two - one) / first - 3 * first * square, 1.0)
    rest = one - first * slope - first**2 * square
    own = length(recipe)
    there = measure(recipe, rows, own, count).peak - state(own)
    if own > 4 * first and there > 2 * (rest + slope * own + square * own**2):  # weights hid what grows
        square = (there - rest - slope * own) / own**2

    def fits(tokens: int) -> bool:
        grows = rest + slope * tokens + square * tokens**2
        return grows + state(tokens) + checkpoint_copy(at(tokens)) <= limit

    low, high = 0, most + 1
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low >= 16 else 0


def changed(recipe: Recipe, settings: dict[str, object]) -> Recipe:
    """The recipe with other settings of ``[train]``."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **settings))


def fitting(recipe: Recipe, measure: Measure, limit: int) -> dict[str, object] | None:
    """Settings of ``[train]`` that keep a step within ``limit``: a smaller micro-batch, then recomputed activations."""
    rows, _ = micro_batch(recipe)
    for more in ({}, {"checkpoint_activations": True}):
        if more and recipe.train.checkpoint_activations:
            continue
        some = rows
        while some:
            settings: dict[str, object] = {**more, **({"micro_batch_size": some} if some != rows else {})}
            if settings and plan(changed(recipe, settings), measure).whole <= limit:
                return settings
            some //= 2
    return None
