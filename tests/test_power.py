"""A parity suite that someone loosened fails here: each mutation of the torch side must be caught by its rungs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ladder
import numpy as np
import pytest
import torch
from compare import worst, worst_gradient
from models import CASES

import torch_ref.attention
import torch_ref.head
import torch_ref.layers
import torch_ref.losses
import torch_ref.model
import torch_ref.noise
import torch_ref.optim
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import families

Patch = Callable[[pytest.MonkeyPatch], None]


def caught(case: str, place: Path, scale: float) -> set[int]:
    """The rungs at which MLX and torch in float64 disagree about a model."""
    return disagreements(ladder.compare(case, CASES[case], scale, place))


def disagreements(figures: list[ladder.Figure]) -> set[int]:
    """The rungs at which MLX, or torch in chunks, and torch in float64 disagree."""
    seen = [figure for figure in figures if "MLX" in figure.what or "in chunks" in figure.what]
    return {figure.rung for figure in seen if not figure.agrees}


def attend_with(change: Callable[..., tuple[Any, ...]]) -> Patch:
    """attend() on changed arguments."""
    plain = torch_ref.attention.attend

    def attend(q: Any, k: Any, v: Any, mask: Any, drop: Any, *rest: Any) -> Any:
        return plain(*change(q, k, v, mask, drop), *rest)

    return lambda patch: patch.setattr(torch_ref.attention, "attend", attend)


def rotate_with(change: Callable[..., torch.Tensor]) -> Patch:
    return lambda patch: patch.setattr(torch_ref.attention, "rotate", change)


def config_with(**change: Any) -> Patch:
    """torch_ref's model with another choice, same parameters."""
    plain = torch_ref.model.Model.__init__

    def init(self: Any, config: ModelConfig, *rest: Any) -> None:
        plain(self, dataclasses.replace(config, **change), *rest)

    return lambda patch: patch.setattr(torch_ref.model.Model, "__init__", init)


def shifted(patch: pytest.MonkeyPatch) -> None:
    """Off-by-one target: a position is asked for the token it has, not for the next."""
    plain = torch_ref.losses.lm

    def lm(model: Any, batch: Any, *rest: Any, **more: Any) -> torch.Tensor:
        return plain(model, batch._replace(targets=batch.tokens), *rest, **more)

    patch.setattr(torch_ref.losses, "lm", lm)


def interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary pairs (x_2i, x_2i+1), as llama.c has them."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def backwards(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The wrong half negated."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def ungrouped(q: Any, k: Any, v: Any, mask: Any, drop: Any) -> tuple[Any, ...]:
    """Key and value heads tiled where each should serve neighboring query heads."""
    times = q.shape[1] // k.shape[1]
    return q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), mask, drop


def swapped(q: Any, k: Any, v: Any, mask: Any, drop: Any) -> tuple[Any, ...]:
    return k, q, v, mask, drop


def unmasked(q: Any, k: Any, v: Any, mask: Any, drop: Any) -> tuple[Any, ...]:
    return q, k, v, None, drop


# where it must show: at normal weights (1) or only with the matrices times 8, and at which rungs
MUTATIONS: dict[str, tuple[str, Patch, float, set[int]]] = {
    "q and k swapped, gpt2": ("gpt2", attend_with(swapped), 1, {2, 3}),
    "q and k swapped, llama": ("llama", attend_with(swapped), 1, {2, 3}),
    "erf for tanh": ("gpt2", config_with(activation="gelu"), 1, {3}),
    "erf for tanh, scaled": ("gpt2", config_with(activation="gelu"), 8, {2, 3}),
    "tanh for erf": ("gpt2-nobias-erf", config_with(activation="gelu_tanh"), 8, {2, 3}),
    "wrong eps, LayerNorm": ("gpt2", config_with(norm_eps=1e-6), 1, {2, 3}),
    "wrong eps, RMSNorm": ("llama", config_with(norm_eps=1e-6), 1, {2, 3}),
    "wrong eps, q_norm and k_norm": ("qwen3", config_with(norm_eps=1e-5), 1, {2, 3}),
    "no mask, gpt2": ("gpt2", attend_with(unmasked), 1, {2, 3}),
    "no mask, qwen3": ("qwen3", attend_with(unmasked), 1, {2, 3}),
    "wrong rotary half": ("llama", rotate_with(backwards), 1, {2, 3}),
    "interleaved rotary pairs": ("qwen3", rotate_with(interleaved), 1, {2, 3}),
    "rope_theta 1e-4 off": ("llama", config_with(rope_theta=10001.0), 8, {2, 3}),
    "tiled key heads": ("llama-gqa", attend_with(ungrouped), 1, {2, 3}),
    "off-by-one target": ("gpt2", shifted, 1, {3}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_model_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case, mutate, scale, rungs = MUTATIONS[mutation]
    assert caught(case, tmp_path / "plain", scale) == set()
    mutate(monkeypatch)
    assert caught(case, tmp_path / "mutated", scale) == rungs


def chunks_without(**option: float) -> Patch:
    """The chunked head of torch_ref with an option forgotten."""
    plain = torch_ref.head.Options

    def options(*args: Any, **more: Any) -> Any:
        return plain(*args, **more)._replace(**option)

    return lambda patch: patch.setattr(torch_ref.head, "Options", options)


def scale_after_the_last_norm(patch: pytest.MonkeyPatch) -> None:
    """The hidden states are scaled and not the logits: the same logits where the head has no bias."""
    plain = torch_ref.model.Model.hidden
    patch.setattr(torch_ref.model.Model, "hidden", lambda self, *a, **k: plain(self, *a, **k) * self.config.logit_scale)
    chunks_without(logit_scale=0.0)(patch)
    for module in (torch_ref.model, torch_ref.head):
        patch.setattr(module, "finish", lambda logits, _, soft_cap: torch_ref.layers.finish(logits, 0.0, soft_cap))


def scale_after_the_cap(patch: pytest.MonkeyPatch) -> None:
    """The scale multiplies capped logits."""
    for module in (torch_ref.model, torch_ref.head):
        finish = lambda logits, scale, soft_cap: torch_ref.layers.finish(logits, 0.0, soft_cap) * scale  # noqa: E731
        patch.setattr(module, "finish", finish)


# of the last steps to the logits, on a model with a scale and a cap; (the mutation, the rungs that see it)
FINISHING: dict[str, tuple[Patch, set[int]]] = {
    "scale forgotten in the chunked path": (chunks_without(logit_scale=0.0), {3}),
    "soft cap forgotten in the chunked path": (chunks_without(soft_cap=0.0), {3}),
    "scale applied after the last norm": (scale_after_the_last_norm, {2}),
    "scale applied after the soft cap": (scale_after_the_cap, {2, 3}),
}


@pytest.mark.parametrize("mutation", FINISHING)
def test_mutated_logits_are_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CASES["llama"], logit_scale=6.0, final_softcap=2.0)
    assert disagreements(ladder.compare("scaled", config, 1.0, None)) == set()
    mutate, rungs = FINISHING[mutation]
    mutate(monkeypatch)
    assert disagreements(ladder.compare("scaled", config, 1.0, None)) == rungs


def test_a_bias_forgotten_in_the_chunked_path_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.head.logits
    assert CASES["phi"].head_bias
    assert disagreements(ladder.compare("phi", CASES["phi"], 1.0, None)) == set()
    monkeypatch.setattr(torch_ref.head, "logits", lambda h, w, b, *rest: plain(h, w, None, *rest))
    figures = ladder.compare("phi", CASES["phi"], 1.0, None)
    assert disagreements(figures) == {3}
    assert all("torch in chunks" in figure.what for figure in figures if not figure.agrees)


def test_both_frameworks_wrong_alike_is_caught_by_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Gate and up swapped in the table of names: MLX and torch agree with each other, and with nobody else."""
    row = families.FAMILIES["llama"]
    swap = {"h.{n}.mlp.c_gate": "h.{n}.mlp.c_fc", "h.{n}.mlp.c_fc": "h.{n}.mlp.c_gate"}
    modules = {name: row.modules[swap.get(name, name)] for name in row.modules}
    monkeypatch.setitem(families.FAMILIES, "llama", dataclasses.replace(row, modules=modules))
    figures = ladder.compare("llama", CASES["llama"], 1.0, tmp_path / "m")
    wrong = {(figure.rung, figure.what.split(": ")[1].split(",")[0]) for figure in figures if not figure.agrees}
    assert wrong == {(rung, "transformers - float64") for rung in (2, 3)}


def curves(family: str, steps: int = 12) -> list[ladder.Figure]:
    """Rung 4 over the first steps."""
    recipe = ladder.training_recipe(family, dropout=0.2)
    ours, theirs = (ladder.curve(ladder.trained(package, recipe), last=steps) for package in ladder.PACKAGES)
    return ladder.same_curve(family, ours, theirs)


def no_bias_correction(patch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.optim.scalars
    patch.setattr(torch_ref.optim, "scalars", lambda config, lr, t: [lr, 1.0, *plain(config, lr, t)[2:]])


def late_correction(patch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.optim.scalars
    patch.setattr(torch_ref.optim, "scalars", lambda config, lr, t: plain(config, lr, t + 1))


def decay_everything(patch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.optim.adamw
    decayed = lambda p, g, m, v, s, param, config: plain(p, g, m, v, s, dataclasses.replace(param, decay=True), config)  # noqa: E731
    patch.setattr(torch_ref.optim, "adamw", decayed)


def other_masks(patch: pytest.MonkeyPatch) -> None:
    plain = torch_ref.noise.bits
    patch.setattr(torch_ref.noise, "bits", lambda key, *rest: plain(key + 1, *rest))


def test_without_a_mutation_the_curves_agree() -> None:
    assert all(figure.agrees for figure in curves("gpt2"))


@pytest.mark.parametrize(
    ("mutate", "first_step"),
    [
        (no_bias_correction, False),
        (late_correction, False),
        (decay_everything, False),
        (other_masks, True),
        (shifted, True),
    ],
)
def test_a_mutated_training_is_caught_by_the_curve(
    mutate: Patch, first_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    start, whole = curves("gpt2")
    assert not whole.agrees and start.agrees != first_step


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("both", [True, False])
def test_what_is_not_finite_agrees_with_nothing(broken: float, both: bool) -> None:
    fine, bad = np.ones(3), np.array([1.0, broken, 1.0])
    for found, expected in ((bad, bad),) if both else ((bad, fine), (fine, bad)):
        assert worst("x", found, expected) == np.inf
        assert worst_gradient("x", {"a": fine, "b": found}, {"a": fine, "b": expected}) == np.inf


def test_a_broken_cost_opens_no_gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NaN in torch alone makes cost and gate infinite; nothing may pass through."""
    monkeypatch.setattr(torch_ref.model, "activate", lambda x, _: x * float("nan"))
    figures = ladder.compare("gpt2", CASES["gpt2"], 1.0, tmp_path / "m")
    assert not any(figure.agrees for figure in figures if "hidden.embed" not in figure.what)  # it comes before


def test_the_comparison_sees_one_element_its_sign_and_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    expected = np.linspace(-2, 2, 12).reshape(3, 4)
    found = expected.copy()
    found[1, 2] += 1e-3
    found[0, 0] -= 1e-3
    assert worst("x", found, expected) == pytest.approx(5e-4)
    assert "at (" in capsys.readouterr().out
    assert worst("x", expected[:2], expected) == np.inf
    assert worst_gradient("x", {"a": found}, {"b": expected}) == np.inf
    tiny = {"big": np.ones(2), "small": np.full(2, 1e-9)}
    assert worst_gradient("x", tiny | {"small": np.full(2, 2e-9)}, tiny) == pytest.approx(1e-9), "of the largest"
    tiny["small"] = np.full(2, 1e-6)
    assert worst_gradient("x", tiny | {"small": np.full(2, 2e-6)}, tiny) == pytest.approx(1.0), "of its own"
