"""The closed form of a step's memory: within 25% of what was measured, and sound in every direction it is asked in."""

import dataclasses

import pytest

from benchmarks import planning
from mlxgpt.common.config import Recipe
from mlxgpt.common.model import params
from mlxgpt.common.plan import closed
from mlxgpt.common.plan import memory as plan_memory
from mlxgpt.common.recipes import build

# MiB at the peak of benchmarks.planning's settings, measured on a CPU with MLX 0.32.4 and PyTorch 2.13:
# `python -m benchmarks.planning --closed` measures them anew
MEASURED = {
    "mlx": (
        *(74.4, 211.3, 171.2, 138.1, 86.8, 107.8, 186.5, 79.3, 89.5, 35.1, 90.5, 40.7, 119.2, 63.4, 81.1, 56.4, 56.6),
        *(45.5, 35.8, 48.7, 46.0, 69.8, 50.5, 46.7, 47.9, 48.3, 60.2, 47.8, 84.3, 48.2, 35.5, 101.4, 70.2, 91.4),
        *(39.2, 39.1, 53.5, 47.1),
    ),
    "torch": (
        *(35.5, 118.8, 103.6, 79.7, 59.1, 84.4, 137.4, 49.2, 47.3, 23.1, 53.9, 22.9, 98.7, 42.5, 61.4, 26.6, 43.4),
        *(35.8, 26.9, 38.6, 31.1, 55.4, 40.5, 32.1, 30.1, 37.0, 49.9, 25.0, 61.1, 32.7, 30.9, 60.9, 50.1, 80.6),
        *(25.4, 31.1, 33.6, 34.3),
    ),
}


def recipe_of(family: str, sizes: str, batch: int = 4, **more: dict) -> Recipe:
    return planning.recipe_of(planning._s(family, sizes, batch, **more))  # type: ignore[arg-type]


def peak(recipe: Recipe, backend: str = "mlx", gpu: bool = False, length: int = 0) -> int:
    rows, count = plan_memory.micro_batch(recipe)
    return closed.footprint(recipe, rows, length or recipe.model.block_size, count, backend, gpu).peak


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_closed_form_is_within_a_quarter_of_what_was_measured(backend: str) -> None:
    low, high = planning.CLOSED
    for setting, measured in zip(planning.SETTINGS, MEASURED[backend], strict=True):
        ratio = planning.closed_form(backend, planning.recipe_of(setting)) / 2**20 / measured
        assert low <= ratio <= high, (planning.describe(setting), ratio)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_components_are_the_planners_and_sum_to_the_peak(backend: str, gpu: bool) -> None:
    for setting in planning.SETTINGS:
        recipe = planning.recipe_of(setting)
        rows, count = plan_memory.micro_batch(recipe)
        found = closed.footprint(recipe, rows, recipe.model.block_size, count, backend, gpu)
        assert sum(piece.size for piece in found.pieces) == found.peak
        assert {piece.label for piece in found.pieces} <= set(plan_memory.COMPONENTS)
        assert sum(plan_memory.components(recipe, found).values()) == found.peak


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_more_of_anything_never_takes_less(backend: str, gpu: bool) -> None:
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 3000}
    for family in ("gpt2", "llama"):
        whole = build({"model": {"family": family, **sizes}, "train": {"batch_size": 4}}, "test")
        for name in sizes:
            more = build({"model": {"family": family, **sizes, name: 2 * sizes[name]}, "train": {"batch_size": 4}}, "")
            assert peak(more, backend, gpu) >= peak(whole, backend, gpu), (family, name)
        rows = dataclasses.replace(whole, train=dataclasses.replace(whole.train, batch_size=8))
        assert peak(rows, backend, gpu) > peak(whole, backend, gpu)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_what_is_there_to_save_memory_saves_it(backend: str, gpu: bool) -> None:
    sizes = "8 4 4 256 512 3000"
    whole = recipe_of("llama", sizes, 4)
    assert peak(recipe_of("llama", sizes, 4, train={"checkpoint_activations": True}), backend, gpu) < peak(
        whole, backend, gpu
    )
    assert peak(recipe_of("llama", sizes, 4, train={"micro_batch_size": 1}), backend, gpu) < peak(whole, backend, gpu)
    lora = recipe_of("llama", sizes, 4, adapter={"method": "lora"})
    kept = recipe_of("llama", sizes, 4, adapter={"method": "lora", "bits": 4, "dequantize": "never"})
    assert peak(kept, backend, gpu) < peak(lora, backend, gpu) < peak(whole, backend, gpu)
    last = recipe_of("llama", sizes, 4, adapter={"method": "lora", "layers": 2})
    assert peak(last, backend, gpu) < peak(lora, backend, gpu)
    muon = recipe_of("llama", sizes, 4, optim={"name": "muon"})
    assert peak(muon, backend, gpu) < peak(whole, backend, gpu)


def test_the_largest_terms_are_what_they_are_counted_to_be() -> None:
    """Weights and two moments of GPT-2, by hand; scores of a row of 1024 where MLX on a GPU keeps them whole or not."""
    recipe = recipe_of("gpt2", "12 12 12 768 1024 50257", 1)
    found = closed.footprint(recipe, 1, 1024, 1, "mlx", True)
    held = {piece.label: piece.size for piece in found.pieces}
    assert held["weights"] == 4 * params.count(recipe.model) == 4 * 124_439_808
    assert held["moments"] == 2 * held["weights"]
    scores = 12 * 1024 * 1024  # of a row and block; two rows of them are below 2^25, four are computed in tiles
    two, four = (closed.Sizes(recipe, rows, 1024, True, True, {}, frozenset()) for rows in (2, 4))
    assert closed.attention(two) == 4 * 2 * scores
    assert closed.attention(four) == 4 * 4 * 12 * 1024
    assert closed.attention(two._replace(mlx=False)) == 4 * 2 * 12 * 1024  # PyTorch's kernels keep none


def test_its_thresholds_are_those_of_the_code() -> None:
    from mlxgpt import fast

    assert (closed.SCORES, closed.MANY) == (fast.SCORES, fast.MANY)
