"""MLX's affine format (common/model/affine.py) on the device, in PyTorch."""

import torch

from torch_ref.layers import Array


def quantize(x: Array, bits: int, group_size: int) -> tuple[Array, Array, Array]:
    """Words, and scales and biases in x's dtype, of x (..., n) by its last axis: the bits of affine.quantize."""
    bins = 2**bits - 1
    groups = x.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    negative = low.abs() > high.abs()
    edge = torch.where(negative, low, high)  # the value farthest from 0 is kept as it is
    scales = ((high - low) / bins).clamp(min=1e-7)
    scales = torch.where(negative, scales, -scales)
    steps = torch.round(edge / scales)
    scales = torch.where(steps == 0, scales, edge / steps)
    biases = torch.where(steps == 0, 0.0, edge)
    levels = ((groups - biases[..., None]) / scales[..., None]).round_().clamp_(0, bins).to(torch.uint8).flatten(-2)
    packed = levels[..., :: 8 // bits].contiguous()
    for place in range(1, 8 // bits):
        packed |= levels[..., place :: 8 // bits] << bits * place
    return packed.view(torch.int32), scales.to(x.dtype), biases.to(x.dtype)


def dequantize(words: Array, scales: Array, biases: Array, bits: int, group_size: int) -> Array:
    """q * scale + bias in float32: words (..., n) to (..., 32 n / bits)."""
    packed = words.contiguous().view(torch.uint8)
    levels = [packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    made = torch.stack(levels, dim=-1).to(torch.float32).reshape(*scales.shape, group_size)
    made.mul_(scales[..., None]).add_(biases[..., None])
    return made.flatten(-2)
