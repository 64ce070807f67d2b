"""What MLX's CPU backend computes slowly, spelled out: the same values and gradients, and the model's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from adapting import moved, packed, probe, recipe
from compare import agree, worst_gradient

from mlxgpt import blas, fast  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common import rng

# isort: split
import mlx.core as mx
import mlx.nn as nn


def draw(name: str, *shape: int, std: float = 1.0) -> mx.array:
    return mx.array(rng.normal(0, name, shape=shape, std=std))


def same(name: str, found: Callable, expected: Callable, arrays: list[mx.array], cotangent: mx.array) -> None:
    """Values and gradients, as they are and compiled."""
    judge = mx.vjp(expected, arrays, [cotangent])

    def both(*given: mx.array) -> Any:
        return mx.vjp(found, list(given), [cotangent])

    for run in (both, mx.compile(both)):
        made: Any = run(*arrays)
        for what, a, b in zip(("value", *"abc"), made[0] + made[1], judge[0] + judge[1], strict=False):
            agree(f"{name}, {what}", np.array(a), np.array(b), 2e-6)


@pytest.mark.parametrize("std", [1.0, 30.0])
def test_sigmoid_and_silu(std: float) -> None:
    x, y, cotangent = draw("x", 40, 50, std=std), draw("y", 40, 50), draw("c", 40, 50)
    same("sigmoid", fast.sigmoid, mx.sigmoid, [x], cotangent)
    same("silu", fast.silu_times, lambda x, y: nn.silu(x) * y, [x, y], cotangent)


def test_far_ends_are_finite() -> None:
    ends = mx.array([-1e4, -88.0, 0.0, 88.0, 1e4])
    agree("sigmoid", np.array(fast.logistic(ends)), np.array([0, 0, 0.5, 1, 1]), 1e-6)
    assert np.isfinite(np.array(fast.silu_times(ends, ends))).all()


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("tile", [8, 64])
def test_attention(heads: tuple[int, int], segments: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "TILE", tile)
    batch, i = packed(recipe("llama")), mx.arange(31)
    B, (H, K), T, D = 4, heads, 31, 8
    mask = i[:, None] >= i[None]
    if segments:
        assert batch.segments is not None
        parts = mx.array(batch.segments)
        mask = mask & (parts[:, None, :, None] == parts[:, None, None, :])
    q, k, v, cotangent = draw("q", B, H, T, D), draw("k", B, K, T, D), draw("v", B, K, T, D), draw("c", B, H, T, D)

    def expected(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.7, mask=mask)

    same("attention", lambda q, k, v: fast.attention(q, k, v, mask, 0.7), expected, [q, k, v], cotangent)


@pytest.mark.parametrize("tile", [5, 64])
def test_attention_after_a_cache(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries than keys: the last query is at the last key."""
    monkeypatch.setattr(fast, "TILE", tile)
    T, S = 13, 31
    mask = mx.arange(S - T, S)[:, None] >= mx.arange(S)[None]
    q, cotangent = draw("q", 2, 4, T, 8), draw("c", 2, 4, T, 8)
    k, v = draw("k", 2, 2, S, 8), draw("v", 2, 2, S, 8)

    def expected(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.7, mask=mask)

    same("attention", lambda q, k, v: fast.attention(q, k, v, mask, 0.7), expected, [q, k, v], cotangent)


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2", "gemma2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_with_them_is_the_same(case: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(case, {"checkpoint_activations": recompute})
    params = moved(config)
    expected = probe("torch_ref", config, params)
    used = []
    monkeypatch.setattr(fast, "MANY", 1)
    plain = fast.attention
    monkeypatch.setattr(fast, "attention", lambda *given: used.append(1) or plain(*given))
    found = probe("mlxgpt", config, params)
    assert bool(used) == (case != "gemma2")
    agree("logits", found.logits, expected.logits, 1e-5)
    assert worst_gradient("gradient", found.gradients, expected.gradients) <= 1e-5


def test_what_another_segment_holds_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even e^-87: the loss of a row's last text is the same to the bit whatever stands before it."""
    monkeypatch.setattr(fast, "MANY", 1)
    q, k, v = (draw(name, 1, 2, 40, 8) for name in "qkv")
    i = mx.arange(40)
    mask = (i[:, None] >= i[None]) & ((i[:, None] >= 20) == (i[None] >= 20))
    other = mx.concatenate([k[:, :, :20] * 100, k[:, :, 20:]], axis=2)
    a, b = (np.array(fast.attention(q, keys, v, mask, 1.0)) for keys in (k, other))
    assert (a[:, :, 20:] == b[:, :, 20:]).all() and (a[:, :, 1:20] != b[:, :, 1:20]).any()
