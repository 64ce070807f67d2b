"""An animal as an mlx.nn.Module that somebody wrote with MLX's own layers' functions."""

import math
from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from zoo.choices import Spec
from zoo.in_numpy import slopes
from zoo.names import name


class Home(nn.Module):
    """The model; its parameters are a tree under the style's names, which ``load_weights`` checks."""

    def __init__(self, spec: Spec, state: dict[str, mx.array]):
        super().__init__()
        self._spec = spec
        self.update(tree_unflatten([(path, mx.zeros_like(value)) for path, value in state.items()]), strict=False)
        for key, value in tree_unflatten([(p, mx.zeros_like(v)) for p, v in state.items()]).items():
            self[key] = value

    def __call__(self, ids: mx.array) -> tuple[mx.array, mx.array]:
        """Logits (T, V) and stream (L + 1, T, C) of ids (T,)."""
        s = self._spec
        held: Any = tree_flatten(self.parameters())
        p = {path: value.astype(mx.float32) for path, value in held}
        table = p[name(s, "tok", "w")]
        x = table[ids] * (s.C**0.5 if s.embed == "sqrt(C)" else 1.0)
        T = ids.shape[0]
        if s.position == "learned":
            x = x + p[name(s, "pos", "w")].reshape(-1, s.C)[:T]
        elif s.position == "sin span":
            x = x + nn.SinusoidalPositionalEncoding(s.C)(mx.arange(T))
        elif s.position.startswith("sin"):
            rates = mx.exp(-mx.arange(0, s.C, 2) * (math.log(10000.0) / s.C))
            at = mx.arange(T)[:, None] * rates[None]
            if s.position == "sin pairs":
                x = x + mx.stack([mx.sin(at), mx.cos(at)], axis=-1).reshape(T, s.C)
            else:
                x = x + mx.concatenate([mx.sin(at), mx.cos(at)], axis=-1)
        if s.embed_norm:
            x = norm(s, p, x, "enorm")
        stream = [x]
        for n in range(s.L):
            x = block(s, p, x, n)
            stream.append(x)
        if s.final:
            x = norm(s, p, x, "final")
        logits = x @ table.T if s.tie.startswith("tied") else linear(s, p, x, "head")
        if s.logits == "scaled":
            logits = logits * s.C**-0.5
        if s.logits == "capped":
            logits = mx.tanh(logits / 15.0) * 15.0
        return logits, mx.stack(stream)


Params = dict[str, Any]


def take(s: Spec, p: Params, role: str, leaf: str, n: int, h: int = 0) -> mx.array | None:
    """A tensor or None."""
    found = p.get(name(s, role, leaf, n, h))
    inside = role not in ("tok", "pos", "enorm", "final", "head")
    return found[n] if found is not None and s.stacked and inside else found


def linear(s: Spec, p: Params, x: mx.array, role: str, n: int = 0, h: int = 0) -> mx.array:
    """y = x W^T + b."""
    w, b = take(s, p, role, "w", n, h), take(s, p, role, "b", n, h)
    assert w is not None
    y = x @ (w if s.matrix == "in out" else w.T)
    return y if b is None else y + b


def norm(s: Spec, p: Params, x: mx.array, role: str, n: int = 0) -> mx.array:
    """Over the last axis."""
    w, b = take(s, p, role, "w", n), take(s, p, role, "b", n)
    if s.norm.startswith("layer"):
        return mx.fast.layer_norm(x, w, b, s.eps)
    ones = mx.ones(x.shape[-1:])
    return mx.fast.rms_norm(x, ones if w is None else 1.0 + w if s.norm == "rms1" else w, s.eps)


def rope(s: Spec, x: mx.array) -> mx.array:
    """x (heads, T, D), with MLX's own rotary embedding."""
    pairs = "pairs" in s.position
    y = mirrored(x, s.rotated, pairs) if "reversed" in s.position else x
    y = mx.fast.rope(y[None], s.rotated, traditional=pairs, base=s.theta, scale=1.0, offset=0)[0]
    return mirrored(y, s.rotated, pairs) if "reversed" in s.position else y


def mirrored(x: mx.array, size: int, pairs: bool) -> mx.array:
    """x with the two of each pair swapped: turning that is turning x the other way."""
    y = x.reshape(*x.shape[:-1], size // 2, 2) if pairs else x.reshape(*x.shape[:-1], 2, size // 2)
    return (y[..., ::-1] if pairs else y[..., ::-1, :]).reshape(x.shape)


def attention(s: Spec, p: Params, x: mx.array, n: int) -> mx.array:
    """Causal, x (T, C)."""
    T, H, K, D = x.shape[0], s.H, s.K, s.D
    if s.qkv == "einsum":
        parts = []
        for role in "qkv":
            w, b = take(s, p, role, "w", n), take(s, p, role, "b", n)
            assert w is not None
            y = mx.einsum("tc,hdc->thd" if s.matrix == "out in" else "tc,chd->thd", x, w)
            parts.append(y if b is None else y + b)
        q, k, v = parts
    elif s.qkv == "head list":
        q, k, v = (mx.stack([linear(s, p, x, f"h{role}", n, h) for h in range(H)], axis=1) for role in "qkv")
    elif s.qkv == "apart":
        q, k, v = (linear(s, p, x, role, n) for role in "qkv")
    elif s.qkv == "q, k v":
        q, (k, v) = linear(s, p, x, "q", n), mx.split(linear(s, p, x, "kv", n), 2, axis=-1)
    else:
        y = linear(s, p, x, "qkv", n)
        if s.qkv in ("by head", "by group"):
            y = y.reshape(T, K, -1, D)
            q, k, v = y[:, :, : H // K], y[:, :, H // K], y[:, :, H // K + 1]
        elif s.qkv == "k q v":
            k, q, v = mx.split(y, [K * D, (K + H) * D], axis=-1)
        else:
            q, k, v = mx.split(y, [H * D, (H + K) * D], axis=-1)
    q, k, v = (y.reshape(T, -1, D).swapaxes(0, 1) for y in (q, k, v))
    if s.qk_norm == "head":
        q, k = norm(s, p, q, "qn", n), norm(s, p, k, "kn", n)
    if s.rotated:
        q, k = rope(s, q), rope(s, k)
    mask = nn.MultiHeadAttention.create_additive_causal_mask(T)
    if s.position == "alibi":
        far = mx.arange(T)[None, :] - mx.arange(T)[:, None]
        mask = mask + mx.array(slopes(H))[:, None, None] * far
        mask = mask[None]
    y = mx.fast.scaled_dot_product_attention(q[None], k[None], v[None], scale=s.multiplier, mask=mask)[0]
    if s.qkv == "einsum":
        w, b = take(s, p, "o", "w", n), take(s, p, "o", "b", n)
        assert w is not None
        y = mx.einsum("htd,chd->tc" if s.matrix == "out in" else "htd,hdc->tc", y, w)
        return y if b is None else y + b
    return linear(s, p, y.swapaxes(0, 1).reshape(T, -1), "o", n)


def feed(s: Spec, p: Params, x: mx.array, n: int) -> mx.array:
    """The MLP."""
    act = {"gelu_tanh": nn.gelu_approx, "gelu": nn.gelu, "relu": nn.relu, "relu2": nn.relu2, "silu": nn.silu}[s.act]
    if s.mlp == "plain":
        return linear(s, p, act(linear(s, p, x, "up", n)), "down", n)
    if s.mlp == "gate, up":
        gate, up = linear(s, p, x, "gate", n), linear(s, p, x, "up", n)
    else:
        gate, up = mx.split(linear(s, p, x, "gateup", n), 2, axis=-1)
        gate, up = (gate, up) if s.mlp == "gate up" else (up, gate)
    return linear(s, p, act(gate) * up, "down", n)


def block(s: Spec, p: Params, x: mx.array, n: int) -> mx.array:
    """Block n, norms where the model has them."""
    if s.placement in ("post", "post_add"):
        for branch, role in ((attention, "ln1"), (feed, "ln2")):
            y = branch(s, p, x, n)
            x = x + norm(s, p, y, role, n) if s.placement == "post" else norm(s, p, x + y, role, n)
        return x
    y = attention(s, p, norm(s, p, x, "ln1", n), n)
    if s.placement == "sandwich":
        y = norm(s, p, y, "ln1p", n)
    after = x + y
    if s.placement == "parallel":
        return after + feed(s, p, norm(s, p, x, "ln1", n), n)
    if s.placement == "parallel2":
        return after + feed(s, p, norm(s, p, x, "ln2", n), n)
    z = feed(s, p, norm(s, p, after, "ln2", n), n)
    return after + (norm(s, p, z, "ln2p", n) if s.placement == "sandwich" else z)


def run(spec: Spec, model: Home, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (T, V) and stream (L + 1, T, C) of ids (T,)."""
    logits, stream = model(mx.array(ids))
    return np.array(logits), np.array(stream)
