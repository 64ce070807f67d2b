"""What a model is trained to do. An objective maps (model, batch arrays) to losses, one an item, and their weights."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt import device, head
from mlxgpt.common.config import TrainConfig
from mlxgpt.common.errors import UserError
from mlxgpt.layers import Array, Dropout
from mlxgpt.model import Model


class Arrays(NamedTuple):
    """A batch on the device; see common/batch.py."""

    tokens: Array  # (B, T) int32
    targets: Array  # (B, T) int32
    weights: Array  # (B, T) float32
    positions: Array | None
    segments: Array | None
    beside: dict[str, Array] = {}  # noqa: RUF012  (never changed)


def cross_entropy(
    logits: Array, targets: Array, label_smoothing: float = 0.0, z_loss: float = 0.0, deterministic: bool = False
) -> Array:
    """Loss (...) of float32 logits (..., V) against targets (...); ``deterministic``: without a scatter.

    (1 - s) nll + s mean over V of -log p (Szegedy et al. 2016), plus z logsumexp^2 (Chowdhery et al. 2022, PaLM).
    """
    lse = mx.logsumexp(logits, axis=-1)
    if deterministic:
        target = mx.where(targets[..., None] == mx.arange(logits.shape[-1]), logits, 0.0).sum(axis=-1)
    else:
        target = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    loss = lse - target
    if label_smoothing:
        loss = loss + label_smoothing * (target - logits.mean(axis=-1))
    if z_loss:
        loss = loss + z_loss * mx.square(lse)
    return loss


def lm(
    model: Model,
    batch: Arrays,
    config: TrainConfig,
    drop: Dropout | None = None,
    plain: bool = False,
    temperature: float = 1.0,
) -> Array:
    """Next-token losses (B, T); ``plain`` leaves out what only training adds, gradients included.

    The logits are divided by ``temperature``.
    """
    recompute = config.checkpoint_activations and not plain
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments, drop=drop, recompute=recompute)
    smoothing, z_loss = (0.0, 0.0) if plain else (config.label_smoothing, config.z_loss)
    module: Any = model.wte if model.config.tied else model.lm_head
    chunk = config.head_chunk(prod(batch.tokens.shape), model.config.vocab_size, device.is_gpu(hidden))
    if not chunk or hasattr(module, "magnitude"):  # dora needs the norms of all vocabulary entries
        logits = model.head(hidden, drop)
        logits = logits if temperature == 1 else logits / temperature
        return cross_entropy(logits, batch.targets, smoothing, z_loss, config.deterministic)
    biased: Any = model.lm_head if model.config.has_bias("lm_head") else None
    bias = biased.bias if biased else None
    low = module.adapter.factors(module, hidden, drop) if module.adapter else None
    trained = {*module.trainable_parameters(), *(biased.trainable_parameters() if biased else ())}
    if "bias" in trained and "weight" not in trained:  # a bias is a column of B whose input is 1
        one, column = mx.ones((*hidden.shape[:-1], 1), hidden.dtype), biased.bias[:, None]
        low = (
            (mx.concatenate([low[0], one], axis=-1), mx.concatenate([low[1], column], axis=-1))
            if low
            else (one, column)
        )
        bias = None
    needs = "none" if plain else "both" if "weight" in trained else "low" if low else "hidden"
    finishing, kind = (model.config.final_softcap, model.config.logit_scale), (module.bits, module.group_size)
    if temperature != 1:
        finishing = (finishing[0] / temperature, (finishing[1] or 1.0) / temperature)
    options = head.Options(chunk, needs, smoothing, z_loss, *finishing, recompute, *kind, config.deterministic)
    return head.token_losses(hidden, module.tensors(), batch.targets, options, bias, low)


def classify(model: Model, batch: Arrays, config: TrainConfig, drop: Dropout | None = None) -> Array:
    """Losses (B, T) of a classifier's scores at every token; the weights pick each text's last."""
    made, smoothing = scores(model, batch, config, drop), config.label_smoothing
    return cross_entropy(made, batch.targets, smoothing, config.z_loss, config.deterministic)


def scores(model: Model, batch: Arrays, config: TrainConfig, drop: Dropout | None = None) -> Array:
    """A classifier's logits (B, T, n), from what each token has seen."""
    recompute = config.checkpoint_activations
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments, drop=drop, recompute=recompute)
    return model.head(hidden, drop)


def own(objective: Callable[[Model, Arrays], Array]) -> Callable[..., Array]:
    """An objective of someone's own, (model, batch) -> losses (B, T), as an engine calls one.

    Calls of the model in it drop what the step's masks say.
    """

    def losses(model: Model, batch: Arrays, config: TrainConfig, drop: Dropout | None = None) -> Array:
        model.give(drop)
        try:
            found = objective(model, batch)
        finally:
            model.give(None)
        shape = tuple(getattr(found, "shape", ())) if isinstance(found, Array) else type(found).__name__
        if shape != tuple(batch.targets.shape):
            raise UserError(
                f"objective returned {shape}: expected losses of shape {tuple(batch.targets.shape)}, one a target: "
                "no sum and no mean, which the trainer takes"
            )
        return found.astype(mx.float32)

    return losses
