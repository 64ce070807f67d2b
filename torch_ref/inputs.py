"""Token ids that someone calls a model with, in PyTorch: in any form, and no id passes that the vocabulary lacks."""

from typing import Any

import torch

from mlxgpt.common.model import ids
from torch_ref.layers import Array


def taken(tokens: Any, n_vocab: int, read: bool, device: torch.device) -> tuple[Array, Array | None]:
    """The ids (B, T) on the device, and which of them the vocabulary has, (B, T) bool; None: all have been read.

    What the host has is read there, which costs the device nothing. A tensor of a GPU is read where ``read`` allows to
    wait for its values; else CUDA's own kernel stops the process at an id that is missing, and on MPS, whose kernels
    may not, its embedding becomes NaN, and so does all that sees it. Compiled code has checks of its own.

    Raises:
        UserError: not (B, T) integers, no token at all, or an id that the vocabulary lacks.
    """
    if not isinstance(tokens, torch.Tensor):
        return torch.from_numpy(ids.host(tokens, n_vocab)).to(device), None
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    ids.check_form(tokens.shape, whole, str(tokens.dtype))
    if tokens.dtype not in (torch.int32, torch.int64):
        tokens = tokens.to(torch.int64)
    if torch.compiler.is_compiling():
        return tokens.to(device), None
    if read or tokens.device.type == "cpu":
        ids.check(tokens.cpu().numpy(), n_vocab)
        return tokens.to(device), None
    if tokens.device.type == "cuda":
        return tokens, None
    inside = (tokens >= 0) & (tokens < n_vocab)
    return torch.where(inside, tokens, 0), inside
