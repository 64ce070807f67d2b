"""Attention, in MLX. Sizes in the comments are those of model.py."""

from functools import partial

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlxgpt import fast, noise
from mlxgpt.cache import Cache
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import positions
from mlxgpt.layers import Array, Dropout, Linear, Norm


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x_i, x_{i + d/2}) by the position's angle; x (B, heads, T, D), cos, sin (..., T, d/2)."""
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return mx.concatenate([rotate(x[..., :turned], cos, sin), x[..., turned:]], axis=-1)
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def weigh(q: Array, k: Array, mask: Array | None, scale: float, softcap: float, slopes: Array | None = None) -> Array:
    """softmax(scale q k^T), (B, K, H / K, T, S): how much each query takes of each value; arguments as in attend."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    q = (q * scale).reshape(B, K, H // K, T, D)
    scores = q @ k.reshape(B, K, 1, S, D).swapaxes(-1, -2)  # (B, K, H / K, T, S)
    if softcap:
        scores = softcap * mx.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + fast.lean(slopes, T, S, scores.dtype).reshape(K, H // K, T, S)
    if mask is not None and mask.dtype != mx.bool_:
        scores = scores + mask.reshape(B, K, H // K, T, S)
    elif mask is not None:
        scores = mx.where(mask if mask.ndim == 2 else mask[:, None], scores, -float("inf"))
    return mx.softmax(scores, axis=-1, precise=True)


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | str | None,
    drop: Dropout | None,
    scale: float,
    softcap: float,
    slopes: Array | None = None,
    elements: Array | None = None,  # see noise.dropout
) -> Array:
    """softmax(scale q k^T) v; q (B, H, T, D), k and v (B, K, S, D), mask True where a query may look.

    Or a mask (B, H, T, S) of floats, which are added to scores. ``slopes`` (H,): a head's scores fall with the distance
    in tokens times its slope (Press et al. 2022, ALiBi).
    """
    if not (drop and drop.rate) and not softcap:
        boolean = isinstance(mask, Array) and mask.dtype == mx.bool_
        if isinstance(mask, Array) and boolean and q.shape[2] * k.shape[2] >= fast.MANY and fast.helps(q):
            return fast.attention(q, k, v, mask, scale, slopes)
        if slopes is not None:
            assert not isinstance(mask, str)
            added = fast.lean(slopes, q.shape[2], k.shape[2], q.dtype)[None]
            mask = added if mask is None else mx.where(mask, added, -float("inf"))
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    assert not isinstance(mask, str)
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    weights = weigh(q, k, mask, scale, softcap, slopes)
    if drop and drop.rate:
        weights = noise.dropout(weights, drop.rate, drop.keys[0], drop.first_row, elements)
    return (weights @ v.reshape(B, K, 1, S, D)).reshape(B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017) with grouped heads (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, width, kv = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self._config, self._scale = config, config.attn_scale or config.head_dim**-0.5
        self._slopes = mx.array(positions.slopes(config.n_head)) if config.position == "alibi" else None
        if config.fused_qkv:
            self.c_attn = Linear(c, width + 2 * kv, config.has_bias("attn.c_attn"))
        else:
            self.q_proj = Linear(c, width, config.has_bias("attn.q_proj"))
            self.k_proj = Linear(c, kv, config.has_bias("attn.k_proj"))
            self.v_proj = Linear(c, kv, config.has_bias("attn.v_proj"))
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = Norm(width if full else config.head_dim, config, "attn.q_norm")
            self.k_norm = Norm(kv if full else config.head_dim, config, "attn.k_norm")
        self.c_proj = Linear(width, c, config.has_bias("attn.c_proj"))

    def project(self, x: Array, rope: tuple[Array, Array] | None, drop: Dropout | None) -> tuple[Array, Array, Array]:
        """Queries (B, H, T, D), keys and values (B, K, T, D) of x (B, T, C), normed and at their positions."""
        B, T, _ = x.shape
        H, K, D = self._config.n_head, self._config.n_kv_head, self._config.head_dim
        if self._config.qkv_by_head:
            qkv = self.c_attn(x, drop).reshape(B, T, H, 3, D)
            q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
        elif self._config.fused_qkv:
            q, k, v = mx.split(self.c_attn(x, drop), [H * D, (H + K) * D], axis=-1)
        else:
            q, k, v = self.q_proj(x, drop), self.k_proj(x, drop), self.v_proj(x, drop)
        if self._config.qk_norm == "full":
            q, k = self.q_norm(q.reshape(B, T, -1)), self.k_norm(k.reshape(B, T, -1))
        q, k, v = q.reshape(B, T, H, D), k.reshape(B, T, K, D), v.reshape(B, T, K, D)
        if self._config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)  # (B, heads, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v

    def weights(self, x: Array, mask: Array | None, rope: tuple[Array, Array] | None) -> Array:
        """Where the tokens of x (B, T, C) look, (B, H, T, T): what the heads compute with, but for dropout."""
        q, k, _ = self.project(x, rope, None)
        return weigh(q, k, mask, self._scale, self._config.attn_softcap, self._slopes).reshape(*q.shape[:3], -1)

    def __call__(
        self,
        x: Array,
        mask: Array | str | None,
        rope: tuple[Array, Array] | None,
        cache: Cache | None,
        drop: Dropout | None,
    ) -> Array:
        B, T, _ = x.shape
        q, k, v = self.project(x, rope, drop)
        if cache is not None:
            k, v = cache.append(k, v)
        softcap, slopes = self._config.attn_softcap, self._slopes
        if isinstance(mask, Array) and mask.dtype != mx.bool_:
            slopes = None  # the mask has what they add
        if not (self.training or softcap) and self._slopes is None and fast.few(q, k):
            assert not isinstance(mask, str)
            y = fast.whole(q, k, v, mask, self._scale)
        else:
            fused = not self.training and fast.fuses(q.shape[-1], softcap) and slopes is None
            run = attend if fused else partial(fast.tiled, attend)
            y = run(q, k, v, mask, drop, self._scale, softcap, slopes)
        return self.c_proj(y.swapaxes(1, 2).reshape(B, T, -1), drop)
