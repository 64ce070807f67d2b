"""The specification of drawing a token, against transformers, against probability, and at its edges."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from mlxgpt.common import rng
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.inference import sampling

V = 50


def make_logits(rows: int = 64, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, V)).astype(np.float32) * np.float32(scale)


def hf_keep(logits: np.ndarray, sample: SampleConfig) -> np.ndarray:
    """transformers' warpers in transformers' order."""
    scores, ids = torch.from_numpy(logits), torch.LongTensor()
    if sample.top_k:
        scores = hf.TopKLogitsWarper(sample.top_k)(ids, scores)
    if sample.top_p < 1:
        scores = hf.TopPLogitsWarper(sample.top_p)(ids, scores)
    if sample.min_p > 0:
        scores = hf.MinPLogitsWarper(sample.min_p)(ids, scores)
    return scores.numpy()


FILTERS: list[dict[str, Any]] = [
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=V),
    dict(top_k=V + 9),
    dict(top_p=0.9),
    dict(top_p=0.3),
    dict(top_p=1e-6),
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(top_k=10, top_p=0.7, min_p=0.1),
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_keep_what_transformers_keeps(options: dict) -> None:
    sample = SampleConfig(temperature=1.0, **options)
    ours = sampling.keep(make_logits(), sample)
    assert np.array_equal(ours, hf_keep(make_logits(), sample))
    assert (np.isfinite(ours).sum(axis=-1) >= 1).all()


def test_order_of_filters_matters_and_is_transformers_order() -> None:
    # probabilities 0.4 0.3 0.2 0.1: top-k 2 leaves 0.57 and 0.43, of which top-p 0.5 keeps one; top-p first keeps two
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], dtype=np.float32))
    sample = SampleConfig(top_k=2, top_p=0.5)
    assert np.isfinite(sampling.keep(logits, sample)).tolist() == [[True, False, False, False]]
    assert np.isfinite(hf_keep(logits, sample)).tolist() == [[True, False, False, False]]
    assert np.isfinite(sampling.keep(logits, SampleConfig(top_p=0.5))).sum() == 2


def test_repetition_penalty_is_transformers() -> None:
    logits = make_logits(4)
    seen_ids = np.random.default_rng(1).integers(0, V, size=(4, 12))
    seen = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(seen, seen_ids, True, axis=-1)
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.LongTensor(seen_ids), torch.from_numpy(logits))
    assert np.array_equal(sampling.penalize(logits, seen, 1.3), theirs.numpy())


def test_ties_stay_together_and_the_lowest_index_wins() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 3.0, 2.0]], dtype=np.float32)
    none, keys = np.zeros(logits.shape, dtype=bool), np.zeros(1, dtype=np.uint32)
    assert sampling.sample_tokens(logits, none, keys, SampleConfig(temperature=0.0)).tolist() == [1]
    choices: tuple[dict[str, Any], ...] = ({"top_k": 3}, {"top_p": 0.8})
    for options in choices:
        kept = np.isfinite(sampling.keep(logits, SampleConfig(**options)))
        assert kept.tolist() == [[False, True, True, True, True]], options
    assert np.isfinite(sampling.keep(logits, SampleConfig(min_p=1.0))).tolist() == [[False, True, False, True, False]]


def test_greedy_applies_the_penalty_and_ignores_noise_and_filters() -> None:
    logits = np.array([[2.0, 1.9, -1.0]], dtype=np.float32)
    seen = np.array([[True, False, True]])
    sample = SampleConfig(temperature=0.0, repetition_penalty=1.5, top_k=1, top_p=0.1)
    for key in range(5):
        assert sampling.sample_tokens(logits, seen, np.array([key], np.uint32), sample).tolist() == [1]


def test_one_token_left_is_drawn_whatever_the_noise() -> None:
    logits, none = make_logits(1), np.zeros((1, V), dtype=bool)
    for key in range(50):
        for sample in (SampleConfig(top_k=1), SampleConfig(top_p=1e-9), SampleConfig(min_p=1.0)):
            token = sampling.sample_tokens(logits, none, np.array([key], np.uint32), sample)
            assert token.tolist() == [logits.argmax()]


def test_draws_follow_the_softmax() -> None:
    """20000 draws over 6 tokens: chi-squared below its 1 - 1e-6 quantile for 5 degrees of freedom, 35.9."""
    logits = np.array([[0.0, 1.0, -1.0, 2.0, 0.5, -2.0]], dtype=np.float32)
    count, temperature = 20000, 0.7
    keys = sampling.mix(np.arange(count, dtype=np.uint32))
    rows = np.repeat(logits, count, axis=0)
    tokens = sampling.sample_tokens(rows, np.zeros(rows.shape, bool), keys, SampleConfig(temperature=temperature))
    share = np.exp(logits[0] / temperature)
    expected = count * share / share.sum()
    chi2 = ((np.bincount(tokens, minlength=6) - expected) ** 2 / expected).sum()
    assert chi2 < 35.9
    # the same test sees a temperature that is off by a tenth
    share = np.exp(logits[0] / 0.8)
    expected = count * share / share.sum()
    assert ((np.bincount(tokens, minlength=6) - expected) ** 2 / expected).sum() > 35.9


def test_noise_is_gumbel_finite_and_independent_of_batch_and_vocabulary() -> None:
    keys = np.array([5, 7, 11], dtype=np.uint32)
    noise = sampling.gumbel(keys, 100_000)
    assert noise.dtype == np.float32 and np.isfinite(noise).all()
    assert np.abs(noise.mean(axis=-1) - 0.5772).max() < 0.02 and np.abs(noise.std(axis=-1) - 1.2825).max() < 0.02
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.015
    assert np.array_equal(noise[1:2, :77], sampling.gumbel(keys[1:2], 77))


def test_extreme_bits_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (0, 2**32 - 1):
        monkeypatch.setattr(sampling, "mix", lambda x, bits=bits: np.full_like(x, bits))
        assert np.isfinite(sampling.gumbel(np.zeros(1, np.uint32), 3)).all()


def test_added_is_openais_formula_by_hand() -> None:
    """bias - presence * (count > 0) - frequency * count."""
    counts = np.array([[0, 1, 3, 0], [2, 0, 0, 0]], np.int32)
    bias = np.array([0.5, 0, -1, -np.inf], np.float32)
    found = sampling.added(counts, bias, presence=0.25, frequency=0.5)
    assert found.dtype == np.float32
    assert found.tolist() == [[0.5, -0.75, -2.75, -np.inf], [-0.75, 0, -1, -np.inf]]
    assert sampling.added(counts[0], None, presence=-1.0, frequency=-0.5).tolist() == [0, 1.5, 2.5, 0]


def test_what_is_added_comes_behind_the_repetition_penalty_and_before_the_rest() -> None:
    logits, seen = np.array([[4.0, 0.9, -9.0]], dtype=np.float32), np.array([[True, False, False]])

    def draw(sample: SampleConfig, *added: float) -> list[int]:
        keys = np.full(1, 7, dtype=np.uint32)
        return sampling.sample_tokens(logits, seen, keys, sample, np.array([added], dtype=np.float32)).tolist()

    # 4 / 2 - 1 = 1 is above 0.9, and 4 / 2 - 1.2 = 0.8 is not; penalized afterwards, 2.8 / 2 = 1.4 would be
    greedy = SampleConfig(temperature=0.0, repetition_penalty=2.0)
    assert draw(greedy, -1, 0, 0) == [0]
    assert draw(greedy, -1.2, 0, 0) == [1]
    assert draw(SampleConfig(temperature=1e-3), -4, 0, 0) == [1]  # 0.9 / 0.001 above 0; 4 / 0.001 - 4 would win
    settings: list[dict[str, Any]] = [dict(temperature=0.0), dict(top_k=1), dict(top_p=0.1), dict(min_p=0.5)]
    for options in settings:  # a grammar allows the unlikeliest token alone
        assert draw(SampleConfig(**options), -np.inf, -np.inf, 0) == [2], options


def test_keys_of_many_steps_are_those_of_one_by_one() -> None:
    draw = np.random.default_rng(5)
    for seed in (0, 7, 2**31, 2**63 - 1, 10**30, *draw.integers(0, 2**40, 12).tolist()):
        copy, first, count = (int(draw.integers(0, high)) for high in (40, 10**6, 400))
        found = sampling.keys(seed, copy, first, count)
        assert found.dtype == np.uint32
        assert found.tolist() == [rng.key32(seed, "sample", copy, step) for step in range(first, first + count)]


def test_keys_of_steps_run_over_their_blocks() -> None:
    copies, steps = [0, 2, 0, 1], sampling.KEYS + 3
    found = list(sampling.each_step_keys(9, copies, steps))
    assert len(found) == steps
    assert all(np.array_equal(one, sampling.step_keys(9, copies, step)) for step, one in enumerate(found))


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("field", [each for each in dataclasses.fields(SampleConfig) if each.name != "prompt"])
def test_settings_that_are_not_finite_are_refused(field: dataclasses.Field) -> None:
    for bad in BAD:
        with pytest.raises(UserError, match=f"sample.{field.name} = -?(nan|inf): expected "):
            SampleConfig(**{field.name: bad})  # type: ignore[arg-type]


def test_settings_that_float32_cannot_compute_with_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        *(dict(temperature=value) for value in (1e300, 10**400)),
        *(dict(repetition_penalty=value) for value in (1e-300, 1e300)),
        *(dict(presence_penalty=value) for value in (-1e300, 1e300)),
        *(dict(frequency_penalty=value) for value in (-1e300, 1e300)),
    ]
    for options in wrong:
        with pytest.raises(UserError, match="a number between .* and 1e.10"):
            SampleConfig(**options)
    for small in (5e-324, 1e-300, 9.9e-11):  # where logits divided by it overflow, it is as good as 0
        assert SampleConfig(temperature=small) == SampleConfig(temperature=0.0)
    SampleConfig(temperature=1e-8, repetition_penalty=1e-8, presence_penalty=-100, frequency_penalty=100.0)


def test_mixer_is_lowbias32() -> None:
    def reference(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    values = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert sampling.mix(np.array(values, dtype=np.uint32)).tolist() == [reference(x) for x in values]


def test_keys_depend_on_seed_copy_and_step() -> None:
    keys = {int(sampling.step_keys(seed, [copy], step)[0]) for seed in (0, 1) for copy in (0, 1) for step in (0, 1)}
    assert len(keys) == 8
    assert sampling.step_keys(3, [0, 1, 0], 4).tolist()[::2] == sampling.step_keys(3, [0, 0], 4).tolist()
