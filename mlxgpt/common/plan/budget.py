"""From a budget to a model: the compute-optimal size and number of tokens (Hoffmann et al. 2022, Chinchilla).

L(N, D) = E + A / N^a + B / D^b, minimized under C = FLOPs. The constants are those of Besiroglu et al. 2024, who
refitted the third approach of Hoffmann et al. and found its published constants inconsistent; both give the range.
They come from models of 44 M to 16 B parameters on web text: far below, and on other text, they extrapolate.
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

from mlxgpt.common.config import ModelConfig, Recipe, TrainConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params
from mlxgpt.common.plan import chips
from mlxgpt.common.plan import compute as plan_compute
from mlxgpt.common.plan import memory as plan_memory
from mlxgpt.common.plan.chips import Chip
from mlxgpt.common.plan.memory import Measure
from mlxgpt.common.recipes import build, to_toml


class Law(NamedTuple):
    """Constants of L(N, D)."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, size: float, tokens: float) -> float:
        """Nats per token, on web text in Chinchilla's vocabulary."""
        return self.e + self.a / size**self.alpha + self.b / tokens**self.beta

    def best(self, compute: float) -> tuple[float, float]:
        """Parameters and tokens for C = 6 N D."""
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        size = g * (compute / 6) ** (self.beta / (self.alpha + self.beta))
        return size, compute / 6 / size


BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # arXiv 2404.10102
HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # arXiv 2203.15556, approach 3
_SHAPES = tuple((layers, width) for layers in (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40)
                for width in (128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096)
                if 24 <= width / layers <= 128)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a budget buys. ``range`` is (parameters, tokens) by each law, before rounding to a real model."""

    recipe: Recipe
    compute: float
    size: int
    tokens: int
    range: tuple[tuple[float, float], tuple[float, float]]
    loss: tuple[float, float]
    note: str


def money(text: str) -> tuple[float, str]:
    """``100 USD`` -> (100.0, "USD").

    Raises:
        UserError: not a positive amount.
    """
    found = re.fullmatch(r"\s*([A-Za-z$€£]*)\s*(\d+(?:\.\d+)?)\s*([A-Za-z$€£]*)\s*", text)
    if not found or not float(found[2]):
        raise UserError(f"--budget {text}: expected an amount of money, such as '100 USD'")
    return float(found[2]), found[1] or found[3] or "USD"


def choose(base: Recipe, compute: float | None, limit: int, measure: Measure) -> Choice:
    """The compute-optimal model of ``base``'s family and vocabulary for ``compute`` FLOPs, within ``limit`` bytes.

    Without ``compute``: the largest model that fits in memory, trained on 20 tokens per parameter.

    Raises:
        UserError: not even the smallest model fits.
    """
    models = sorted((_model(base, *shape) for shape in _SHAPES), key=params.count)
    smallest = _need(base, models[0], measure)
    if smallest > limit:
        raise UserError(
            f"{limit / 1e9:.2f} GB: too small for any model: the smallest, of {params.count(models[0]) / 1e6:.1f} M "
            f"parameters, needs {smallest / 1e9:.2f} GB with one row of {models[0].block_size} tokens"
        )
    wanted = BESIROGLU.best(compute)[0] if compute else float("inf")
    place = (
        min(range(len(models)), key=lambda n: abs(params.count(models[n]) / wanted - 1)) if compute else len(models) - 1
    )
    note = ""
    if compute and not 0.7 < params.count(models[place]) / wanted < 1.4:
        note = f"the sizes tried end at {params.count(models[place]) / 1e6:.1f} M parameters"
    first = place
    low, high = 0, place
    if _need(base, models[place], measure) > limit:  # find the largest that fits: memory grows with the size
        while low < high - 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _need(base, models[middle], measure) <= limit else (low, middle)
        place = low
    if place != first and compute:
        note = f"memory, not compute, sets the size: {params.count(models[first]) / 1e6:.1f} M parameters would be best"
    model = models[place]
    size = params.count(model)
    recipe = dataclasses.replace(base, model=model)
    each = plan_compute.flops(recipe, model.block_size, base.train.batch_size).exact
    tokens = compute / each if compute else 20.0 * size
    rows = plan_memory.largest_rows(recipe, measure, limit, base.train.batch_size)
    steps = max(1, round(tokens / (base.train.batch_size * model.block_size)))
    warmup = min(base.optim.warmup, max(0, steps // 10))
    train = dataclasses.replace(base.train, steps=steps, micro_batch_size=0 if rows >= base.train.batch_size else rows)
    # largest_rows knows a single micro-batch; several hold their summed gradients besides
    while train.micro_batch_size > 1 and _whole(recipe, train, measure) > limit:
        train = dataclasses.replace(train, micro_batch_size=train.micro_batch_size - 1)
    # the best rate falls with the width: 1e-3 at 384, as in the shipped recipes
    lr = float(f"{min(1e-3, 1e-3 * (384 / model.n_embd) ** 0.5):.1e}")
    optim = dataclasses.replace(base.optim, lr=lr, min_lr=lr / 10, warmup=warmup)
    recipe = dataclasses.replace(recipe, train=train, optim=optim)
    done = plan_compute.tokens(recipe, model.block_size)
    spent = compute or each * done
    laws = BESIROGLU.best(spent), HOFFMANN.best(spent)
    losses = BESIROGLU.loss(size, done), HOFFMANN.loss(size, done)
    return Choice(recipe, spent, size, done, laws, losses, note)


def write(path: Path, recipe: Recipe) -> None:
    """Writes the recipe; the tokenizer will set the vocabulary size.

    Raises:
        UserError: the file cannot be written.
    """
    text = to_toml(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=0)))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}") from None


def _model(base: Recipe, layers: int, width: int) -> ModelConfig:
    """A model of the family of ``base`` with heads of 64."""
    sections = {"family": base.model.family, "n_layer": layers, "n_embd": width, "n_head": width // 64,
                "block_size": base.model.block_size, "vocab_size": base.model.vocab_size}  # fmt: skip
    return build({"model": sections}, "--budget").model


def _need(base: Recipe, model: ModelConfig, measure: Measure) -> int:
    """Bytes with a micro-batch of one row."""
    train = dataclasses.replace(base.train, micro_batch_size=1, batch_size=min(2, base.train.batch_size))
    return _whole(dataclasses.replace(base, model=model), train, measure)


def _whole(recipe: Recipe, train: TrainConfig, measure: Measure) -> int:
    """Bytes that ``recipe`` needs with these settings."""
    return plan_memory.plan(dataclasses.replace(recipe, train=train), measure).whole


def compute_of(hours: float, chip: Chip, dtype: str) -> float:
    """FLOPs in ``hours`` at the assumed utilization."""
    return hours * 3600 * chip.flops(dtype) * chip.utilization


def default_chip(device: str) -> Chip:
    """This machine's chip.

    Raises:
        UserError: it is not in the table.
    """
    found = chips.chip_of(device)
    if found is None:
        raise UserError(
            f"--chip: this machine's {device} is not in the table: expected one of {', '.join(chips.CHIPS)}"
        )
    return found
