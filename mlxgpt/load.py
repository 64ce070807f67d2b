"""A folder on disk as a model that runs: ``model, tokenizer = load(folder)``."""

import functools
from pathlib import Path

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
from mlx.utils import tree_unflatten

from mlxgpt import device as devices
from mlxgpt.adapters import attach
from mlxgpt.common import adapter_folder, finding, folder, params, tokenizer
from mlxgpt.common.errors import UserError
from mlxgpt.common.finding import Given
from mlxgpt.model import Model


def load(
    path: str | Path, adapter: Given = None, device: str = "auto", dtype: str = "float32", force: bool = False
) -> tuple[Model, "tokenizer.Tokenizer | None"]:
    """Reads a run (best, else last), a checkpoint, a Hugging Face folder or a hub id.

    Args:
        path: where the model is; an adapter, or a run that trained one, brings its base.
        adapter: an adapter's folder, or several with their weights.
        device: ``auto``, ``cpu`` or ``gpu``.
        dtype: ``float32`` or ``bfloat16``: what the weights are kept and the blocks computed in.
        force: take an adapter that was trained on a model of other weights.

    Returns:
        The model, whose ``model(tokens)`` maps (B, T) ids to float32 logits (B, T, V), and its tokenizer, which is
        the last adapter's that has one, else the base's, else None.

    Raises:
        UserError: no model is there, it is damaged, its architecture is not supported, or an adapter is not for it.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}: expected float32 or bfloat16")
    devices.use(device)
    place, found = finding.find(path, adapter)
    base = folder.read_config(place)
    given = [(adapter_folder.read(each, place, base, force), weight) for each, weight in found]
    config = functools.reduce(adapter_folder.grown, (each for each, _ in given), base)
    model = Model(config, getattr(mx, dtype))
    arrays = params.resize_vocab(folder.read_params(place, base), config.vocab_size)
    if config.labels:
        arrays = params.as_classifier(arrays, config, 0)  # an adapter brings its score
    model.update(
        tree_unflatten([(name, mx.array(arrays.pop(name)).astype(model.dtype)) for name in params.table(config)])
    )
    attach(model, given)
    mx.eval(model.parameters())
    return model, tokenizer.load_last([place, *(each for each, _ in found)])
