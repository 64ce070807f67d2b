"""AWQ: scales that hide in norms and rows leave the function as it is, and cost less than rounding to nearest."""

import dataclasses

import numpy as np
import pytest
from decoding import BACKENDS, logits_of
from models import CASES, VARIANTS, weights

import mlxgpt.model
import torch_ref.model
from convert.quantize import folding
from convert.quantize.folding import Fold, Unfolded
from mlxgpt.common import rng
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import params

MODELS = CASES | VARIANTS
PAIRS = [pytest.param(config, id=name) for name, config in MODELS.items()]
TOKENS = [list(range(3, 23)), list(range(40, 20, -1))]


def logits(backend: str, config: ModelConfig, arrays: dict[str, np.ndarray]) -> np.ndarray:
    package = mlxgpt if backend == "mlx" else torch_ref
    model = package.model.Model(config, seed=None)
    if backend == "mlx":
        import mlx.core as mx

        model.load_weights([(name, mx.array(value)) for name, value in arrays.items()])
    else:
        import torch

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
            wrong.append({**changed, weight: folding.fold(arrays, dataclasses.replace(place, offset=0.0), scale)[weight]})
        if len(set(place.rows)) < len(place.rows):
            turned = np.roll(place.rows, config.head_dim)
            wrong.append(folding.fold(arrays, dataclasses.replace(place, rows=turned), scale))
        for broken in wrong:
            after = logits("torch", config, arrays | broken)
            assert np.abs(after - before).max() > 1e-3 * np.abs(before).max(), place
