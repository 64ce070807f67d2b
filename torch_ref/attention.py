"""Attention, in PyTorch. Sizes in the comments are those of model.py."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import positions
from torch_ref import fast, noise
from torch_ref.cache import Cache
from torch_ref.layers import Array, Dropout, Linear, Norm

Mask = Array | str | fast.BlockMask | None


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x_i, x_{i + d/2}) by the position's angle; x (B, heads, T, D), cos, sin (..., T, d/2)."""
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def weigh(q: Array, k: Array, mask: Array | None, scale: float, softcap: float) -> Array:
    """softmax(scale q k^T), (B, K, H / K, T, S): how much each query takes of each value; arguments as in attend."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    q = (q * scale).reshape(B, K, H // K, T, D)
    scores = q @ k.reshape(B, K, 1, S, D).swapaxes(-1, -2)  # (B, K, H / K, T, S)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.is_floating_point():
        scores = scores + mask.unflatten(1, (K, H // K))
    elif mask is not None:
        scores = scores.masked_fill(~(mask if mask.ndim == 2 else mask[:, None]), -float("inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    drop: Dropout | None,
    scale: float,
    softcap: float,
    slopes: Array | None = None,
) -> Array:
    """softmax(scale q k^T) v; q (B, H, T, D), k and v (B, K, S, D), mask True where a query may look.

    Or a mask (1 or B, H, T, S) of floats, which are added to scores. ``slopes`` (H,) are ALiBi's for a mask of blocks.
    """
    if isinstance(mask, fast.BlockMask):
        return fast.flex(q, k, v, mask, scale, softcap, slopes)
    if not (drop and drop.rate) and not softcap:
        causal = isinstance(mask, str)
        q, k, v = fast.arrange(q, k, v)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if causal else mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    assert not isinstance(mask, str)
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    weights = weigh(q, k, mask, scale, softcap)
    if drop and drop.rate:
        weights = noise.dropout(weights, drop.rate, drop.keys[0], drop.first_row)
    return (weights @ v.reshape(B, K, 1, S, D)).reshape(B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017) with grouped heads (Ainslie et al. 2023)."""

    _slopes: Array | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, width, kv = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self._config, self._scale = config, config.attn_scale or config.head_dim**-0.5
        slopes = torch.from_numpy(positions.slopes(config.n_head)) if config.position == "alibi" else None
        self.register_buffer("_slopes", slopes, persistent=False)
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
            q, k, v = self.c_attn(x, drop).split([H * D, K * D, K * D], dim=-1)
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
        return weigh(q, k, mask, self._scale, self._config.attn_softcap).reshape(*q.shape[:3], -1)

    def forward(
        self,
        x: Array,
        mask: Mask,
        rope: tuple[Array, Array] | None,
        cache: Cache | None,
        drop: Dropout | None,
    ) -> Array:
        B, T, _ = x.shape
        q, k, v = self.project(x, rope, drop)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, k, v, mask, drop, self._scale, self._config.attn_softcap, self._slopes)
        return self.c_proj(y.swapaxes(1, 2).reshape(B, T, -1), drop)
