"""What a model is trained to do. An objective maps (model, batch arrays) to losses, one an item, and their weights."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mlxgpt.common.config import TrainConfig
from torch_ref import head
from torch_ref.model import Dropout, Model


class Arrays(NamedTuple):
    """A batch on the device; see common/batch.py."""

    tokens: torch.Tensor  # (B, T) int32
    targets: torch.Tensor  # (B, T) int32
    weights: torch.Tensor  # (B, T) float32
    positions: torch.Tensor | None
    segments: torch.Tensor | None


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
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
    model: Model, batch: Arrays, config: TrainConfig, drop: Dropout | None = None, plain: bool = False
) -> torch.Tensor:
    """Next-token losses (B, T); ``plain`` leaves out what only training adds, gradients included."""
    recompute = config.checkpoint_activations and not plain
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments, drop=drop, recompute=recompute)
    smoothing, z_loss = (0.0, 0.0) if plain else (config.label_smoothing, config.z_loss)
    module = model.wte if model.config.tied else model.lm_head
    if (
        not config.loss_chunk
        or model.config.vocab_size <= config.loss_chunk
        or module._update is not None
        or not hasattr(module, "weight")
    ):
        return cross_entropy(model.head(hidden, drop), batch.targets, smoothing, z_loss)
    weight = module.weight
    bias = model.lm_head.bias if model.config.head_bias else None
    trains = any(each.requires_grad for each in module.parameters())
    needs, cap = "none" if plain else "both" if trains else "hidden", model.config.final_softcap
    options = head.Options(config.loss_chunk, needs, smoothing, z_loss, cap, recompute)
    return head.token_losses(hidden, weight, batch.targets, options, bias)


def classify(model: Model, batch: Arrays, config: TrainConfig, drop: Dropout | None = None) -> torch.Tensor:
    """Losses (B, T) of a classifier's scores at every token; the weights pick each text's last."""
    return cross_entropy(scores(model, batch, config, drop), batch.targets, config.label_smoothing, config.z_loss)


def scores(model: Model, batch: Arrays, config: TrainConfig, drop: Dropout | None = None) -> torch.Tensor:
    """A classifier's logits (B, T, n), from what each token has seen."""
    recompute = config.checkpoint_activations
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments, drop=drop, recompute=recompute)
    return model.head(hidden, drop)
