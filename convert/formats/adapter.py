"""An adapter and its base, read as the merged model.

Merged matrices are computed in float64 and stored like the base's, quantized again if those are; all other tensors are
the base's.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from convert.formats import generation, hf, stream
from convert.formats.opened import Opened, Tensor
from convert.formats.rounding import Rounding
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.folders.adapter import VOCABULARY, Together, add_up
from mlxgpt.common.model import adapters, params
from mlxgpt.common.tokenizers.ends import generation_ends, union
from mlxgpt.common.tokenizers.load import from_files, has_tokenizer, load_tokenizer
from mlxgpt.common.tokenizers.padding import own_padding, with_padding
from mlxgpt.common.tokenizers.protocol import is_file_of

FORMAT = "adapter"


def read(path: Path, base: Opened) -> Opened:
    """The merged model of an adapter's folder and ``base``.

    Raises:
        UserError: see ``adapter_folder.read_adapter``.
    """
    made = fused(base, [(path, 1.0)])
    return dataclasses.replace(made, path=path, format=FORMAT)


def fused(
    base: Opened,
    given: Sequence[tuple[Path, float]],
    force: bool = False,
    dtype: str | None = None,
    rounding: Rounding | None = None,
) -> Opened:
    """``base`` merged with the adapters in these folders, each multiplied by its weight.

    Merged matrices are rounded once, to ``dtype`` or the base's dtype; ``rounding`` gathers what that loses of those
    that are not quantized again. A tied base whose head they change apart becomes an untied model.
    """
    read = [(adapter_folder.read_adapter(path, base.path, base.config, force), weight) for path, weight in given]
    both = add_up(base.config, read)
    companions, extra = dict(base.companions), dict(base.extra)
    for place, _ in given:
        own = {name: content for name, content in hf.companions(place).items() if is_file_of(name)}
        if own:
            companions = {name: content for name, content in companions.items() if not is_file_of(name)} | own
    if both.config.labels:
        both, companions, extra["pad_token_id"] = _padded(both, companions)
    tensors, norm = {}, base.tensors.get("ln_f.weight", base.tensors["wte.weight"])
    for name, param in params.table(both.config).items():
        # a head of its own begins as the embedding; a classifier's score matrix gets the dtype of its norms
        tied = name == "lm_head.weight" and base.config.tied
        tensor, path = base.tensors.get("wte.weight" if tied else name, norm), name.removesuffix(".weight")
        grown = name in VOCABULARY and tensor.shape != param.shape
        if grown or name in both.whole or (path != name and (path in both.targets or f"{path}.rows" in both.whole)):
            kept = model_folder.DTYPES[dtype] if dtype else tensor.dtype
            tensor = _changed(name, tensor, param.shape, both, kept, rounding)
        if tensor.shape != param.shape:
            raise UserError(f"{given[0][0]}: {name} has shape {list(tensor.shape)}, expected {list(param.shape)}")
        tensors[name] = tensor
    files = tuple(file for place, _ in given for file in sorted(place.glob("adapter*.safetensors")))
    notes = [*(note for each, _ in read for note in each.notes), *hf.left_in_folder(base.path, base)]
    made = dataclasses.replace(
        base, config=both.config, tensors=tensors,
        files=(*base.files, *files), companions=companions, extra=extra, moments=None, notes=notes,
    )  # fmt: skip
    _join_ends(made, [place for place, _ in given])
    return made


def _padded(
    both: Together, companions: dict[str, Path | bytes]
) -> tuple[Together, dict[str, Path | bytes], int | None]:
    """A classifier with a token that pads: in its tokenizer's files and as a row of the embedding; and its id."""
    files = {name: content for name, content in companions.items() if is_file_of(name)}
    if not files:
        return both, companions, None
    read = {name: content if isinstance(content, bytes) else content.read_bytes() for name, content in files.items()}
    tokenizer = with_padding(from_files(read, Path(".")))
    config = dataclasses.replace(both.config, vocab_size=max(both.config.vocab_size, tokenizer.n_vocab))
    others = {name: content for name, content in companions.items() if not is_file_of(name)}
    return dataclasses.replace(both, config=config), others | tokenizer.files, own_padding(tokenizer)


def _join_ends(made: Opened, places: Sequence[Path]) -> None:
    """What ends a text for the base or an adapter, by its generation_config.json or its own tokenizer, ends it here."""
    own = [load_tokenizer(place).eos_id for place in places if has_tokenizer(place)]
    before = generation.ends_of(made)
    ends = union(before, *(generation_ends(place) for place in places), own)
    if ends != before and not made.config.labels:
        generation.set_ends(made, ends)


def _changed(
    name: str, tensor: Tensor, shape: tuple[int, ...], both: Together, dtype: np.dtype, rounding: Rounding | None
) -> Tensor:
    """A tensor of the base with what the adapters do to it, of ``shape``."""
    path, packed = name.removesuffix(".weight"), tensor.packed

    def read() -> np.ndarray:
        exact: np.ndarray | None = both.whole.get(name)
        compared = rounding is not None and not name.startswith("score.")
        before = tensor.read().astype(np.float32, copy=False) if exact is None or compared else None
        if exact is None:
            assert before is not None
            exact = cast(np.ndarray, params.resize_vocab({name: before}, shape[0])[name])
        if f"{path}.rows" in both.whole:
            exact = adapters.with_rows(exact, both.whole, path)
        if path in both.targets and path != name:
            exact = adapters.merged(exact, both.targets[path], both.params, path)
        stored = stream.cast(name, exact.astype(np.float32, copy=False), dtype)
        if rounding is not None and before is not None and packed is None:
            rounding.add(name, before, exact, stored, dtype.name)
        return stored

    # how a quantized matrix is quantized again
    return Tensor(shape, dtype, read, packed=dataclasses.replace(packed, parts=None) if packed else None)
