"""The layers that a model is made of, in MLX: matrices with or without an adapter, embeddings and norms.

Sizes in the comments: B rows, T tokens, C n_embd, V vocab_size, r rank of an adapter.
"""

from typing import Any, NamedTuple, Protocol, cast

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlxgpt.common.config import ModelConfig

Array = mx.array


class Dropout(NamedTuple):
    """What the dropout and the noise of one forward pass are a function of; a rate of 0 is off."""

    rate: float
    keys: Array  # (1 + 3 n_layer,) uint32, a key a site
    first_row: Array  # () uint32, index of row 0 in the global batch
    neftune: float  # alpha of the noise on embeddings
    neftune_key: Array  # () uint32
    adapter_rate: float
    adapter_keys: Array  # (adapted matrices,) uint32


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
        self.weight = mx.zeros((n_out, n_in))

    def matmul(self, x: Array, bias: Array | None = None) -> Array:
        """x W^T + bias, in x's dtype."""
        weight = self.weight.astype(x.dtype)
        return x @ weight.T if bias is None else mx.addmm(bias.astype(x.dtype), x, weight.T)

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
        if bias:
            self.bias = mx.zeros((n_out,))

    def __call__(self, x: Array, drop: Dropout | None = None) -> Array:
        if self.adapter is not None:
            return self.adapter.linear(self, x, drop)
        return self.matmul(x, self.bias if "bias" in self else None)


ONE_HOT = 4096  # rows of a weight in a product of gather's gradient


@mx.custom_function
def gather(weight: Array, index: Array) -> Array:
    """weight[index], whose gradient is a matrix product: a GPU's scatter adds in whatever order its threads arrive."""
    return weight[index]


@gather.vjp
def _gather_vjp(primals: tuple[Array, Array], cotangent: Array, _: Array) -> tuple[Array, Array]:
    (weight, index), made = primals, []
    given = cotangent.reshape(index.size, -1)
    for start in range(0, weight.shape[0], ONE_HOT):
        given = mx.depends([given], made[-1:])[0] if made else given  # one array of ones and zeros at a time
        rows = mx.arange(start, min(start + ONE_HOT, weight.shape[0]))
        made.append((index.reshape(-1, 1) == rows).astype(given.dtype).T @ given)
    return mx.concatenate(made).reshape(weight.shape), mx.zeros_like(index)


class Embedding(Matrix):
    """Rows of W (n_rows, C)."""

    def __init__(self, n_rows: int, n_embd: int, deterministic: bool):
        super().__init__(n_rows, n_embd)
        self._deterministic = deterministic

    def __call__(self, index: Array) -> Array:
        return self.rows(index) if self.adapter is None else self.adapter.rows(self, index)

    def rows(self, index: Array) -> Array:
        """W[index]."""
        return cast(Array, gather(self.weight, index)) if self._deterministic else self.weight[index]

    def head(self, x: Array) -> Array:
        """x W^T: the logits of a tied head."""
        return self.matmul(x) if self.adapter is None else self.adapter.head(self, x)


class Bias(nn.Module):
    """The bias of a head whose matrix is the embedding."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = mx.zeros((size,))


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis, in float32 inside.

    ``name`` as ModelConfig.biased has it.
    """

    def __init__(self, size: int, config: ModelConfig, name: str):
        super().__init__()
        self._kind, self._eps = config.norm, config.norm_eps
        self.weight = mx.zeros((size,)) if config.norm_weight else None
        self.bias = mx.zeros((size,)) if config.has_bias(name) else None

    def __call__(self, x: Array) -> Array:
        weight, bias = (None if each is None else each.astype(x.dtype) for each in (self.weight, self.bias))
        if self._kind == "rms1" and self.weight is not None:  # Gemma scales before it rounds
            return mx.fast.rms_norm(x.astype(mx.float32), 1 + self.weight.astype(mx.float32), self._eps).astype(x.dtype)
        if self._kind == "layer":
            return mx.fast.layer_norm(x, weight, bias, self._eps)
        return mx.fast.rms_norm(x, weight, self._eps)


def finish(logits: Array, scale: float, soft_cap: float) -> Array:
    """z = cap tanh(scale l / cap) in float32 of raw logits l = h W^T + b; a scale or cap of 0 is off.

    Every path to logits ends here: the whole head (model.py) and its chunks (head.py).
    """
    logits = logits.astype(mx.float32)
    if scale:
        logits = logits * scale
    return soft_cap * mx.tanh(logits / soft_cap) if soft_cap else logits
