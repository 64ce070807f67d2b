"""AWQ: scales that hide in norms and rows leave the function as it is, and cost less than rounding to nearest."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import quantizing
import torch
from decoding import BACKENDS, logits_of
from models import CASES, VARIANTS, weights

import mlxgpt.load
import mlxgpt.model
import torch_ref.model
from convert.quantize import awq, folding
from convert.quantize.folding import Fold, Unfolded
from convert.quantize.run import quantize
from convert.quantize.work import Inputs, Scheme, cost
from mlxgpt.common import rng
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import params
from mlxgpt.common.model.affine import Quantized

EXTRA = ("gpt2-relu", "gpt2-relu2", "gpt_neox-serial", "gpt_neox-nobias", "olmo2-bias", "starcoder2-bias")
MODELS = CASES | {name: VARIANTS[name] for name in EXTRA}
PAIRS = [pytest.param(config, id=name) for name, config in MODELS.items()]
TOKENS = [list(range(3, 23)), list(range(40, 20, -1))]


def logits(backend: str, config: ModelConfig, arrays: dict[str, np.ndarray]) -> np.ndarray:
    model: Any
    if backend == "mlx":
        model = mlxgpt.model.Model(config, seed=None)
        model.load_weights([(name, mx.array(value)) for name, value in arrays.items()])
    else:
        model = torch_ref.model.Model(config, seed=None)
        model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return logits_of(backend, model.eval(), TOKENS)


def folded(config: ModelConfig, arrays: dict[str, np.ndarray], places: list[Fold]) -> dict[str, np.ndarray]:
    """``arrays`` with scales between 1/4 and 4 in every place."""
    made = dict(arrays)
    for place in places:
        drawn = rng.normal(7, "scale", *place.readers, shape=(len(place.rows),), std=1.0)
        made |= folding.fold(made, place, np.exp2(np.clip(place.shared(drawn), -2, 2)))
    return made


def places_of(config: ModelConfig) -> list[Fold]:
    return [each for each in folding.folds(config) if isinstance(each, Fold)]


@pytest.mark.parametrize("config", PAIRS)
def test_a_folded_model_computes_the_same(config: ModelConfig) -> None:
    arrays, places = weights(config, scale=3.0), places_of(config)
    made = folded(config, arrays, places)
    for backend in BACKENDS:
        before, after = logits(backend, config, arrays), logits(backend, config, made)
        assert np.abs(after - before).max() <= 1e-5 * max(1.0, np.abs(before).max())
    for place in places:
        for name in (*place.readers, place.writer):
            assert (made[f"{name}.weight"] != arrays[f"{name}.weight"]).any(), name


@pytest.mark.parametrize("config", PAIRS)
def test_every_matrix_but_the_embeddings_has_its_place(config: ModelConfig) -> None:
    readers = [name for each in folding.folds(config) for name in each.readers]
    matrices = {name.removesuffix(".weight") for name, param in params.table(config).items() if param.adaptable}
    assert len(readers) == len(set(readers))
    assert set(readers) - {"lm_head"} == matrices - {"wte", "lm_head"}


def test_what_cannot_be_scaled_is_said() -> None:
    said = {
        name: {each.why for each in folding.folds(config) if isinstance(each, Unfolded)}
        for name, config in MODELS.items()
    }
    assert said["llama-untied"] == said["gemma2"] - {folding._TIED} == said["gpt2-relu"] - {folding._TIED} == set()
    assert said["olmo2"] == {folding._RESIDUAL}
    assert said["olmo"] == {folding._BARE}
    assert said["gpt2"] == {folding._CURVED, folding._TIED}


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gpt_neox", "phi3", "gpt2-relu2", "gpt2-untied"])
def test_a_fold_left_out_or_turned_round_is_seen(name: str) -> None:
    """The mutations: a writer that is not divided, one multiplied, a bias forgotten, another's rows."""
    config = MODELS[name]
    arrays, places = weights(config, scale=3.0), places_of(config)
    before = logits("torch", config, arrays)
    for place in places:
        scale = np.exp2(place.shared(rng.normal(7, "scale", shape=(len(place.rows),), std=1.0)))
        changed = folding.fold(arrays, place, scale)
        weight, bias = f"{place.writer}.weight", f"{place.writer}.bias"
        wrong = [{**changed, weight: arrays[weight]}]
        wrong.append({**changed, weight: folding.fold(arrays, place, 1 / scale)[weight]})
        if bias in changed:
            wrong.append({**changed, bias: arrays[bias]})
        if place.offset:
            wrong.append(
                {**changed, weight: folding.fold(arrays, dataclasses.replace(place, offset=0.0), scale)[weight]}
            )
        if len(set(place.rows)) < len(place.rows):
            turned = np.roll(place.rows, config.head_dim)
            wrong.append(folding.fold(arrays, dataclasses.replace(place, rows=turned), scale))
        for broken in wrong:
            after = logits("torch", config, arrays | broken)
            assert np.abs(after - before).max() > 1e-3 * np.abs(before).max(), place


def loud(n_in: int, seed: int = 0) -> Inputs:
    """Inputs of which a few channels are much larger than the others."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(400, n_in))
    x[:, draw.choice(n_in, n_in // 16, replace=False)] *= 30
    return Inputs(x.T @ x, np.abs(x).mean(0), len(x))


def change(weight: np.ndarray, scale: np.ndarray, scheme: Scheme) -> np.ndarray:
    return Quantized.of(weight * scale, scheme.bits, scheme.group_size).dequantize() / scale - weight


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loud_channels_are_scaled_up(bits: int) -> None:
    weight, inputs, scheme = rng.normal(1, "w", shape=(48, 128), std=0.02), loud(128), Scheme(bits, 64)
    place = Fold(("a",), "b", np.arange(128))
    scale = awq.search([weight], inputs, [scheme], place)
    ones = np.ones_like(scale)
    costs = [cost(change(weight, each, scheme), inputs) for each in (ones, scale, 1 / scale)]
    assert costs[1] < 0.7 * costs[0] < costs[2]  # the last is the mutation: a scale applied the wrong way
    assert np.corrcoef(scale, inputs.mean)[0, 1] > 0.9
    assert cost(change(weight, scale, scheme) * scale, awq.scaled(inputs, scale)) == pytest.approx(costs[1])


def test_heads_that_share_values_share_scales() -> None:
    config = MODELS["llama-gqa"]
    place = next(each for each in places_of(config) if each.readers == ("h.0.attn.c_proj",))
    weight = rng.normal(1, "w", shape=(48, 64), std=0.02)
    scale = awq.search([weight], loud(64), [Scheme(3, 32)], place).reshape(2, 2, 16)
    assert np.array_equal(scale[:, 0], scale[:, 1]) and not np.array_equal(scale[0], scale[1])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_clipped_range_never_costs_more(bits: int) -> None:
    weight, inputs, scheme = rng.normal(1, "w", shape=(48, 64), std=0.02), loud(64), Scheme(bits, 64)
    plain = Quantized.of(weight, bits, 64).dequantize() - weight
    clipped = awq.quantize(weight, inputs, scheme).dequantize() - weight
    each = [np.einsum("oi,ij,oj->o", one, inputs.gram, one) for one in (plain, clipped)]
    assert (each[1] <= each[0] * (1 + 1e-5)).all() and each[1].sum() < 0.9 * each[0].sum()


@pytest.mark.parametrize("name", quantizing.NAMES)
def test_the_command_is_closer_than_rounding_and_loads_in_mlx_lm(name: str, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    source, data, held = quantizing.model(tmp_path, name), quantizing.text(tmp_path), quantizing.text(tmp_path, 4, 5)
    made = {
        (method, backend): quantize(
            source, tmp_path / f"{method}-{backend}", 3, method,
            group_size=32, data=data, eval_data=held, backend=backend,
        )
        for method, backend in (("rtn", "torch"), ("awq", "torch"), ("awq", "mlx"))
    }  # fmt: skip
    rtn, awq_torch, awq_mlx = made.values()
    assert awq_torch.kl and rtn.kl and awq_torch.kl < 0.8 * rtn.kl
    assert awq_torch.perplexity == pytest.approx(awq_mlx.perplexity, rel=1e-3)
    assert awq_torch.bits_per_weight == rtn.bits_per_weight
    assert any("not linear" in note for note in awq_torch.notes) == (name == "gpt2")
    tokens = np.fromfile(held, "<u2")[:-1].reshape(4, 32).astype(np.int32)
    theirs = np.array(load_model(tmp_path / "awq-mlx")[0](mx.array(tokens)))
    ours = np.array(mlxgpt.load.load(tmp_path / "awq-mlx", device="cpu")[0](tokens))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", quantizing.NAMES[:2])
def test_norms_that_are_not_written_are_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 8 bits nothing is lost; the mutation keeps the norms as they were."""
    source, data = quantizing.model(tmp_path, name), quantizing.text(tmp_path)
    whole = quantize(source, tmp_path / "q", 8, "awq", group_size=32, data=data, backend="torch")
    assert whole.kl and whole.kl < 1e-3
    monkeypatch.setattr(awq, "fold", lambda arrays, place, scale: {
        name: each for name, each in folding.fold(arrays, place, scale).items() if "ln_" not in name
    })  # fmt: skip
    broken = quantize(source, tmp_path / "b", 8, "awq", group_size=32, data=data, backend="torch")
    assert broken.kl and broken.kl > 100 * whole.kl
