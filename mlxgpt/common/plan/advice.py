"""Settings with which a run that ran out of memory goes on."""

from functools import partial
from typing import Any

from mlxgpt.common.config import Recipe
from mlxgpt.common.plan import closed
from mlxgpt.common.plan import memory as plan_memory

SHARE = 0.9  # of the memory predicted for the settings that did not fit


def smaller(recipe: Recipe, backend: str, gpu: bool, limit: int) -> tuple[dict[str, Any], int]:
    """Settings of ``[train]`` for less memory, and the bytes predicted for them; 0 where that is above ``limit``.

    By the closed form, which needs no device: a framework that has just run out of memory cannot measure. The
    settings are empty where rows are computed one by one and activations are recomputed already.
    """
    measure = partial(closed.footprint, backend=backend, gpu=gpu)
    most = min(limit, int(SHARE * plan_memory.plan(recipe, measure).whole))
    if fits := plan_memory.fitting(recipe, measure, most):
        return fits, plan_memory.plan(plan_memory.changed(recipe, fits), measure).whole
    rows, _ = plan_memory.micro_batch(recipe)
    least: dict[str, Any] = {} if rows == 1 else {"micro_batch_size": 1}
    if not recipe.train.checkpoint_activations:
        least["checkpoint_activations"] = True
    return least, 0


def as_flags(settings: dict[str, Any]) -> str:
    """``--set train.micro_batch_size=4``, and so on."""
    return " ".join(f"--set train.{key}={str(value).lower()}" for key, value in settings.items())
