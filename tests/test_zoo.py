"""The zoo itself: every pair of choices is in it, and each animal computes what it says it is."""

import itertools
from typing import Any

import numpy as np
import pytest
from compare import agree
from zoo.animals import Animal, ids, make, runner, truth
from zoo.choices import VALUES, Spec, animals, sensible, together
from zoo.weights import buffers, laid_out, plain

from mlxgpt.common.config import ModelConfig
from mlxgpt.trial import Trials as MlxTrials
from torch_ref.trial import Trials as TorchTrials

ZOO = animals()
SOME = ZOO[::13]


def of(spec: Spec, **changed: Any) -> ModelConfig:
    """What the animal says it is."""
    known = {"fused_qkv": False, "fused_mlp": False, "block_size": spec.P}
    return ModelConfig(family="mlxgpt", **(known | truth(spec) | changed))


def test_every_pair_of_choices_is_an_animal() -> None:
    seen = {(a, getattr(s, a), b, getattr(s, b)) for s in ZOO for a, b in itertools.combinations(VALUES, 2)}
    missing = [
        (a, x, b, y)
        for a, b in itertools.combinations(VALUES, 2)
        for x, y in itertools.product(VALUES[a], VALUES[b])
        if (a, x, b, y) not in seen and sensible({a: x, b: y})
    ]
    # what no third choice allows: a file of one framework with what only another's layers have
    assert {(a, b) for a, _, b, _ in missing} <= {("qkv", "file"), ("heads", "file"), ("dtype", "file")}, missing
    assert len(ZOO) >= 100 and together().sum() // 2 > 4000


@pytest.mark.parametrize("spec", [*SOME, *(pytest.param(s, marks=pytest.mark.slow) for s in ZOO if s not in SOME)],
                         ids=lambda spec: spec.name)  # fmt: skip
def test_an_animal_is_what_it_says(spec: Spec) -> None:
    given = ids(spec, 128, 1)
    logits, stream = runner(spec, buffers(spec))(laid_out(spec), given)
    assert np.isfinite(logits).all() and stream.shape == (spec.L + 1, 128, spec.C)
    for trials in (MlxTrials(), TorchTrials()):
        found, hidden = trials.run(of(spec), plain(spec), given[None], True)
        agree(type(trials).__module__, found[0], logits, 5e-6)
        agree("last block", hidden[-1][0], stream[-1], 5e-6)


def test_the_choices_show_in_the_logits() -> None:
    spec = next(s for s in ZOO if s.position == "halves" and s.act == "gelu" and s.mlp == "plain" and s.C == 32)
    weights, given = plain(spec), ids(spec)[None]
    logits = TorchTrials().run(of(spec), weights, given)[0]
    for change in ({"activation": "gelu_tanh"}, {"n_head": spec.H // 2, "head_dim": 2 * spec.D, "n_kv_head": 0},
                   {"rope_theta": 2e4}, {"attn_scale": 0.9 * spec.multiplier}, {"position": "none"}):  # fmt: skip
        if "n_head" in change and spec.K != spec.H:
            continue
        rotary = {"rotary_dim": 0} if "n_head" in change or "position" in change else {}
        other = TorchTrials().run(of(spec, **change, **rotary), weights, given)[0]
        assert np.abs(other - logits).max() > 1e-4 * np.abs(logits).max(), change


@pytest.mark.parametrize("file", VALUES["file"])
def test_an_animal_is_written_as_its_owner_would(file: str, tmp_path: Any) -> None:
    spec = next(s for s in ZOO if s.file == file)
    animal: Animal = make(spec, tmp_path)
    sample = np.load(animal.sample)
    assert animal.file.stat().st_size > 1000 and sample["logits"].shape == (32, spec.V)
    assert (sample["logits"] == animal.run(animal.state, sample["ids"])[0]).all()
