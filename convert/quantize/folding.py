"""Where a scale of channels can hide: a matrix's columns times s, and what writes those channels divided by s.

Matrices that read the same activations share the scale, and so do heads that share their values. The model computes
the same function. What cannot be scaled is said, never approximated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlxgpt.common.config import ModelConfig


@dataclass(frozen=True)
class Fold:
    """Matrices that read the same channels, and the module that writes them: a norm, or rows of a matrix.

    ``rows`` (n_in,): the output of the writer that each channel reads. ``power``: the writer is divided by s^power.
    ``offset``: what a norm adds to its weight before it multiplies.
    """

    readers: tuple[str, ...]
    writer: str
    rows: np.ndarray
    power: float = 1.0
    offset: float = 0.0

    def shared(self, values: np.ndarray) -> np.ndarray:
        """``values`` (n_in,), each the mean over the channels that read the same output."""
        sums, count = np.bincount(self.rows, values), np.bincount(self.rows)
        return (sums / np.maximum(count, 1))[self.rows]


@dataclass(frozen=True)
class Unfolded:
    """Matrices that cannot be scaled, and why."""

    readers: tuple[str, ...]
    why: str


_RESIDUAL = "what they read is added to the residual as well"
_TIED = "the head is the embedding"
_BARE = "the norm before them has no weights"
_CURVED = "the activation before them is not linear"


def folds(config: ModelConfig) -> list[Fold | Unfolded]:
    """Every matrix but the embeddings once, block by block, the head last."""
    found: list[Fold | Unfolded] = []
    for n in range(config.n_layer):
        found += _block(config, f"h.{n}.")
    if config.labels:
        return found  # score stays as it is
    if config.tied:
        return [*found, Unfolded(("lm_head",), _TIED)]
    return [*found, _after_norm(config, "ln_f" if config.final_norm else "", ("lm_head",))]


def left(config: ModelConfig) -> list[str]:
    """A line on the matrices that cannot be scaled, by the reason."""
    reasons: dict[str, set[str]] = {}
    for place in folds(config):
        if isinstance(place, Unfolded):
            reasons.setdefault(place.why, set()).update(
                name.rpartition("h.")[2].lstrip("0123456789.") for name in place.readers
            )
    return [f"awq: {', '.join(sorted(names))} without a scale: {why}" for why, names in reasons.items()]


def _block(config: ModelConfig, block: str) -> list[Fold | Unfolded]:
    """The groups of one block: what attention reads, its c_proj, what the MLP reads, its c_proj."""
    qkv = ("attn.c_attn",) if config.fused_qkv else ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    fc = ("mlp.c_gate_fc",) if config.fused_mlp else ("mlp.c_gate", "mlp.c_fc") if config.gated else ("mlp.c_fc",)
    qkv, fc = (tuple(block + name for name in names) for names in (qkv, fc))
    found: list[Fold | Unfolded] = []
    if config.placement in ("post", "post_add"):
        found += [Unfolded(qkv, _RESIDUAL), Unfolded(fc, _RESIDUAL)]
    elif config.placement == "parallel":
        found.append(_after_norm(config, f"{block}ln_1", (*qkv, *fc)))
    else:
        found += [_after_norm(config, f"{block}ln_1", qkv), _after_norm(config, f"{block}ln_2", fc)]
    values = f"{block}attn.c_attn" if config.fused_qkv else f"{block}attn.v_proj"
    found.append(Fold((f"{block}attn.c_proj",), values, _value_rows(config)))
    return [*found, _after_mlp(config, block)]


def _after_norm(config: ModelConfig, norm: str, readers: tuple[str, ...]) -> Fold | Unfolded:
    """``readers`` of a norm, "" for none."""
    if not norm:
        return Unfolded(readers, _RESIDUAL)
    if not config.norm_weight:
        return Unfolded(readers, _BARE)
    return Fold(readers, norm, np.arange(config.n_embd), offset=1.0 if config.norm == "rms1" else 0.0)


def _value_rows(config: ModelConfig) -> np.ndarray:
    """The row of c_attn, or of v_proj, that each channel of attention's output is a mean of."""
    heads, kv, size = config.n_head, config.n_kv_head, config.head_dim
    head, inside = np.repeat(np.arange(heads), size), np.tile(np.arange(size), heads)
    if config.qkv_by_head:
        return head * 3 * size + 2 * size + inside
    first = (heads + kv) * size if config.fused_qkv else 0
    return first + head // (heads // kv) * size + inside


def _after_mlp(config: ModelConfig, block: str) -> Fold | Unfolded:
    """The MLP's c_proj: act(gate) * fc is linear in fc; relu(x / s) = relu(x) / s."""
    reader, rows = (f"{block}mlp.c_proj",), np.arange(config.n_hidden)
    if config.fused_mlp:
        return Fold(reader, f"{block}mlp.c_gate_fc", config.n_hidden + rows)
    if config.gated:
        return Fold(reader, f"{block}mlp.c_fc", rows)
    power = {"relu": 1.0, "relu2": 0.5}.get(config.activation)
    return Unfolded(reader, _CURVED) if power is None else Fold(reader, f"{block}mlp.c_fc", rows, power)


def fold(arrays: Mapping[str, np.ndarray], place: Fold, scale: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of ``arrays`` that change where the channels are scaled, by name, in float32.

    Args:
        arrays: weights and biases of the readers and of the writer, float32, by names of params.table.
        place: one of ``folds``.
        scale: (n_in,) positive, equal where ``place.rows`` is.
    """
    made = {f"{name}.weight": arrays[f"{name}.weight"] * scale for name in place.readers}
    weight = f"{place.writer}.weight"
    divisor = np.ones(len(arrays[weight]))
    divisor[place.rows] = scale**place.power
    if arrays[weight].ndim == 1:
        made[weight] = (arrays[weight] + place.offset) / divisor - place.offset
    else:
        made[weight] = arrays[weight] / divisor[:, None]
    bias = f"{place.writer}.bias"
    if bias in arrays:
        made[bias] = arrays[bias] / divisor
    return {name: array.astype(np.float32) for name, array in made.items()}
