"""GPTQ of one matrix: what it costs, what it is held against, and inputs that say little or nothing."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.quantize import gptq
from convert.quantize.work import Inputs, Scheme, cost
from mlxgpt.common.model.affine import BITS, Quantized, unpack

BF16 = np.dtype(ml_dtypes.bfloat16)


def problem(n_out: int = 16, n_in: int = 128, tokens: int = 600) -> tuple[np.ndarray, Inputs]:
    """A matrix, and inputs that depend on each other, some far larger than others."""
    rng = np.random.default_rng(7)
    mixed = rng.standard_normal((n_in, n_in)) / n_in**0.5 + np.diag(np.exp(rng.standard_normal(n_in)))
    x = rng.standard_normal((tokens, n_in)) @ mixed
    weight = rng.standard_normal((n_out, n_in)).astype(np.float32) * np.float32(0.05)
    return weight, Inputs(x.T @ x, np.abs(x).mean(0), tokens)


def price(made: Quantized, weight: np.ndarray, inputs: Inputs) -> float:
    return cost(made.dequantize() - weight.astype(np.float32), inputs)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_it_costs_less_than_rounding_to_nearest(bits: int, group_size: int) -> None:
    weight, inputs = problem()
    nearest = price(Quantized.of(weight, bits, group_size), weight, inputs)
    made = gptq.quantize(weight, inputs, Scheme(bits, group_size))
    assert (made.bits, made.group_size, made.shape) == (bits, group_size, weight.shape)
    assert price(made, weight, inputs) < 0.75 * nearest


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BF16])
def test_scales_and_biases_are_in_the_dtype_of_the_matrix_and_rounding_knows_it(dtype: np.dtype) -> None:
    """With scales of 8 bits it matters: a scale that is rounded only after the levels are chosen costs more."""
    weight, inputs = problem()
    stored, scheme = weight.astype(dtype), Scheme(8, 64)
    made = gptq.quantize(stored, inputs, scheme)
    assert made.scales.dtype == made.biases.dtype == dtype and made.words.dtype == np.uint32
    wide = gptq.quantize(stored.astype(np.float32), inputs, scheme)
    late = Quantized(wide.words, wide.scales.astype(dtype), wide.biases.astype(dtype), 8, 64)
    if dtype == BF16:
        assert price(made, stored, inputs) < 0.7 * price(late, stored, inputs)


def obs(w: np.ndarray, H: np.ndarray, scales: np.ndarray, biases: np.ndarray, bins: int) -> np.ndarray:
    """Levels column by column, as Frantar et al. (2023) derive them: with the inverse of what is left of H."""
    w, levels = w.copy(), np.empty_like(w)
    for k in range(len(w)):
        inverse = np.linalg.inv(H[k:, k:])
        levels[k] = np.clip(np.rint((w[k] - biases[k]) / scales[k]), 0, bins)
        error = w[k] - (levels[k] * scales[k] + biases[k])
        w[k:] -= np.outer(inverse[:, 0] / inverse[0, 0], error)
    return levels


@pytest.mark.parametrize("block", [1, 48, 1000])
def test_columns_are_rounded_as_the_paper_derives_it(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, inputs = problem()
    w, H = weight.astype(np.float64).T, gptq.damped(inputs)
    scales, biases = (np.repeat(each, 64, axis=0) for each in gptq.search(w, np.diag(H), Scheme(4, 64), weight.dtype))
    factor = np.linalg.cholesky(np.linalg.inv(H)).T
    found = gptq.round_columns(w, factor, scales, biases, 15)
    assert np.array_equal(found, obs(w, H, scales, biases, 15))
    transposed = gptq.round_columns(w, factor.T.copy(), scales, biases, 15)
    assert not np.array_equal(transposed, found)


def test_without_dependence_it_is_rounding_to_the_nearest_level() -> None:
    weight, _ = problem()
    w, ones = weight.astype(np.float64).T, np.ones(128)
    scales, biases = (np.repeat(each, 64, axis=0) for each in gptq.search(w, ones, Scheme(3, 64), weight.dtype))
    found = gptq.round_columns(w, np.eye(128), scales, biases, 7)
    assert np.array_equal(found, gptq.nearest(w, scales, biases, 7))


def test_a_fit_never_costs_more_and_finds_what_made_the_weights() -> None:
    weight, inputs = problem()
    w, H = weight.astype(np.float64).T, gptq.damped(inputs)
    scales, biases = gptq.search(w, np.diag(H), Scheme(3, 64), weight.dtype)
    levels = gptq.nearest(w, np.repeat(scales, 64, axis=0), np.repeat(biases, 64, axis=0), 7)

    def prices(target: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
        change = gptq.matrix(levels, scales, biases, 64) - target
        return np.einsum("io,io->o", change, H @ change)

    fitted = gptq.fit(w, levels, H, scales, biases, 64, weight.dtype)
    assert (prices(w, *fitted) <= prices(w, scales, biases)).all()
    assert prices(w, *fitted).sum() < 0.97 * prices(w, scales, biases).sum()
    exact = gptq.matrix(levels, scales, biases, 64)
    pair = scales * 1.1, biases * 0.9
    for _ in range(60):
        pair = gptq.fit(exact, levels, H, *pair, 64, np.dtype(np.float64))
    assert prices(exact, *pair).sum() < 0.05 * prices(exact, scales * 1.1, biases * 0.9).sum()


def _forgetful(w: np.ndarray, factor: np.ndarray, scales: np.ndarray, biases: np.ndarray, bins: int) -> np.ndarray:
    return gptq.nearest(w, scales, biases, bins)


def _transposed(w: np.ndarray, factor: np.ndarray, *rest: Any) -> np.ndarray:
    return ROUND(w, np.ascontiguousarray(factor.T), *rest)


def _backward(array: np.ndarray, *rest: Any, **kind: Any) -> np.ndarray:
    return ARGSORT(array, *rest, **kind)[::-1]


def _whole_range(w: np.ndarray, diagonal: np.ndarray, scheme: Scheme, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    groups = w.reshape(-1, scheme.group_size, w.shape[1])
    low, high = groups.min(axis=1), groups.max(axis=1)
    return (high - low) / (2**scheme.bits - 1), low


ROUND, ARGSORT = gptq.round_columns, np.argsort
MUTATIONS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "errors are not told": (gptq, "round_columns", _forgetful),
    "the factor is transposed": (gptq, "round_columns", _transposed),
    "columns in the order of least activation": (np, "argsort", _backward),
    "the whole range": (gptq, "search", _whole_range),
    "scales are not fitted": (gptq, "fit", lambda w, levels, H, scales, biases, *rest: (scales, biases)),
    "every input alike": (gptq, "damped", lambda inputs: np.eye(len(inputs.gram))),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_part_makes_it_cheaper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = problem()
    whole = price(gptq.quantize(weight, inputs, Scheme(3, 64)), weight, inputs)
    module, attribute, mutant = MUTATIONS[name]
    monkeypatch.setattr(module, attribute, mutant)
    assert price(gptq.quantize(weight, inputs, Scheme(3, 64)), weight, inputs) > 1.02 * whole


def test_dead_inputs_a_singular_gram_one_token_and_none() -> None:
    weight, inputs = problem()
    dead = np.zeros(128)
    dead[5:70] = 1
    alive = np.outer(1 - dead, 1 - dead)
    x = np.random.default_rng(1).standard_normal((1, 128))
    for gram, tokens in ((inputs.gram * alive, 600), (x.T @ x, 1), (np.zeros((128, 128)), 600), (np.eye(128), 1)):
        given = Inputs(gram, np.ones(128), tokens)
        made = gptq.quantize(weight, given, Scheme(4, 64))
        rounded = made.dequantize()
        assert np.isfinite(rounded).all()
        assert price(made, weight, given) <= price(Quantized.of(weight, 4, 64), weight, given)
        assert np.abs(rounded - weight).max() < 0.1  # of weights up to 0.2: none is lost where nothing is known
    assert (
        np.abs(gptq.quantize(weight, Inputs(np.zeros((128, 128)), dead, 1), Scheme(4, 64)).dequantize() - weight).max()
        < 0.03
    )


def test_groups_of_equal_weights_and_of_zeros() -> None:
    weight, inputs = problem()
    weight[:, :64], weight[0] = np.float32(0.25), np.float32(0)
    for dtype in (np.dtype(np.float32), np.dtype(np.float16), BF16):
        made = gptq.quantize(weight.astype(dtype), inputs, Scheme(4, 64))
        rounded = made.dequantize()
        assert np.isfinite(rounded).all() and np.abs(rounded[0]).max() < 1e-5
        assert unpack(made.words, 4).max() <= 15


def test_the_same_inputs_give_the_same_bits() -> None:
    weight, inputs = problem()
    one, two = (gptq.quantize(weight.copy(), inputs, Scheme(4, 32)) for _ in range(2))
    assert one.words.tobytes() == two.words.tobytes() and one.scales.tobytes() == two.scales.tobytes()
