"""What each kind of device wants so that its fast kernels apply, and their wrong ones do not.

CUDA: FlexAttention where a mask is more than causal, for flash attention takes none and a dense mask is (B, 1, T, T);
float32 with grouped heads in the memory-efficient kernel, which has no groups and is the only one for float32.
MPS: attention on permuted views and bfloat16 products of more than two axes were wrong or not repeatable upstream.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Array = torch.Tensor
NARROWEST = 16  # of a head in FlexAttention's kernels


def kind(device: torch.device) -> str:
    """The device's type: what everything here is chosen by."""
    return device.type


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x W^T + bias, x (..., n_in), weight (n_out, n_in)."""
    if kind(x.device) != "mps":
        return F.linear(x, weight, bias)
    y = F.linear(x.reshape(-1, x.shape[-1]), weight.contiguous(), bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def arrange(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """q (B, H, T, D), k and v (B, K, S, D) as the device's attention kernels take them; k and v may get H heads."""
    if kind(q.device) == "mps":
        return q.contiguous(), k.contiguous(), v.contiguous()
    times = q.shape[1] // k.shape[1]
    if kind(q.device) == "cuda" and q.dtype == torch.float32 and times > 1:
        k, v = (each[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for each in (k, v))
    return q, k, v


def running_sums(x: Array) -> Array:
    """Sums x (B, n) along the rows; in CUDA's deterministic mode, where cumsum raises, by doubling the distance."""
    if kind(x.device) != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return torch.cumsum(x, dim=-1)
    far = 1
    while far < x.shape[-1]:
        x = torch.cat([x[:, :far], x[:, far:] + x[:, :-far]], dim=-1)
        far *= 2
    return x


@functools.cache
def has_triton() -> bool:
    """Whether FlexAttention's kernels can be compiled; without Triton they would hold all scores."""
    from torch.utils._triton import has_triton

    return has_triton()


def flexes(device: torch.device, head_dim: int) -> bool:
    """Whether FlexAttention serves heads of this width on the device."""
    return kind(device) == "cuda" and head_dim >= NARROWEST and has_triton()


@functools.cache
def compiled(function: Callable) -> Callable:
    """``function`` compiled, once."""
    return torch.compile(function)


def call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function`` compiled, also in a step that is not: FlexAttention is slow otherwise."""
    return (function if torch.compiler.is_compiling() else compiled(function))(*args, **kwargs)


def block_mask(T: int, window: int, segments: Array | None, device: torch.device) -> BlockMask:
    """The blocks of the causal mask of T tokens within ``window`` (0: all) and within segments (B, T)."""

    # a tensor: the kernels take no number that torch.compile may have made a variable
    reach = torch.full((), window, dtype=torch.int32, device=device) if window else None

    def sees(b: Array, h: Array, i: Array, j: Array) -> Array:
        seen = j <= i
        if reach is not None:
            seen = seen & (i - j < reach)
        return seen if segments is None else seen & (segments[b, i] == segments[b, j])

    rows = None if segments is None else segments.shape[0]
    return call(create_block_mask, sees, rows, None, T, T, device=device)


def lean(slopes: Array, T: int, S: int, dtype: torch.dtype, starts: Array | None = None) -> Array:
    """What ALiBi adds to scores: slope (j - i) <= 0 of query i, the last T of S, at key j; slopes (H,) -> (H, T, S).

    With ``starts`` (B,), where the first query of each row stands: (B, H, T, S).
    """
    i, j = torch.arange(S - T, S, device=slopes.device)[:, None], torch.arange(S, device=slopes.device)
    if starts is not None:
        i = starts[:, None, None, None] + torch.arange(T, device=slopes.device)[:, None]
    return (slopes[:, None, None] * (j - i)).to(dtype)


def flex(
    q: Array, k: Array, v: Array, mask: BlockMask, scale: float, softcap: float, slopes: Array | None = None
) -> Array:
    """softmax(scale q k^T) v under the mask, scores capped by cap tanh(s / cap), then leaning; no scores are kept."""

    cap = torch.full((), softcap, device=q.device)

    def capped(score: Array, b: Array, h: Array, i: Array, j: Array) -> Array:
        return cap * torch.tanh(score / cap)

    def leaning(score: Array, b: Array, h: Array, i: Array, j: Array) -> Array:
        assert slopes is not None
        return score + slopes[h] * (j - i)

    def both(score: Array, b: Array, h: Array, i: Array, j: Array) -> Array:
        return leaning(capped(score, b, h, i, j), b, h, i, j)

    grouped, leans = q.shape[1] != k.shape[1], slopes is not None
    score_mod = (both if leans else capped) if softcap else leaning if leans else None
    return call(flex_attention, q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=grouped)
