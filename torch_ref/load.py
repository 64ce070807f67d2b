"""A folder on disk as a model that runs: ``model, tokenizer = load(folder)``."""

import sys
from pathlib import Path

import torch

from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, base_and_adapters, model_folder
from mlxgpt.common.folders.adapter import add_up
from mlxgpt.common.folders.base_and_adapters import Given
from mlxgpt.common.model import params, quantize_base
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.tokenizers import load as tokenizer
from torch_ref import adapters, quant
from torch_ref import device as devices
from torch_ref.model import Model


def load(
    path: str | Path,
    adapter: Given = None,
    device: str = "auto",
    dtype: str = "float32",
    dequantize: str = "auto",
    force: bool = False,
    beside: Model | None = None,
) -> tuple[Model, "tokenizer.Tokenizer | None"]:
    """Reads a run (best, else last), a checkpoint, a Hugging Face folder or a hub id.

    Args:
        path: where the model is; an adapter, or a run that trained one, brings its base. With an adapter its tensors
            alone would train; ``requires_grad_`` changes that.
        adapter: a folder of an adapter, or several with the weights they are added with.
        device: ``auto``, ``cpu``, ``gpu``, ``mps``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``: what the weights are kept and the blocks computed in.
        dequantize: ``auto``: quantized matrices once, on a CPU, where memory allows; or ``never``.
        force: an adapter is taken though it was made for another base.
        beside: a model of the same base, whose tensors are taken where the adapter leaves them as they are.

    Returns:
        The model, whose ``model(tokens)`` maps (B, T) ids to float32 logits (B, T, V), and its tokenizer, which is
        the last adapter's that has one, else the model's, else None.

    Raises:
        UserError: no model is there, it is damaged, or its architecture is not supported; an adapter does not fit.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}: expected float32 or bfloat16")
    where = devices.use(device)
    place, found = base_and_adapters.find_base(path, adapter)
    base = model_folder.read_config(place)
    for note in model_folder.notes(place):
        print(note, file=sys.stderr)
    given = [(adapter_folder.read_adapter(each, place, base, force), weight) for each, weight in found]
    both = add_up(base, given)
    model = Model(both.config, getattr(torch, dtype), seed=None)
    names = None if beside is None else both.changed(base)
    stored, _ = quantize_base.widen(model_folder.read_stored(place, base, names), devices.room(where), dequantize)
    arrays = both.onto(stored)
    for name in params.table(both.config):
        module, _, kind = name.rpartition(".")
        each = arrays.pop(name) if name in arrays else quant.taken(beside, module, kind)
        if isinstance(each, Quantized | quant.Words):
            quant.place(model, module, each)
        else:
            array = each if isinstance(each, torch.Tensor) else torch.from_numpy(each).to(model.dtype)
            getattr(model.at(module), kind).data = array.data
    adapters.adapt(model, both.targets, both.params)
    if found:
        whole = set(both.whole) & set(params.table(both.config))
        adapters.train_alone(model, [*both.params, *whole])
    return model.to(where).eval(), tokenizer.load_last([place, *(each for each, _ in found)])
