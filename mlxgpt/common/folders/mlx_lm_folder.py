"""The tensors of a folder that mlx-lm wrote: named as its modules, matrices [out, in], some of them quantized.

Matrices in affine quantization stay as they are; those of mxfp4, mxfp8 and nvfp4 are read as float32.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import TensorError, UserError
from mlxgpt.common.folders import head, mlx_lm_names
from mlxgpt.common.folders.tensors import FLOATS, Stored, same_bytes
from mlxgpt.common.model import affine, families, float_blocks, module_names, params, quantization_methods
from mlxgpt.common.model.affine import Quantized

KEYS = ("quantization", "quantization_config")  # of config.json, both the same
T = TypeVar("T")
_PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Matrix:
    """Where a quantized matrix lies."""

    words: Stored
    scales: Stored
    biases: Stored | None  # None in all modes but affine
    bits: int
    group_size: int
    mode: str = "affine"

    def read(self) -> Quantized | np.ndarray:
        """The matrix, scales and biases in the file's dtype; one of another mode than affine in float32."""
        words, scales = self.words.read(), self.scales.read()
        if self.biases is None:
            return float_blocks.dequantize(words, scales, self.mode)
        return Quantized(words, scales, self.biases.read(), self.bits, self.group_size)


def is_own(config: ModelConfig, values: Mapping[str, Any], entries: Mapping[str, Stored]) -> bool:
    """Whether a folder with this config.json and these tensors has what only mlx-lm writes."""
    if quantization_methods.is_mlx_lm(values):
        return True
    there = {module_names.peel(name): entry for name, entry in entries.items()}
    files = {module_names.peel(name): each for name, each in families.from_foreign(config).items()}
    own = {module_names.peel(name) for name in mlx_lm_names.names(config)} - set(files)
    if own:
        return not own.isdisjoint(there)
    # the same names: what the files have as [in, out], its modules have as [out, in]
    shapes = {name: param.shape for name, param in params.table(families.on_disk(config)).items()}
    turned = {name: shapes[ours] for name, (ours, transposed) in files.items() if transposed and name in there}
    return bool(turned) and all(there[name].shape == shape for name, shape in turned.items())


def plain_names(place: Path, config: ModelConfig, entries: Mapping[str, T]) -> dict[str, T]:
    """``entries`` by the names of mlx-lm's modules.

    Raises:
        UserError: one is there twice, with and without a prefix.
    """
    trunks = module_names.trunks(name.rpartition(".")[0] for name in mlx_lm_names.names(_untied(config)))
    made: dict[str, T] = {}
    for name, entry in entries.items():
        plain = module_names.full_name(name, trunks)
        if plain in made:
            raise UserError(f"{place}: {plain} is there twice, with and without a prefix")
        made[plain] = entry
    return made


def _untied(config: ModelConfig) -> ModelConfig:
    return config if "tied" in families.family_of(config).fixed else dataclasses.replace(config, tied=False)


def with_head(
    place: Path, values: Mapping[str, Any], config: ModelConfig, entries: Mapping[str, Stored]
) -> ModelConfig:
    """``config``, tied if these tensors of mlx-lm's modules say so.

    Raises:
        TensorError: config.json unties the head, and there is none.
    """
    if config.labels or "tied" in families.family_of(config).fixed:
        return config
    name, table = head_and_table(config)
    tied = head.is_tied(place, values, config, f"{name}.weight", entries, lambda: _is_copy(entries, name, table))
    return dataclasses.replace(config, tied=tied)


def head_and_table(config: ModelConfig) -> tuple[str, str]:
    """What mlx-lm calls the modules of head and embedding."""
    theirs = {ours: name.removesuffix(".weight") for name, ours in mlx_lm_names.names(_untied(config)).items()}
    return theirs["lm_head.weight"], theirs["wte.weight"]


def _is_copy(entries: Mapping[str, Stored], name: str, table: str) -> bool:
    pairs = [(entries.get(f"{name}.{part}"), entries.get(f"{table}.{part}")) for part in _PARTS]
    return all(one is other is None or (one and other and same_bytes(one, other)) for one, other in pairs)


def locate(path: Path, config: ModelConfig, entries: Mapping[str, Stored], scheme: Any) -> dict[str, Stored | Matrix]:
    """Our name -> where it lies, of a folder with ``plain_names``; ``scheme`` is config.json's ``quantization``.

    Raises:
        UserError: a quantization that mlx-lm does not have; a tensor is missing, unexpected, or of another shape or
            dtype.
    """
    given, entries = entries, dict(entries)
    where = f"{path / 'config.json'}: quantization"
    if scheme is not None and not isinstance(scheme, dict):
        raise UserError(f"{where} = {scheme!r}: expected a table")
    shapes = {name: param.shape for name, param in params.table(families.on_disk(config)).items()}
    wanted = params.table(config)
    if config.tied:
        name, table = head_and_table(config)
        if _is_copy(entries, name, table):
            entries = {each: entry for each, entry in entries.items() if each.rpartition(".")[0] != name}
    made: dict[str, Stored | Matrix] = {}
    for name, ours in mlx_lm_names.names(config).items():
        entry = entries.pop(name, None)
        if entry is None:
            raise TensorError(name, head.missing(path, name, given, config))
        module = name.removesuffix(".weight")
        if f"{module}.scales" in entries and name != module:
            if scheme is None:
                raise UserError(f"{where} is missing, but {module}.scales is there")
            scales, biases = (entries.pop(f"{module}.{part}", None) for part in ("scales", "biases"))
            made[ours] = _matrix(where, module, entry, scales, biases, shapes[ours], scheme)
            continue
        if entry.shape != shapes[ours] or entry.dtype not in FLOATS:
            found = f"{entry.dtype} {list(entry.shape)}"
            raise UserError(f"{entry.path}: {name} is {found}, expected floats {list(shapes[ours])} by config.json")
        if ours in wanted:
            made[ours] = entry
        elif entry.read().any():
            raise UserError(f"{entry.path}: {name} is not zero, but config.json says so under mlxgpt")
    if scheme is not None and not any(isinstance(each, Matrix) for each in made.values()):
        raise UserError(f"{where} is there, but no tensor is quantized")
    if entries:
        raise TensorError(min(entries), f"{path}: unexpected tensor {min(entries)}, for which config.json has no place")
    return {name: made[name] for name in wanted}


def _matrix(
    where: str,
    module: str,
    words: Stored,
    scales: Stored | None,
    biases: Stored | None,
    shape: tuple[int, ...],
    scheme: Mapping[str, Any],
) -> Matrix:
    """A quantized matrix; its bits and groups are those of its shapes, and those that config.json says."""
    own = scheme.get(module)
    said = own if isinstance(own, dict) else scheme
    mode = said.get("mode", "affine")
    if mode not in ("affine", *float_blocks.MODES):
        able = ", ".join(("affine", *float_blocks.MODES))
        raise UserError(f"{where}: {module}: mode {mode!r} is not supported: expected one of {able}")
    if scales is None or (biases is None) != (mode != "affine"):
        raise UserError(
            f"{where}: {module}: mode {mode!r}, expected scales and {'biases' if mode == 'affine' else 'no biases'}"
        )
    bits, group_size = said.get("bits"), said.get("group_size")
    if mode != "affine" and (bits, group_size) != float_blocks.MODES[mode]:
        usual = "{} bits and group_size {}".format(*float_blocks.MODES[mode])
        raise UserError(f"{where}: {module}: {bits!r} bits and group_size {group_size!r}: {mode} has {usual}")
    if bits not in affine.BITS or type(group_size) is not int or group_size < 1 or shape[1] % group_size:
        raise UserError(
            f"{where}: {module}: {bits!r} bits and group_size {group_size!r}: expected bits and whole groups"
        )
    expected = (shape[0], shape[1] * bits // 32), (shape[0], shape[1] // group_size)
    floats = FLOATS if mode == "affine" else ("U8",)
    for entry, each, dtypes in (
        (words, expected[0], ("U32",)),
        *((e, expected[1], floats) for e in (scales, biases) if e is not None),
    ):
        if entry.shape != each or entry.dtype not in dtypes:
            found = f"{entry.dtype} {list(entry.shape)}"
            raise UserError(f"{entry.path}: {module}: found {found}, expected {' or '.join(dtypes)} {list(each)}")
    return Matrix(words, scales, biases, bits, group_size, mode)
