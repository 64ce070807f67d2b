"""The tensors of a folder that mlx-lm wrote: named as its modules, matrices [out, in], some in affine quantization."""

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import TensorError, UserError
from mlxgpt.common.folders import mlx_lm_names
from mlxgpt.common.folders.tensors import Entry, read_tensor
from mlxgpt.common.model import affine, families, params
from mlxgpt.common.model.affine import Quantized

KEYS = ("quantization", "quantization_config")  # of config.json, both the same
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Matrix:
    """Where a quantized matrix lies."""

    words: Entry
    scales: Entry
    biases: Entry
    bits: int
    group_size: int

    def read(self) -> Quantized:
        """The matrix; scales and biases are of the dtype that the file has."""
        words, scales, biases = (read_tensor(entry) for entry in (self.words, self.scales, self.biases))
        return Quantized(words, scales, biases, self.bits, self.group_size)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what it says of quantization."""
    return {key: value for key, value in values.items() if key not in KEYS}


def with_head(config: ModelConfig, there: Container[str]) -> ModelConfig:
    """``config``, tied where these tensors of mlx-lm's modules have no head."""
    if "tied" in families.family_of(config).fixed:
        return config
    untied = dataclasses.replace(config, tied=False)
    head = next(name for name, ours in mlx_lm_names.names(untied).items() if ours == "lm_head.weight")
    return dataclasses.replace(config, tied=head not in there)


def locate(path: Path, config: ModelConfig, entries: Mapping[str, Entry], scheme: Any) -> dict[str, Entry | Matrix]:
    """Our name -> where it lies, of a folder with these tensors; ``scheme`` is config.json's ``quantization``.

    Raises:
        UserError: another quantization than affine; a tensor is missing, unexpected, or of another shape or dtype.
    """
    entries = dict(entries)
    where = f"{path / 'config.json'}: quantization"
    if scheme is not None and not isinstance(scheme, dict):
        raise UserError(f"{where} = {scheme!r}: expected a table")
    shapes = {name: param.shape for name, param in params.table(families.on_disk(config)).items()}
    wanted = params.table(config)
    made: dict[str, Entry | Matrix] = {}
    for name, ours in mlx_lm_names.names(config).items():
        entry = entries.pop(name, None)
        if entry is None:
            raise TensorError(name, f"{path}: tensor {name} is missing, which config.json asks for")
        module = name.removesuffix(".weight")
        if f"{module}.scales" in entries and name != module:
            if scheme is None:
                raise UserError(f"{where} is missing, but {module}.scales is there")
            scales, biases = (entries.pop(f"{module}.{part}", None) for part in ("scales", "biases"))
            made[ours] = _matrix(where, module, entry, scales, biases, shapes[ours], scheme)
            continue
        if entry.shape != shapes[ours] or entry.dtype not in _FLOATS:
            found = f"{entry.dtype} {list(entry.shape)}"
            raise UserError(f"{entry.path}: {name} is {found}, expected floats {list(shapes[ours])} by config.json")
        if ours in wanted:
            made[ours] = entry
        elif read_tensor(entry).any():
            raise UserError(f"{entry.path}: {name} is not zero, but config.json says so under mlxgpt")
    if entries:
        raise TensorError(min(entries), f"{path}: unexpected tensor {min(entries)}, for which config.json has no place")
    return {name: made[name] for name in wanted}


def _matrix(
    where: str,
    module: str,
    words: Entry,
    scales: Entry | None,
    biases: Entry | None,
    shape: tuple[int, ...],
    scheme: Mapping[str, Any],
) -> Matrix:
    """A quantized matrix; its bits and groups are those of its shapes, and those that config.json says."""
    own = scheme.get(module)
    said = own if isinstance(own, dict) else scheme
    if said.get("mode", "affine") != "affine" or scales is None or biases is None:
        raise UserError(f"{where}: {module}: mode {said.get('mode')!r} is not supported: expected 'affine'")
    bits, group_size = said.get("bits"), said.get("group_size")
    if bits not in affine.BITS or type(group_size) is not int or group_size < 1 or shape[1] % group_size:
        raise UserError(
            f"{where}: {module}: {bits!r} bits and group_size {group_size!r}: expected bits and whole groups"
        )
    expected = (shape[0], shape[1] * bits // 32), (shape[0], shape[1] // group_size)
    for entry, each, dtypes in (
        (words, expected[0], ("U32",)),
        *((e, expected[1], _FLOATS) for e in (scales, biases)),
    ):
        if entry.shape != each or entry.dtype not in dtypes:
            found = f"{entry.dtype} {list(entry.shape)}"
            raise UserError(f"{entry.path}: {module}: found {found}, expected {' or '.join(dtypes)} {list(each)}")
    return Matrix(words, scales, biases, bits, group_size)
