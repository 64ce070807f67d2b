"""Token ids that someone calls a model with, in MLX: in any form, and no id passes that the vocabulary lacks."""

from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from mlxgpt.common.model import ids
from mlxgpt.layers import Array


def taken(tokens: Any, n_vocab: int, read: bool) -> tuple[Array, Array | None]:
    """The ids (B, T) on the device, and which of them the vocabulary has, (B, T) bool; None: all have been read.

    What the host has is read there, which costs the device nothing. An array is read where ``read`` allows to wait for
    its values; else, and while MLX compiles, an id that is missing is not read from the table, where MLX would read
    other memory: its embedding becomes NaN, and so does all that sees it.

    Raises:
        UserError: not (B, T) integers, no token at all, or an id that the vocabulary lacks.
    """
    if not isinstance(tokens, mx.array):
        return mx.array(ids.host(tokens, n_vocab)), None
    ids.check_form(tokens.shape, mx.issubdtype(tokens.dtype, mx.integer), str(tokens.dtype))
    if read:
        try:
            values = np.asarray(tokens)
        except ValueError:  # inside mx.compile or mx.vmap, where arrays have no values
            values = None
        if values is not None:
            ids.check(values, n_vocab)
            return tokens, None
    inside = (tokens >= 0) & (tokens < n_vocab)
    return mx.where(inside, tokens, 0), inside
