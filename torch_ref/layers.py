"""The layers that a model is made of, in PyTorch: matrices with or without an adapter, embeddings and norms.

Sizes in the comments: B rows, T tokens, C n_embd, V vocab_size, r rank of an adapter.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from mlxgpt.common.config import ModelConfig
from torch_ref import fast

Array = torch.Tensor


class Dropout(NamedTuple):
    """What the dropout and the noise of one forward pass are a function of; a rate of 0 is off."""

    rate: float
    keys: Array  # (1 + 3 n_layer,) int32, a key a site
    first_row: Array  # () int32, index of row 0 in the global batch
    neftune: float  # alpha of the noise on embeddings
    neftune_key: Array  # () int32
    adapter_rate: float
    adapter_keys: Array  # (adapted matrices,) int32


class Update(Protocol):
    """What an adapter adds to a matrix; adapters.py implements it."""

    def linear(self, module: "Linear", x: Array, drop: Dropout | None) -> Array:
        """The output (..., n_out) of a linear layer for its input x (..., n_in)."""
        ...

    def rows(self, module: "Embedding", index: Array) -> Array:
        """The embeddings (..., C) of the token ids ``index`` (...)."""
        ...

    def head(self, module: "Embedding", x: Array) -> Array:
        """The logits (..., V) of a tied head for hidden states x (..., C)."""
        ...

    def factors(self, module: Any, x: Array, drop: Dropout | None) -> tuple[Array, Array]:
        """u (..., r) and B (V, r): a head's update adds u B^T to the logits of hidden states x (..., C)."""
        ...


class Matrix(nn.Module):
    """W (n_out, n_in), as it is or quantized (quant.py), and the update that adapters.adapt may give it."""

    bits = group_size = 0
    adapter: Update | None = None
    lora_a: Array
    lora_b: Array
    magnitude: Array
    start_a: Array
    start_b: Array

    def __init__(self, n_out: int, n_in: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((n_out, n_in)))

    def matmul(self, x: Array, bias: Array | None = None) -> Array:
        """x W^T + bias, in x's dtype."""
        return fast.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def tensors(self) -> list[Array]:
        """The weight, or a quantized one's packed words, scales and biases."""
        return [self.weight]

    def matrix(self) -> Array:
        """W."""
        return self.weight

    def __repr__(self) -> str:
        return f"{type(self).__name__}{tuple(self.tensors()[0].shape)}"


class Linear(Matrix):
    """y = x W^T + b in x's dtype."""

    def __init__(self, n_in: int, n_out: int, bias: bool):
        super().__init__(n_out, n_in)
        self.bias = nn.Parameter(torch.zeros((n_out,))) if bias else None

    def forward(self, x: Array, drop: Dropout | None = None) -> Array:
        if self.adapter is not None:
            return self.adapter.linear(self, x, drop)
        return self.matmul(x, self.bias)


class Embedding(Matrix):
    """Rows of W (n_rows, C)."""

    def forward(self, index: Array) -> Array:
        return self.rows(index) if self.adapter is None else self.adapter.rows(self, index)

    def rows(self, index: Array) -> Array:
        """W[index]."""
        return F.embedding(index, self.weight)

    def head(self, x: Array) -> Array:
        """x W^T: the logits of a tied head."""
        return self.matmul(x) if self.adapter is None else self.adapter.head(self, x)


class Bias(nn.Module):
    """The bias of a head whose matrix is the embedding."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros((size,)))


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis, in float32 inside.

    ``name`` as ModelConfig.biased has it.
    """

    def __init__(self, size: int, config: ModelConfig, name: str):
        super().__init__()
        self._kind, self._eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.zeros((size,))) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros((size,))) if config.has_bias(name) else None

    def forward(self, x: Array) -> Array:
        weight, bias = (None if each is None else each.to(x.dtype) for each in (self.weight, self.bias))
        wide = torch.promote_types(x.dtype, torch.float32)
        if self._kind == "rms1" and self.weight is not None:  # Gemma scales before it rounds
            return F.rms_norm(x.to(wide), x.shape[-1:], 1 + self.weight.to(wide), self._eps).to(x.dtype)
        if self._kind == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, bias, self._eps)
        y = F.rms_norm(x.to(wide), x.shape[-1:], None, self._eps).to(x.dtype)
        return y if weight is None else y * weight


def finish(logits: Array, scale: float, soft_cap: float) -> Array:
    """z = cap tanh(scale l / cap) in float32 of raw logits l = h W^T + b; a scale or cap of 0 is off.

    Every path to logits ends here: the whole head (model.py) and its chunks (head.py).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale:
        logits = logits * scale
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits
