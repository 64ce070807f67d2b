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

import torch

from torch_ref import fast, quant
from torch_ref.layers import Array, finish


class Options(NamedTuple):
    """What does not change from step to step.

    ``needs`` says what is differentiated: "none", "hidden" (a frozen head), "both", or "low" (a frozen head's update).
    ``recompute`` keeps nothing of the logits' size for "both", at the price of one more product. ``bits`` > 0: the
    weight is quantized.
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
    """z (..., V) in float32 (float64 of float64) of hidden states (..., C), weight (V, C) and bias (V,)."""
    z = fast.linear(hidden, weight.to(hidden.dtype))
    if bias is not None:
        z = z.to(torch.promote_types(z.dtype, torch.float32)) + bias
    return finish(z, logit_scale, soft_cap)


def rows(weight: list[Array], at: "slice | Array", o: Options) -> Array:
    """Rows of a head whose columns lie in several arrays; where it is quantized, the first three are one of them."""
    parts = [each[at] for each in weight]
    if o.bits:
        parts[:3] = [quant.dequantize(parts[0], parts[1], parts[2], o.bits, o.group_size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def cap_slope(z: Array, o: Options) -> Array:
    """k, the derivative of capped logits by what is capped."""
    return 1 - torch.square(z / o.soft_cap)


def sweep(hidden: Array, weight: list[Array], targets: Array, bias: Array | None, o: Options) -> Sweep:
    """The pass: hidden (N, C), weight (V, C) as ``rows`` takes it, targets (N,), bias (V,) or None."""
    (N, C), V = hidden.shape, weight[0].shape[0]
    h, y = hidden, targets[:, None]
    like: dict[str, Any] = dict(dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    top, total = torch.full((N, 1), -float("inf"), **like), torch.zeros((N, 1), **like)
    z_y, z_sum = torch.zeros((N, 1), **like), torch.zeros((N, 1), **like)
    pull, even = torch.zeros((N, C), **like), torch.zeros((N, C), **like)  # sum of exp(z - top) k w, and of k w
    kept, tops = [], []
    for start in range(0, V, o.chunk):
        chunk = slice(start, start + o.chunk)
        w, b = rows(weight, chunk, o), None if bias is None else bias[chunk]
        n = w.shape[0]
        z = logits(h, w, b, o.logit_scale, o.soft_cap)
        at = y - start
        inside = (at >= 0) & (at < n)
        z_y = z_y + torch.where(inside, torch.gather(z, -1, torch.clip(at, 0, n - 1)), 0.0)
        if o.label_smoothing:
            z_sum = z_sum + z.sum(dim=-1, keepdim=True)
        last, top = top, torch.maximum(top, z.amax(dim=-1, keepdim=True))
        k = cap_slope(z, o) if o.soft_cap else None
        e, fade = z.sub_(top).exp_(), torch.exp(last - top)
        total = total * fade + e.sum(dim=-1, keepdim=True)
        if o.needs != "none":
            w = w.to(h.dtype)
            if k is not None:
                e = e * k
                if o.label_smoothing:
                    even = even + k.to(h.dtype) @ w
            e = e.to(h.dtype)
            pull.mul_(fade).add_(e @ w)
            kept, tops = [*kept, e] if keeps(o) else [], [*tops, top]
    lse = top + torch.log(total)
    slope = cap_slope(z_y, o) if o.soft_cap else torch.ones_like(z_y)
    losses = lse - (1 - o.label_smoothing) * z_y
    gradient = torch.zeros((N, C), **like)
    if o.label_smoothing:
        losses = losses - o.label_smoothing / V * z_sum
        even = even if o.soft_cap else rows(weight, slice(None), o).sum(dim=0)
    if o.z_loss:
        losses = losses + o.z_loss * torch.square(lse)
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
        x = torch.cat([x, cotangents], dim=-1)
    grad, h = torch.empty((V, x.shape[1]), dtype=x.dtype, device=x.device), hidden
    for start in range(0, V, o.chunk):
        top, k = done.tops[start // o.chunk], None
        if keeps(o):
            e = done.kept[start // o.chunk]
        else:
            chunk = slice(start, start + o.chunk)
            w, b = rows(weight, chunk, o), None if bias is None else bias[chunk]
            z = logits(h, w, b, o.logit_scale, o.soft_cap)
            e = torch.exp(z - top)
            if o.soft_cap:
                k = cap_slope(z, o)
                e = e * k
        scale = (1 + 2 * o.z_loss * done.lse) * torch.exp(top - done.lse)
        part = e.to(h.dtype).T @ (scale * x).to(h.dtype)  # (n, C)
        if o.label_smoothing:
            even = x.sum(dim=0) if k is None else k.T @ x
            part = part - o.label_smoothing / V * even
        grad[start : start + o.chunk] = part
    grad.index_add_(0, targets, (o.label_smoothing - 1) * done.slope * x)
    return (grad, None) if bias is None else (grad[:, :-1], grad[:, -1])


class Losses(torch.autograd.Function):
    """The sweep, and its gradients by any cotangents."""

    @staticmethod
    def forward(ctx: Any, h: Array, y: Array, b: Array | None, o: Options, *w: Array) -> Array:
        done = sweep(h, list(w), y, b, o)
        ctx.save_for_backward(h, y, b, done.gradient, done.lse, done.slope, *w, *done.kept, *done.tops)
        ctx.options, ctx.own = o, len(w)
        return done.losses

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> tuple:
        h, y, b, gradient, lse, slope, *rest = ctx.saved_tensors
        o, own, c = ctx.options, ctx.own, cotangents[0][:, None]
        grad_h = (c * gradient).to(h.dtype)
        if o.needs == "hidden":
            return grad_h, None, None, None, *[None] * own
        w, rest = rest[:own], rest[own:]
        held = len(rest) // 2 if keeps(o) else 0
        done = Sweep(c, gradient, lse, slope, rest[:held], rest[held:])
        grad_w, grad_b = weight_gradient(h, w, y, b, c, done, o)
        grad_b = None if b is None or grad_b is None else grad_b.to(b.dtype)
        return grad_h, None, grad_b, None, *[None] * (own - 1), grad_w.to(w[-1].dtype)


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
        hidden, blocks = torch.cat([hidden, low[0]], dim=-1), [*blocks, low[1]]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    if o.needs == "none":
        with torch.no_grad():
            return sweep(hidden, blocks, targets, bias, o).losses.reshape(shape)
    return Losses.apply(hidden, targets, bias, o, *blocks).reshape(shape)
