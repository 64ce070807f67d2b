"""A folder on disk as a model that runs: ``model, tokenizer = load(folder)``."""

from pathlib import Path

import torch

from mlxgpt.common import checkpoint, folder, params, tokenizer
from mlxgpt.common.errors import UserError
from torch_ref import device as devices
from torch_ref.model import Model


def load(path: str | Path, device: str = "auto", dtype: str = "float32") -> tuple[Model, "tokenizer.Tokenizer | None"]:
    """Reads a run (best, else last), a checkpoint, a Hugging Face folder or a hub id.

    Args:
        path: where the model is.
        device: ``auto``, ``cpu``, ``gpu``, ``mps``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``: what the weights are kept and the blocks computed in.

    Returns:
        The model, whose ``model(tokens)`` maps (B, T) ids to float32 logits (B, T, V), and its tokenizer, which is
        None where the folder has none.

    Raises:
        UserError: no model is there, it is damaged, or its architecture is not supported.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}: expected float32 or bfloat16")
    where = devices.use(device)
    place = checkpoint.resolve_model(path)
    config = folder.read_config(place)
    model = Model(config, getattr(torch, dtype)).to(where, getattr(torch, dtype))
    arrays = folder.read_params(place, config)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in params.table(config):
            weights[name].copy_(torch.from_numpy(arrays.pop(name)))
    return model.eval(), tokenizer.load_tokenizer(place) if tokenizer.has_tokenizer(place) else None
