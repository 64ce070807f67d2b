"""What MLX's backends compute slowly or in too much memory, spelled out.

The CPU's transcendental functions are scalar code, about 15 ns an element; these are polynomials that compile to
vector code. Each keeps its inputs alone for the gradient and makes the rest again, which costs less than to keep it.
A GPU has kernels of its own, but for attention none with a gradient: ``tiled``.
"""

from collections.abc import Callable
from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt.layers import Array, Dropout

TILE = 64  # queries whose weights exist at a time; 128 costs an eighth more CPU time, at a width of 512
SHAPES = 256  # for which a function is compiled
MANY = 1 << 14  # elements below which the kernels' overhead is all that counts
SCORES = 1 << 25  # attention scores that may exist at once on a GPU: 128 MiB in float32
FUSED = {64, 72, 80, 96, 128}  # widths of heads for which Metal's attention of many queries keeps no scores


def helps(x: Array) -> bool:
    """Whether this file is faster than the backend's own functions on x."""
    return x.size >= MANY and x.dtype == mx.float32 and mx.default_device() == mx.Device(mx.cpu)


def compiled(function: Callable[..., Array]) -> Callable[..., Array]:
    """``function`` compiled for the first SHAPES shapes of its arguments, and as it is for others.

    MLX keeps what it compiled for each shape and looks through all of it at each call; a server sees ever new shapes.
    """
    known: set[tuple[tuple[int, ...], ...]] = set()
    quick = mx.compile(function)

    def call(*arrays: Array) -> Array:
        shapes = tuple(each.shape for each in arrays)
        if shapes not in known:
            if len(known) >= SHAPES:
                return function(*arrays)
            known.add(shapes)
        return quick(*arrays)

    return call


def exp(x: Array) -> Array:
    """e^x for x up to 88, within 1.2e-7 of it; below -87 it is e^-87. MLX's own is 8 times slower on the CPU."""
    if mx.default_device() == mx.Device(mx.gpu):
        return mx.exp(x)
    x = mx.maximum(x, -87.0)
    t = x * 1.4426950408889634 + 12582912.0  # 1.5 * 2^23: the integer n nearest to x / ln 2, in the low bits
    n = t - 12582912.0
    f = (x - n * 0.693145751953125) - n * 1.42860682030941723e-6  # ln 2 in two parts
    g = f * f
    p = (0.041666187937311895 + 0.00836960292201252 * f) + g * 0.0013951670534103962
    p = (1 + f) + g * ((0.5000000100828874 + 0.16666512838882447 * f) + g * p)  # minimax on |f| <= ln 2 / 2
    return mx.view(mx.view(p, mx.int32) + mx.left_shift(mx.view(t, mx.int32), 23), mx.float32)


def logistic(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    return 1 / (1 + exp(mx.minimum(-x, 87.0)))


_logistic = compiled(logistic)
_silu_times = compiled(lambda x, y: x * logistic(x) * y)


@mx.custom_function
def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    return _logistic(x)


@sigmoid.vjp
def _sigmoid_vjp(x: Array, cotangent: Array, _: Array) -> Array:
    s = logistic(x)
    return cotangent * s * (1 - s)


@mx.custom_function
def silu_times(x: Array, y: Array) -> Array:
    """x / (1 + e^-x) y."""
    return _silu_times(x, y)


@silu_times.vjp
def _silu_times_vjp(primals: tuple[Array, Array], cotangent: Array, _: Array) -> tuple[Array, Array]:
    x, y = primals
    s = logistic(x)
    return cotangent * y * (s * (1 + x * (1 - s))), cotangent * (x * s)


def exp_or_zero(x: Array) -> Array:
    """e^x, and 0 below e^-80: what is masked is nothing."""
    return mx.where(x < -80.0, 0.0, exp(x))


_weights = compiled(lambda scores, top: exp_or_zero(scores - top))


def few(q: Array, k: Array) -> bool:
    """Whether ``whole`` is the fastest without a gradient: few scores a head, and many of all rows together."""
    scores, cpu = q.shape[2] * k.shape[2], mx.default_device() == mx.Device(mx.cpu)
    return cpu and q.dtype == mx.float32 and scores < MANY <= scores * q.shape[0] * q.shape[1]


def whole(q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> Array:
    """softmax(scale q k^T) v whose weights all exist at once; shapes as attend has them."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]

    @mx.custom_function
    def run(q: Array, k: Array, v: Array) -> Array:
        z = ((q * scale).reshape(B, K, -1, D) @ k.swapaxes(-1, -2)).reshape(B, K, H // K, T, S)
        if mask is not None:
            z = mx.where(mask if mask.ndim == 2 else mask[:, None], z, -1e30)
        e = _weights(z, z.max(axis=-1, keepdims=True))
        y = e.reshape(B, K, -1, S) @ v / e.sum(axis=-1, keepdims=True).reshape(B, K, -1, 1)
        return y.reshape(B, H, T, D)

    @run.vjp
    def run_vjp(primals: tuple[Array, ...], cotangent: Array, _: Array) -> tuple[Array, ...]:
        def plain(q: Array, k: Array, v: Array) -> Array:
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

        return tuple(mx.vjp(plain, list(primals), [cotangent])[1])

    made: Any = run(q, k, v)
    return made


def lean(slopes: Array, T: int, S: int, dtype: mx.Dtype, starts: Array | None = None) -> Array:
    """What ALiBi adds to scores: slope (j - i) <= 0 of query i, the last T of S, at key j; slopes (H,) -> (H, T, S).

    With ``starts`` (B,), where the first query of each row stands: (B, H, T, S).
    """
    i, j = mx.arange(S - T, S)[:, None], mx.arange(S)
    if starts is not None:
        i = starts[:, None, None, None] + mx.arange(T)[:, None]
    return (slopes[:, None, None] * (j - i)).astype(dtype)


def attention(q: Array, k: Array, v: Array, mask: Array, scale: float, slopes: Array | None = None) -> Array:
    """softmax(scale q k^T) v, which keeps no weights for the gradient (Dao et al. 2022); shapes as attend has them.

    One tile of queries of one row after the other, so that no more than its weights exist at a time, and none of keys
    that come after it: ``mask`` lets no query look ahead of its own place, which is S - T + its index.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    q, k, v = q.reshape(B, K, H // K, T, D), k[:, :, None], v[:, :, None]
    tiles = [(n, start, min(start + TILE, T)) for n in range(B) for start in range(0, T, TILE)]

    def scores(q: Array, k: Array, mask: Array, n: int, stop: int) -> Array:
        """Of a tile of queries, scaled, and the keys that it may look at, (K, H / K, t, s)."""
        t, s = q.shape[-2], k.shape[-2]
        seen, z = mask if mask.ndim == 2 else mask[n, 0], q @ k.swapaxes(-1, -2)
        if slopes is not None:
            z = z + lean(slopes, t, s, z.dtype).reshape(K, H // K, t, s)
        return mx.where(seen[stop - t : stop, :s], z, -1e30)

    @mx.custom_function
    def run(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
        made, sizes, done = [], [], []
        for n, start, stop in tiles:
            s = S - T + stop
            z = scores(after(done, q[n, :, :, start:stop]) * scale, k[n, :, :, :s], mask, n, stop)
            top = z.max(axis=-1, keepdims=True)
            e = _weights(z, top)
            total = e.sum(axis=-1, keepdims=True)
            done = [(e @ v[n, :, :, :s]) / total]
            made, sizes = made + done, [*sizes, top + mx.log(total)]
        return joined(made, B), joined(sizes, B)

    @run.vjp
    def run_vjp(
        primals: tuple[Array, ...], cotangents: tuple[Array, Array], outputs: tuple[Array, Array]
    ) -> tuple[Array, ...]:
        (q, k, v, mask), c, (y, lse) = primals, cotangents[0], outputs
        delta, done, by_q = (c * y).sum(axis=-1, keepdims=True), [], []
        by_k, by_v = ([mx.zeros((K, 1, S, D))] * B for _ in range(2))
        for n, start, stop in tiles:
            s = S - T + stop
            keys, values = k[n, :, :, :s], v[n, :, :, :s]
            turned, slopes = after(done, q[n, :, :, start:stop]) * scale, c[n, :, :, start:stop]
            p = _weights(scores(turned, keys, mask, n, stop), lse[n, :, :, start:stop])
            by_score = p * (slopes @ values.swapaxes(-1, -2) - delta[n, :, :, start:stop])
            by_q.append((by_score @ keys) * scale)
            by_k[n], by_v[n] = (
                # a group of query heads shares its key head
                total + mx.pad(rows(left).swapaxes(-1, -2) @ rows(right), [(0, 0), (0, 0), (0, S - s), (0, 0)])
                for total, left, right in ((by_k[n], by_score, turned), (by_v[n], p, slopes))
            )
            done = [by_q[-1], by_k[n], by_v[n]]
        return joined(by_q, B), mx.stack(by_k), mx.stack(by_v), mx.zeros_like(mask)

    made: Any = run(q, k, v, mask)
    return made[0].reshape(B, H, T, D)


def rows(x: Array) -> Array:
    """(K, G, t, n) as (K, 1, G t, n)."""
    return x.reshape(x.shape[0], 1, -1, x.shape[-1])


def joined(tiles: list[Array], batch: int) -> Array:
    """Tiles (K, G, t, n), those of one row of the batch after those of another, as (B, K, G, T, n)."""
    each = len(tiles) // batch
    return mx.stack([mx.concatenate(tiles[at : at + each], axis=-2) for at in range(0, len(tiles), each)])


def after(done: list[Array], x: Array) -> Array:
    """x, but not before ``done``."""
    return mx.depends([x], done)[0] if done else x


def fuses(head_dim: int, softcap: float) -> bool:
    """Whether attention without a gradient and without dropout is one kernel on Metal, which makes no scores."""
    return head_dim in FUSED and not softcap


def tile(rows: int, heads: int, queries: int, keys: int, device: mx.Device) -> int:
    """Queries of a tile of attention on a GPU that is not fused; 0: its scores are few enough to exist as a whole.

    MLX's fused attention has no gradient on Metal: in training all scores (B, H, T, S) exist and their softmax is kept.
    Without a gradient they exist where a head has another width than ``FUSED`` or scores are capped.
    """
    if device == mx.Device(mx.cpu) or rows * heads * queries * keys <= SCORES:
        return 0
    most = max(1, SCORES // 2 // (rows * heads * keys))
    return most // 32 * 32 or most


def tiled(
    attend: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    mask: Array | str | None,
    drop: Dropout | None,
    scale: float,
    softcap: float,
    slopes: Array | None = None,
) -> Array:
    """attend(q, k, v, mask, ..., slopes), in tiles of queries, made again for the gradient, if tile() says so.

    A tile has all rows and heads. One follows the other, and none has keys that come after it: no query looks ahead of
    its own place, which is S - T + its index. Dropout is a function of a weight's place in the whole.
    """
    B, H, T, S = *q.shape[:3], k.shape[2]
    size = tile(B, H, T, S, mx.default_device())
    if not size or mask is None:
        return attend(q, k, v, mask, drop, scale, softcap, slopes)
    masks, random = [] if isinstance(mask, str) else [mask], [drop.keys, drop.first_row] if drop and drop.rate else []
    tiles = [(start, min(start + size, T)) for start in range(0, T, size)]

    def of(start: int, stop: int, extra: list[Array]) -> tuple[int, Callable[..., Array]]:
        """How many keys a tile looks at, and its attention as a function of its q, k and v."""
        s, some, drawn, at = S - T + stop, mask, None, None
        if masks:
            some = extra[0][..., start:stop, :s]
        if drop and random:
            drawn = drop._replace(keys=extra[-2], first_row=extra[-1])
            at = mx.arange(H, dtype=mx.uint32)[:, None] * T + mx.arange(start, stop, dtype=mx.uint32)
            at = at[..., None] * S + mx.arange(s, dtype=mx.uint32)
        return s, lambda q, k, v: attend(q, k, v, some, drawn, scale, softcap, slopes, at)

    @mx.custom_function
    def run(q: Array, k: Array, v: Array, *extra: Array) -> Array:
        made: list[Array] = []
        for start, stop in tiles:
            s, function = of(start, stop, list(extra))
            made.append(function(after(made[-1:], q[:, :, start:stop]), k[:, :, :s], v[:, :, :s]))
        return mx.concatenate(made, axis=2)

    @run.vjp
    def run_vjp(primals: tuple[Array, ...], cotangent: Array, _: Array) -> tuple[Array, ...]:
        q, k, v, *extra = primals
        sums, by_q, done = [mx.zeros(each.shape) for each in (k, v)], [], []
        for start, stop in tiles:
            s, function = of(start, stop, extra)
            given = [after(done, q[:, :, start:stop]), k[:, :, :s], v[:, :, :s]]
            grad, *parts = mx.vjp(function, given, [cotangent[:, :, start:stop]])[1]
            for n, part in enumerate(parts):
                sums[n] = sums[n] + mx.pad(part.astype(mx.float32), [(0, 0), (0, 0), (0, S - s), (0, 0)])
            by_q, done = [*by_q, grad], [grad, *sums]
        by_k, by_v = (each.astype(k.dtype) for each in sums)
        return mx.concatenate(by_q, axis=2), by_k, by_v, *(mx.zeros_like(each) for each in extra)

    made: Any = run(q, k, v, *masks, *random)
    return made
