"""What a model is trained to do. An objective maps (model, batch arrays) to losses, one an item, and their weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mlxgpt.common.config import TrainConfig
from mlxgpt.common.errors import UserError
from torch_ref import device, head
from torch_ref.layers import Array, Dropout
from torch_ref.model import Model


class Arrays(NamedTuple):
    """A batch on the device; see common/batch.py."""

    tokens: Array  # (B, T) int32
    targets: Array  # (B, T) int32
    weights: Array  # (B, T) float32
    positions: Array | None
    segments: Array | None
    beside: dict[str, Array] = {}  # noqa: RUF012  (never changed)


def cross_entropy(logits: Array, targets: Array, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Array:
    """Loss (...) of float32 logits (..., V) against targets (...).

    (1 - s) nll + s mean over V of -log p (Szegedy et al. 2016), plus z logsumexp^2 (Chowdhery et al. 2022, PaLM).
    """
    loss = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten().long(), reduction="none", label_smoothing=label_smoothing
    )
    loss = loss.reshape(targets.shape)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, dim=-1).square()
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
    # of the largest batch: a chunk that follows the batch's size would be compiled for every size
    tokens = (config.micro_batch_size or config.batch_size) * model.config.block_size
    chunk = config.head_chunk(tokens, model.config.vocab_size, device.is_gpu(hidden))
    if not chunk or hasattr(module, "magnitude"):  # dora needs the norms of all vocabulary entries
        logits = model.head(hidden, drop)
        logits = logits if temperature == 1 else logits / temperature
        return cross_entropy(logits, batch.targets, smoothing, z_loss)
    biased: Any = model.lm_head if model.config.has_bias("lm_head") else None
    bias = biased.bias if biased else None
    low = module.adapter.factors(module, hidden, drop) if module.adapter else None
    parameters = {**dict(module.named_parameters()), **dict(biased.named_parameters() if biased else ())}
    trained = {name for name, each in parameters.items() if each.requires_grad}
    if "bias" in trained and "weight" not in trained:  # a bias is a column of B whose input is 1
        one, column = hidden.new_ones((*hidden.shape[:-1], 1)), biased.bias[:, None]
        low = (torch.cat([low[0], one], dim=-1), torch.cat([low[1], column], dim=-1)) if low else (one, column)
        bias = None
    needs = "none" if plain else "both" if "weight" in trained else "low" if low else "hidden"
    finishing, kind = (model.config.final_softcap, model.config.logit_scale), (module.bits, module.group_size)
    if temperature != 1:
        finishing = (finishing[0] / temperature, (finishing[1] or 1.0) / temperature)
    options = head.Options(chunk, needs, smoothing, z_loss, *finishing, recompute, *kind)
    return head.token_losses(hidden, module.tensors(), batch.targets, options, bias, low)


def classify(model: Model, batch: Arrays, config: TrainConfig, drop: Dropout | None = None) -> Array:
    """Losses (B, T) of a classifier's scores at every token; the weights pick each text's last."""
    return cross_entropy(scores(model, batch, config, drop), batch.targets, config.label_smoothing, config.z_loss)


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
        return found.to(torch.float32)

    return losses
