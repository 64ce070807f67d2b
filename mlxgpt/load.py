"""A folder on disk as a model that runs: ``model, tokenizer = load(folder)``."""

from pathlib import Path

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
from mlx.utils import tree_unflatten

from mlxgpt import device as devices
from mlxgpt.common import checkpoint, folder, params, tokenizer
from mlxgpt.common.errors import UserError
from mlxgpt.model import Model


def load(path: str | Path, device: str = "auto", dtype: str = "float32") -> tuple[Model, "tokenizer.Tokenizer | None"]:
    """Reads a run (best, else last), a checkpoint, a Hugging Face folder or a hub id.

    Args:
        path: where the model is.
        device: ``auto``, ``cpu`` or ``gpu``.
        dtype: ``float32`` or ``bfloat16``: what the weights are kept and the blocks computed in.

    Returns:
        The model, whose ``model(tokens)`` maps (B, T) ids to float32 logits (B, T, V), and its tokenizer, which is
        None where the folder has none.

    Raises:
        UserError: no model is there, it is damaged, or its architecture is not supported.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}: expected float32 or bfloat16")
    devices.use(device)
    place = checkpoint.resolve_model(path)
    config = folder.read_config(place)
    model = Model(config, getattr(mx, dtype))
    arrays = folder.read_params(place, config)
    model.update(
        tree_unflatten([(name, mx.array(arrays.pop(name)).astype(model.dtype)) for name in params.table(config)])
    )
    mx.eval(model.parameters())
    return model, tokenizer.load_tokenizer(place) if tokenizer.has_tokenizer(place) else None
