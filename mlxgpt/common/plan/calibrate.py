"""Times a few steps of a run on this machine to estimate its duration."""

import contextlib
import statistics
import sys
import time
from typing import Any, NamedTuple

from mlxgpt.common.backend import Backend
from mlxgpt.common.config import Recipe
from mlxgpt.common.data import token_source
from mlxgpt.common.model import params

STEPS, SECONDS = 8, 10.0  # steps timed after the first two, and the time limit


class Timing(NamedTuple):
    """Seconds of the first step (with compilation), of a later one and of a validation; tokens per second."""

    first: float
    step: float
    validation: float
    rate: float

    def run(self, recipe: Recipe) -> float:
        """Seconds of the whole schedule, validations included, without samples."""
        train = recipe.train
        times = -(-train.steps // train.eval_every) if train.eval_every else 0
        return self.first + (train.steps - 1) * self.step + times * self.validation


def time_steps(recipe: Recipe, source: Any, backend: Backend, device: str) -> Timing:
    """Trains a fresh model for a few steps on the recipe's data and validates it; nothing is saved."""
    engine = backend.engine.Engine(recipe, params.init_params(recipe.model, recipe.train.seed), device=device)
    rows, spent, began = recipe.train.micro_batch_size, [], time.perf_counter()
    while len(spent) < STEPS + 2 and (len(spent) < 4 or time.perf_counter() - began < SECONDS):
        start = time.perf_counter()
        step = len(spent) + 1
        engine.train_step(step, source.batch(step).split(rows), recipe.optim.lr * 1e-3)
        spent.append(time.perf_counter() - start)
    each = statistics.median(spent[2:])
    batches = list(source.validation()) if recipe.train.eval_every else []
    if batches:
        engine.evaluate(batches[0].split(rows)[0])
        start, some = time.perf_counter(), batches[:2]
        for batch in some:
            for part in batch.split(rows):
                engine.evaluate(part)
        validation = (time.perf_counter() - start) / len(some) * len(batches)
    else:
        validation = 0.0
    tokens = recipe.train.batch_size * recipe.model.block_size
    return Timing(spent[0], each, validation, tokens / each)


def open_data(recipe: Recipe) -> Any:
    """The source of the recipe's batches; messages go to stderr, since stdout is for --json."""
    with contextlib.redirect_stdout(sys.stderr):
        return token_source.open_data(recipe.data, recipe.model.block_size, recipe.train)
