"""What is quantized waits in a folder until all of it is written: memory holds one place of the model at a time."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.formats import stream
from convert.formats.opened import Opened, Packed, Tensor
from convert.quantize.source import Source
from convert.quantize.work import Scheme
from mlxgpt.common.folders.tensors import DTYPES, Entry, read_header, read_tensor, write_tensors
from mlxgpt.common.model.affine import Quantized


class Spool:
    """Parameters by name, in files of ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._found: dict[str, tuple[Entry, ...]] = {}
        self._schemes: dict[str, Scheme] = {}

    def put(self, name: str, each: np.ndarray | Quantized) -> None:
        """Stores a matrix as it is quantized, or another parameter as it has changed."""
        path = self.folder / f"{name}.safetensors"
        if isinstance(each, Quantized):
            write_tensors(path, {"a": each.words, "b": each.scales, "c": each.biases})
            self._schemes[name] = Scheme(each.bits, each.group_size)
        else:
            write_tensors(path, {"a": each})
        entries = read_header(path)[0]
        self._found[name] = tuple(entries[key] for key in sorted(entries))

    def opened(self, source: Source, schemes: Mapping[str, Scheme]) -> Opened:
        """The source with what was stored in place of what it had.

        Args:
            source: the model.
            schemes: by module; a matrix that was not stored is rounded to nearest while it is written.
        """
        made = {}
        for name, tensor in source.opened.tensors.items():
            dtype, scheme = source.dtype(name), schemes.get(name.removesuffix(".weight"))
            entries = self._found.get(name)
            if entries and name not in self._schemes:
                made[name] = _plain(entries[0], tensor.shape)
                continue
            scheme = self._schemes.get(name, scheme) if tensor.shape[1:] else None
            if dtype != tensor.dtype:
                tensor = _cast(name, tensor, dtype)
            if scheme is not None:
                parts = (entries[0], entries[1], entries[2]) if entries else None
                packed = Packed(scheme.bits, scheme.group_size, dtype, parts)
                tensor = dataclasses.replace(tensor, packed=packed)
            made[name] = tensor
        return dataclasses.replace(source.opened, tensors=made)


def _plain(entry: Entry, shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, DTYPES[entry.dtype], lambda: read_tensor(entry), entry)


def _cast(name: str, tensor: Tensor, dtype: np.dtype) -> Tensor:
    return Tensor(tensor.shape, dtype, lambda: stream.cast(name, tensor.read(), dtype))
