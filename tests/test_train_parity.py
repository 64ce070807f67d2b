"""Rungs 4, 5 and 9 of the parity ladder: curves of 200 steps, runs that change the framework halfway, and float64."""

from pathlib import Path

import ladder
import numpy as np
import pytest


def check(figures: list[ladder.Figure]) -> None:
    print(*figures, sep="\n")
    for figure in figures:
        assert figure.agrees, figure


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rung_4_the_curves_are_one(family: str) -> None:
    ours, theirs = (
        ladder.curve(ladder.trained(package, ladder.training_recipe(family))) for package in ladder.PACKAGES
    )
    check(ladder.same_curve(family, ours, theirs))
    assert theirs[-1] < 0.7 * theirs[0], "nothing was learned, so nothing was compared"


def test_rungs_4_and_5_with_dropout_checkpointing_and_a_change_of_framework(tmp_path: Path) -> None:
    plain, saving = (ladder.training_recipe("gpt2", dropout=0.2, checkpoint_activations=on) for on in (False, True))
    whole, figures = ladder.crossing("gpt2, dropout 0.2", plain, tmp_path)
    check(figures)
    check(ladder.same_curve("gpt2, dropout 0.2", whole["mlxgpt"], whole["torch_ref"]))
    recomputed = ladder.curve(ladder.trained("mlxgpt", saving), last=60)
    check(ladder.same_curve("gpt2, activation checkpointing in MLX", recomputed, whole["torch_ref"][:60]))
    recomputed = ladder.curve(ladder.trained("torch_ref", saving), last=60)
    check(ladder.same_curve("gpt2, activation checkpointing in torch", whole["mlxgpt"][:60], recomputed))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_rung_9_mlx_is_as_close_to_float64_as_torch(family: str) -> None:
    check(ladder.distance(family, seeds=(1, 2, 3)))


def test_float64_is_float64() -> None:
    """The judge of rung 9 computes in double precision throughout: its loss is no float32 number."""
    engine = ladder.trained("torch_ref", ladder.training_recipe("gpt2"), exact=True)
    loss = ladder.curve(engine, last=2)
    assert engine.model.wte.weight.dtype == engine.m["wte.weight"].dtype == engine.model.dtype
    assert (loss != loss.astype(np.float32)).all()
