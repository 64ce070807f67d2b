"""A folder on disk as a model that runs: ``model, tokenizer = load(folder)``."""

from collections.abc import Sequence
from pathlib import Path

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt import adapters, quant
from mlxgpt import device as devices
from mlxgpt.common import adapter_folder, checkpoint, folder, params, quantising, tokenizer
from mlxgpt.common.affine import Quantised
from mlxgpt.common.errors import UserError
from mlxgpt.model import Model

Given = str | Path | Sequence[tuple[str | Path, float]] | None


def load(
    path: str | Path,
    adapter: Given = None,
    device: str = "auto",
    dtype: str = "float32",
    dequantise: str = "auto",
    force: bool = False,
) -> tuple[Model, "tokenizer.Tokenizer | None"]:
    """Reads a run (best, else last), a checkpoint, a Hugging Face folder or a hub id.

    Args:
        path: where the model is.
        adapter: a folder of an adapter, or several with the weights they are added with.
        device: ``auto``, ``cpu`` or ``gpu``.
        dtype: ``float32`` or ``bfloat16``: what the weights are kept and the blocks computed in.
        dequantise: ``auto``: quantised matrices once, on a CPU, where memory allows; or ``never``.
        force: an adapter is taken though it was made for another base.

    Returns:
        The model, whose ``model(tokens)`` maps (B, T) ids to float32 logits (B, T, V), and its tokenizer, which is
        None where the folder has none.

    Raises:
        UserError: no model is there, it is damaged, or its architecture is not supported; an adapter does not fit.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}: expected float32 or bfloat16")
    where = devices.use(device)
    place = checkpoint.resolve_model(path)
    config = folder.read_config(place)
    model = Model(config, getattr(mx, dtype))
    arrays, _ = quantising.widen(folder.read_stored(place, config), where == mx.Device(mx.cpu), dequantise)
    for name in params.table(config):
        (module, _, kind), each = name.rpartition("."), arrays.pop(name)
        if isinstance(each, Quantised):
            quant.place(model, module, each)
        else:
            setattr(model.at(module), kind, mx.array(each).astype(model.dtype))
    given = [(adapter, 1.0)] if isinstance(adapter, str | Path) else adapter or []
    adapters.attach(model, [(adapter_folder.read(one, place, config, force), weight) for one, weight in given])
    mx.eval(model.parameters())
    return model, tokenizer.load_tokenizer(place) if tokenizer.has_tokenizer(place) else None
