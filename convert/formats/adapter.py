"""An adapter and its base, read as the merged model.

Merged matrices are computed in float64 and stored like the base's, quantized again if those are; all other tensors are
the base's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from convert.formats import generation, hf, stream
from convert.formats.opened import Opened, Packed, Tensor
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.model import adapters, params
from mlxgpt.common.model.adapters import Target
from mlxgpt.common.tokenizers.ends import generation_ends, union
from mlxgpt.common.tokenizers.load import has_tokenizer, load_tokenizer
from mlxgpt.common.tokenizers.protocol import FILES

FORMAT = "adapter"


def read(path: Path, base: Opened) -> Opened:
    """The merged model of an adapter's folder and ``base``.

    Raises:
        UserError: see ``adapter_folder.read_adapter``.
    """
    made = fused(base, [(path, 1.0)])
    return dataclasses.replace(made, path=path, format=FORMAT)


def fused(base: Opened, given: Sequence[tuple[Path, float]], force: bool = False, dtype: str | None = None) -> Opened:
    """``base`` merged with the adapters in these folders, each multiplied by its weight.

    Merged matrices are rounded once, to ``dtype`` or the base's dtype.
    """
    read = [(adapter_folder.read_adapter(path, base.path, base.config, force), weight) for path, weight in given]
    targets, arrays, whole = adapters.add_up([(each.targets, each.params, weight) for each, weight in read])
    config = base.config
    for each, _ in read:
        config = adapter_folder.with_adapter(config, each)
    tensors, norm = {}, base.tensors.get("ln_f.weight", base.tensors["wte.weight"])
    for name, param in params.table(config).items():
        # a classifier's score matrix, which the base lacks, gets the dtype of its norms
        tensor, path = base.tensors.get(name, norm), name.removesuffix(".weight")
        kept = model_folder.DTYPES[dtype] if dtype else tensor.dtype
        if name in whole:
            tensor = _given(name, whole[name], tensor, kept)
        elif path in targets and path != name:
            tensor = _merged(tensor, targets[path], arrays, path, kept)
        if tensor.shape != param.shape:
            raise UserError(f"{given[0][0]}: {name} has shape {list(tensor.shape)}, expected {list(param.shape)}")
        tensors[name] = tensor
    companions = dict(base.companions)
    for place, _ in given:
        own = {name: content for name, content in hf.companions(place).items() if name in FILES}
        if own:
            companions = {name: content for name, content in companions.items() if name not in FILES} | own
    files = tuple(file for place, _ in given for file in sorted(place.glob("adapter*.safetensors")))
    notes = [*(note for each, _ in read for note in each.notes), *hf.left_in_folder(base.path, base)]
    made = dataclasses.replace(
        base, config=config, tensors=tensors,
        files=(*base.files, *files), companions=companions, moments=None, notes=notes,
    )  # fmt: skip
    _join_ends(made, [place for place, _ in given])
    return made


def _join_ends(made: Opened, places: Sequence[Path]) -> None:
    """What ends a text for the base or an adapter, by its generation_config.json or its own tokenizer, ends it here."""
    own = [load_tokenizer(place).eos_id for place in places if has_tokenizer(place)]
    before = generation.ends_of(made)
    ends = union(before, *(generation_ends(place) for place in places), own)
    if ends != before and not made.config.labels:
        generation.set_ends(made, ends)


def _given(name: str, array: np.ndarray, tensor: Tensor, dtype: np.dtype) -> Tensor:
    """A tensor that was trained whole."""
    return Tensor(array.shape, dtype, lambda: stream.cast(name, array, dtype), packed=_anew(tensor))


def _merged(tensor: Tensor, target: Target, arrays: Mapping[str, np.ndarray], path: str, dtype: np.dtype) -> Tensor:
    """A matrix with its update."""

    def read() -> np.ndarray:
        made = adapters.fuse(tensor.read().astype(np.float32), target, arrays, path)
        return stream.cast(f"{path}.weight", made, dtype)

    return Tensor(tensor.shape, dtype, read, packed=_anew(tensor))


def _anew(tensor: Tensor) -> Packed | None:
    """How a merged matrix is quantized again."""
    return dataclasses.replace(tensor.packed, parts=None) if tensor.packed else None
