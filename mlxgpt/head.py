"""Losses straight from hidden states: the logits exist for a chunk of the vocabulary at a time, never whole.

Chunks are processed as FlashAttention processes keys (Dao et al. 2022; online softmax: Milakov and Gimelshein 2018),
with a running maximum, a running sum and a running p W. One pass computes the losses and their gradient by the hidden
states up to the cotangents, so a frozen head needs nothing more; a trainable one keeps exp(z), one array of the logits'
size where whole logits need three, or recomputes it.
With vocabulary entry v, target y, s = label_smoothing, a = logit_scale (0: 1) and q = 1 + 2 z_loss lse:

    l_v = h w_v + b_v,  z_v = cap tanh(a l_v / cap),  p = softmax(z),  k_v = 1 - (z_v / cap)^2
    loss = lse - (1 - s) z_y - s mean(z) + z_loss lse^2,  d loss / d l_v = a (q p_v - (1 - s) [v = y] - s / V) k_v

Sizes: N tokens, C width, V vocabulary entries, n of them in a chunk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt import fast, quant
from mlxgpt.layers import Array, finish


class Options(NamedTuple):
    """What does not change from step to step.

    ``needs`` says what is differentiated: "none", "hidden" (a frozen head), "both", or "low" (a frozen head's update).
    ``recompute`` keeps nothing of the logits' size for "both", at the price of one more product. ``bits`` > 0: the
    weight is quantized. ``deterministic``: no scatter, which a GPU adds in whatever order its threads arrive.
    """

    chunk: int
    needs: str = "both"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float = 0.0
    logit_scale: float = 0.0
    recompute: bool = False
    bits: int = 0
    group_size: int = 0
    deterministic: bool = False


class Sweep(NamedTuple):
    """What one pass over the vocabulary leaves."""

    losses: Array  # (N,)
    gradient: Array  # (N, C) d loss / d h; without needs: zeros
    lse: Array  # (N, 1)
    slope: Array  # (N, 1) k_y
    kept: list[Array]  # a chunk each: (N, n) exp(z - top) k
    tops: list[Array]  # a chunk each: (N, 1)


def logits(
    hidden: Array, weight: Array, bias: Array | None = None, logit_scale: float = 0.0, soft_cap: float = 0.0
) -> Array:
    """z (..., V) in float32 of hidden states (..., C), weight (V, C) and bias (V,)."""
    z = hidden @ weight.astype(hidden.dtype).T
    if bias is not None:
        z = z.astype(mx.float32) + bias
    return finish(z, logit_scale, soft_cap)


def rows(weight: list[Array], at: "slice | Array", o: Options) -> Array:
    """Rows of a head whose columns lie in several arrays; where it is quantized, the first three are one of them."""
    parts = [each[at] for each in weight]
    if o.bits:
        parts[:3] = [quant.dequantize(parts[0], parts[1], parts[2], o.bits, o.group_size)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def cap_slope(z: Array, o: Options) -> Array:
    """k, the derivative of capped logits by what is capped."""
    return 1 - mx.square(z / o.soft_cap)


def after(done: list[Array], *arrays: Array) -> list[Array]:
    """The arrays, but not before ``done``: chunk follows chunk, and buffers are used again."""
    return mx.depends(list(arrays), done)


def sweep(hidden: Array, weight: list[Array], targets: Array, bias: Array | None, o: Options) -> Sweep:
    """The pass: hidden (N, C), weight (V, C) as ``rows`` takes it, targets (N,), bias (V,) or None."""
    (N, C), V = hidden.shape, weight[0].shape[0]
    h, y = hidden, targets[:, None]
    top, total = mx.full((N, 1), -float("inf")), mx.zeros((N, 1))
    z_y, z_sum = mx.zeros((N, 1)), mx.zeros((N, 1))
    pull, even = mx.zeros((N, C)), mx.zeros((N, C))  # sum of exp(z - top) k w, and of k w
    kept, tops = [], []
    places = mx.arange(0, V, o.chunk, dtype=y.dtype)  # a constant would be compiled into kernels of each chunk
    for start in range(0, V, o.chunk):
        chunk = slice(start, start + o.chunk)
        w, b = rows(weight, chunk, o), None if bias is None else bias[chunk]
        n = w.shape[0]
        z = logits(h, w, b, o.logit_scale, o.soft_cap)
        at = y - places[start // o.chunk :][:1]
        inside = (at >= 0) & (at < n)
        z_y = z_y + mx.where(inside, mx.take_along_axis(z, mx.clip(at, 0, n - 1), axis=-1), 0.0)
        if o.label_smoothing:
            z_sum = z_sum + z.sum(axis=-1, keepdims=True)
        last, top = top, mx.maximum(top, z.max(axis=-1, keepdims=True))
        k = cap_slope(z, o) if o.soft_cap else None
        e, fade = fast.exp(z - top), fast.exp(last - top)
        total = total * fade + e.sum(axis=-1, keepdims=True)
        if o.needs != "none":
            w = w.astype(h.dtype)
            if k is not None:
                e = e * k
                if o.label_smoothing:
                    even = even + k.astype(h.dtype) @ w
            e = e.astype(h.dtype)
            pull = pull * fade + e @ w
            kept, tops = [*kept, e] if keeps(o) else [], [*tops, top]
        h, pull = after([z_y, z_sum, total, even], h, pull)
    lse = top + mx.log(total)
    slope = cap_slope(z_y, o) if o.soft_cap else mx.ones((N, 1))
    losses = lse - (1 - o.label_smoothing) * z_y
    gradient = mx.zeros((N, C))
    if o.label_smoothing:
        losses = losses - o.label_smoothing / V * z_sum
        even = even if o.soft_cap else rows(weight, slice(None), o).sum(axis=0)
    if o.z_loss:
        losses = losses + o.z_loss * mx.square(lse)
    if o.needs != "none":
        gradient = pull * ((1 + 2 * o.z_loss * lse) / total) - ((1 - o.label_smoothing) * slope) * rows(
            weight, targets, o
        )
        if o.label_smoothing:
            gradient = gradient - o.label_smoothing / V * even
        if o.logit_scale:
            gradient = gradient * o.logit_scale
    return Sweep(losses.squeeze(-1), gradient, lse, slope, kept, tops)


def keeps(o: Options) -> bool:
    """Whether the sweep keeps what the weight's gradient needs; with a cap, smoothing would need a second array."""
    return o.needs == "both" and not o.recompute and not (o.soft_cap and o.label_smoothing)


def weight_gradient(
    hidden: Array,
    weight: list[Array],
    targets: Array,
    bias: Array | None,
    cotangents: Array,
    done: Sweep,
    o: Options,
) -> tuple[Array, Array | None]:
    """Gradients of weight (V, C), or "low" (V, r), and of bias (V,), by the cotangents (N, 1) of the losses."""
    V = weight[0].shape[0]
    if o.logit_scale:
        cotangents = cotangents * o.logit_scale
    x = cotangents * hidden  # (N, C), and a column more if there is a bias, whose input is 1
    if o.needs == "low":
        x = x[:, -weight[-1].shape[1] :]
    if bias is not None:
        x = mx.concatenate([x, cotangents], axis=-1)
    parts, h = [], hidden
    for start in range(0, V, o.chunk):
        top, k = done.tops[start // o.chunk], None
        if keeps(o):
            e = done.kept[start // o.chunk]
        else:
            chunk = slice(start, start + o.chunk)
            w, b = rows(weight, chunk, o), None if bias is None else bias[chunk]
            z = logits(h, w, b, o.logit_scale, o.soft_cap)
            e = fast.exp(z - top)
            if o.soft_cap:
                k = cap_slope(z, o)
                e = e * k
        scale = (1 + 2 * o.z_loss * done.lse) * fast.exp(top - done.lse)
        if o.deterministic:
            hit = targets[:, None] == mx.arange(start, start + e.shape[1])
            e, scale = e * scale - mx.where(hit, (1 - o.label_smoothing) * done.slope, 0.0), mx.ones((1, 1))
        part = (e.astype(h.dtype).T @ (scale * x).astype(h.dtype)).astype(mx.float32)  # (n, C)
        if o.label_smoothing:
            even = x.sum(axis=0) if k is None else k.T @ x
            part = part - o.label_smoothing / V * even
        parts.append(part)
        h, x = after([part], h, x)
    grad = mx.concatenate(parts)
    if not o.deterministic:
        grad = grad.at[targets].add((o.label_smoothing - 1) * done.slope * x)
    return (grad, None) if bias is None else (grad[:, :-1], grad[:, -1])


def token_losses(
    hidden: Array,
    weight: "Array | Sequence[Array]",
    targets: Array,
    o: Options,
    bias: Array | None = None,
    low: tuple[Array, Array] | None = None,
) -> Array:
    """Losses (...) in float32 of hidden states (..., C) with the head weight (V, C), bias (V,), and targets (...) < V.

    Equal to losses.cross_entropy of ``logits``, for any cotangents. What ``needs`` leaves out gets no gradient.

    Args:
        weight: or its packed words, scales and biases; see Options.bits.
        low: (u, B), (..., r) and (V, r): u B^T is added to the logits.
    """
    assert o.chunk > 0 and o.needs in ("none", "hidden", "both", "low")
    shape, blocks = targets.shape, [weight] if isinstance(weight, Array) else list(weight)
    if low is not None:
        hidden, blocks = mx.concatenate([hidden, low[0]], axis=-1), [*blocks, low[1]]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if o.needs == "none":
        return mx.stop_gradient(sweep(hidden, blocks, targets, bias, o).losses).reshape(shape)
    own = len(blocks)

    @mx.custom_function
    def run(h: Array, y: Array, *more: Array) -> tuple:
        return tuple(sweep(h, list(more[:own]), y, more[own] if more[own:] else None, o))

    @run.vjp
    def run_vjp(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
        h, y, *more = primals
        done, c = Sweep(*outputs), cotangents[0][:, None]
        grads = [(c * done.gradient).astype(h.dtype), *(mx.zeros_like(each) for each in (y, *more))]
        if o.needs != "hidden":
            b = more[own] if more[own:] else None
            grad_w, grad_b = weight_gradient(h, more[:own], y, b, c, done, o)
            grads[1 + own] = grad_w.astype(more[own - 1].dtype)
            if grad_b is not None and b is not None:
                grads[2 + own] = grad_b.astype(b.dtype)
        return tuple(grads)

    outputs: Any = run(hidden, targets, *blocks, *([] if bias is None else [bias]))
    return outputs[0].reshape(shape)
