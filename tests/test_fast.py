"""What MLX's backends compute slowly or in too much memory, spelled out: the same values, gradients and models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from adapting import engine, moved, packed, probe, recipe
from compare import agree, worst_gradient

from mlxgpt import attention, blas, device, fast, model  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common import rng
from mlxgpt.layers import Dropout

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


@pytest.mark.parametrize(("T", "masked"), [(1, False), (5, True), (31, True)])
def test_attention_of_few_scores_a_head(T: int, masked: bool) -> None:
    """All rows at once, some of which begin later, as in a batch whose rows have caches of their own."""
    B, H, K, S, D = 24, 6, 2, 120, 8
    assert fast.few(mx.zeros((B, H, T, D)), mx.zeros((B, K, S, D)))
    starts = mx.arange(S - T - B + 1, S - T + 1)[:, None, None, None]
    mask = mx.arange(S) <= starts + mx.arange(T)[:, None] if masked else None
    q, k, v, cotangent = draw("q", B, H, T, D), draw("k", B, K, S, D), draw("v", B, K, S, D), draw("c", B, H, T, D)

    def expected(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.7, mask=mask)

    same("attention", lambda q, k, v: fast.whole(q, k, v, mask, 0.7), expected, [q, k, v], cotangent)


def test_so_many_shapes_are_compiled_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of a function that was not compiled for its shapes runs the Python of it."""
    monkeypatch.setattr(fast, "SHAPES", 2)
    called = []
    square = fast.compiled(lambda x: (called.append(x.shape), mx.square(x))[1])
    for size in (1, 2, 1, 3, 2, 3):
        assert square(mx.full((size,), 3.0)).tolist() == [9.0] * size
    assert called == [(1,), (2,), (3,), (3,)]


def test_which_attention_is_chosen() -> None:
    def few(B: int, T: int, S: int, dtype: mx.Dtype = mx.float32) -> bool:
        return fast.few(mx.zeros((B, 4, T, 8), dtype), mx.zeros((B, 4, S, 8), dtype))

    assert few(64, 1, 64) and few(8, 64, 64)
    assert not few(1, 1, 64)  # hardly any scores
    assert not few(8, 128, 128)  # tiles are faster
    assert not few(64, 1, 64, mx.bfloat16)


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's default device is said to be a GPU; it computes on the CPU."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


def test_tiles_are_chosen_by_size_and_device() -> None:
    cpu, gpu = mx.Device(mx.cpu), mx.Device(mx.gpu)
    assert fast.tile(12, 12, 1024, 1024, cpu) == 0
    assert fast.tile(32, 8, 256, 512, gpu) == 0  # exactly what may exist
    for rows, heads, queries, keys in ((33, 8, 256, 512), (12, 12, 1024, 1024), (1, 32, 8192, 8192)):
        size = fast.tile(rows, heads, queries, keys, gpu)
        assert 0 < size < queries
        assert size % 32 == 0 or size < 32
        assert rows * heads * size * keys <= fast.SCORES / 2
    assert fast.tile(2**10, 2**10, 64, 64, gpu) == 1  # one query is the least


@pytest.mark.parametrize("kind", ["causal", "array", "window", "segments", "pad"])
@pytest.mark.parametrize(("rate", "softcap"), [(0.0, 0.0), (0.3, 0.0), (0.0, 5.0), (0.3, 5.0)])
def test_tiles_are_the_whole(
    kind: str, rate: float, softcap: float, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients at a length that is no multiple of the tile, also of large scores and in bfloat16."""
    monkeypatch.setattr(fast, "tile", lambda *_: 8)
    B, H, K, T, D, i = 3, 6, 2, 29, 8, mx.arange(29)
    mask = i[:, None] >= i
    if kind == "window":
        mask = mask & (i[:, None] - i < 7)
    elif kind == "segments":
        parts = mx.array(rng.integers(0, "parts", count=B * T, high=3).reshape(B, T))
        mask = mask & (parts[:, None, :, None] == parts[:, None, None, :])
    elif kind == "pad":
        mask = mask & ((i >= mx.array([0, 3, 5])[:, None, None, None]) | (i[:, None] == i))
    none = mx.array(0, mx.uint32)
    drop = Dropout(rate, mx.array([12345], mx.uint32), mx.array(5, mx.uint32), 0.0, none, 0.0, none)
    given = "causal" if kind == "causal" and not rate and not softcap else mask
    for std, dtype, gate in ((1.0, mx.float32, 2e-6), (8.0, mx.float32, 4e-6), (1.0, mx.bfloat16, 2e-2)):
        q, k, v = (
            draw(name, B, n, T, D, std=std if name == "q" else 1).astype(dtype)
            for name, n in zip("qkv", (H, K, K), strict=True)
        )
        cotangent = draw("c", B, H, T, D).astype(dtype)

        def whole(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return attention.attend(q, k, v, mask, drop, 0.4, softcap)

        def tiles(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return fast.tiled(attention.attend, q, k, v, given, drop, 0.4, softcap)

        expected, found = (mx.vjp(run, [q, k, v], [cotangent]) for run in (whole, tiles))
        for what, a, b in zip(("value", *"qkv"), found[0] + found[1], expected[0] + expected[1], strict=True):
            assert a.dtype == dtype
            agree(f"{what}, {std} {dtype}", np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32)), gate)


class Opened:
    """Stands for mx.custom_function, whose graph MLX does not export: keeps what the gradient is computed by."""

    backward: Any

    def __init__(self, function: Any):
        self.function = function

    def vjp(self, function: Any) -> None:
        Opened.backward = staticmethod(function)

    def __call__(self, *primals: mx.array) -> Any:
        return self.function(*primals)


def sizes(function: Callable, *given: mx.array) -> list[int]:
    """Elements of every array that a primitive of the exported graph makes."""
    records: list[dict[str, Any]] = []
    mx.export_function(records.append, function, *given)
    made = [each for record in records if record["type"] == "primitive" for each in record["outputs"]]
    return [int(np.prod(shape)) for _, shape, _ in made]


@pytest.mark.parametrize("drawn", [False, True])
def test_no_array_of_tiles_has_the_size_of_all_scores(drawn: bool, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the exported graphs of values and gradients, and of what was allocated."""
    B, H, T, D = 2, 4, 256, 8
    whole, none = B * H * T * T, mx.array([0], mx.uint32)
    drop = Dropout(0.2, none, none[0], 0.0, none[0], 0.0, none) if drawn else None
    monkeypatch.setattr(fast, "SCORES", whole // 32)
    mask = mx.arange(T)[:, None] >= mx.arange(T)
    q, k, v, c = (draw(name, B, H, T, D) for name in "qkvc")

    def tiles(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return fast.tiled(attention.attend, q, k, v, mask if drawn else "causal", drop, 0.3, 0.0)

    def scores(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attention.attend(q, k, v, mask, drop, 0.3, 0.0)

    def peak(run: Callable) -> int:
        mx.eval(q, k, v, c, mask)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.vjp(run, [q, k, v], [c]))
        return mx.get_peak_memory() - before

    assert peak(tiles) < 4 * whole < peak(scores) / 1.5
    assert max(sizes(lambda *given: mx.vjp(scores, list(given), [c])[1], q, k, v)) == whole
    monkeypatch.setattr(mx, "custom_function", Opened)
    more = [mask, none, none[0]] if drawn else []
    assert max(sizes(tiles, q, k, v)) <= fast.SCORES
    assert max(sizes(lambda *given: list(Opened.backward(given, c, c))[:3], q, k, v, *more)) <= fast.SCORES


@pytest.mark.parametrize(
    ("case", "fused", "whole"), [("llama-gqa", {16}, True), ("llama-gqa", {64}, False), ("gemma2", {16}, False)]
)
def test_few_scores_are_made_as_before(
    case: str, fused: set[int], whole: bool, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the threshold, and without a gradient where Metal has a kernel for the width and scores are not capped."""
    config, used, plain = recipe(case), [], attention.attend
    monkeypatch.setattr(device, "use", lambda _: mx.Device(mx.cpu))
    monkeypatch.setattr(attention, "attend", lambda q, *given: used.append(q.shape[2]) or plain(q, *given))
    monkeypatch.setattr(fast, "FUSED", fused)
    trained = engine("mlxgpt", config, moved(config))
    batch = trained._arrays(packed(config))

    def loss_and_logits() -> tuple[float, mx.array]:
        score = trained.evaluate(packed(config))["loss"]
        trained.model.eval()
        logits = trained.model(batch.tokens[:, :20], cache=model.make_cache(trained.model, 4, 20))
        trained.model.train()
        return score, logits

    before, logits = loss_and_logits()
    trained._objective(batch, trained._keys(1), mx.array(0, mx.uint32))
    length = batch.tokens.shape[1]
    assert set(used) == {length, 20}
    used.clear()
    monkeypatch.setattr(fast, "SCORES", 4 * 4 * 31 * 8)
    trained._run_evaluate = trained._evaluate  # not what was compiled before
    after, tiled = loss_and_logits()
    assert set(used) == {length, 20} if whole else max(used) < 10
    assert after == pytest.approx(before, rel=1e-6)
    agree("logits", np.array(tiled), np.array(logits), 1e-5)
    used.clear()
    trained._objective(batch, trained._keys(1), mx.array(0, mx.uint32))
    assert max(used) < 10


def test_metals_attention_kernel_serves_the_widths_that_mlx_names() -> None:
    """As has_fused_kernel and use_fallback in MLX 0.32's backend/metal/scaled_dot_product_attention.cpp."""
    widths = (16, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256)
    assert [width for width in widths if fast.fuses(width, 0.0)] == [64, 72, 80, 96, 128]
    assert not fast.fuses(64, 30.0)


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2", "gemma2"])
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize(
    "loop", [{}, {"dropout": 0.2}, {"checkpoint_activations": True}], ids=["", "dropout", "recompute"]
)
def test_a_model_in_tiles_is_the_same(
    case: str, scale: float, loop: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On what says that it is a GPU, against PyTorch, which knows no tiles."""
    config = recipe(case, loop)
    params = moved(config, scale)
    expected = probe("torch_ref", config, params)
    used = []
    plain = fast.tile
    monkeypatch.setattr(fast, "tile", lambda *given: used.append(plain(*given)) or used[-1])
    monkeypatch.setattr(fast, "SCORES", 2 * 4 * 4 * 31 * 8)
    monkeypatch.setattr(device, "use", lambda _: mx.Device(mx.cpu))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    found = probe("mlxgpt", config, params)
    assert all(0 < size < 31 for size in used) and used
    agree("logits", found.logits, expected.logits, 1e-5)
    assert worst_gradient("gradient", found.gradients, expected.gradients) <= 1e-5
