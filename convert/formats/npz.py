"""MLX's .npz: a folder with weights.npz, config.json and tokenizer files, as mlx-examples lay models out.

Tensors have the names of mlx-lm's modules and are [out, in], so that ``model.load_weights("weights.npz")`` takes them.
An archive of names alone does not say the model, so config.json stands beside it. bfloat16 is written as numpy and MLX
write it, as two raw bytes (V2). Entries are not compressed, and read where they lie; compressed ones are read whole.
"""

import dataclasses
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats import hf, output, stream
from convert.formats.opened import Opened, Options, Tensor
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import TensorError, UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import head, mlx_lm_folder, mlx_lm_names
from mlxgpt.common.folders.tensors import DTYPES, Entry
from mlxgpt.common.model import families, params

KIND = "folder"
_FILE = "weights.npz"
KINDS = {"<f4": "F32", "<f2": "F16", "<V2": "BF16", "|V2": "BF16"}
_MAX_HEADER = 10_000
# what zipfile raises for a broken archive, and numpy for the header of an array, which it reads as Python
_DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, NotImplementedError, struct.error)
_DAMAGED += (tokenize.TokenError, SyntaxError, RecursionError)


def recognize(path: Path) -> bool:
    """A folder with config.json and weights.npz, or that weights.npz itself."""
    place = path.parent if path.name == _FILE else path
    return (place / _FILE).is_file() and (place / "config.json").is_file()


def read(path: Path) -> Opened:
    """The model in such a folder.

    Raises:
        UserError: the archive is damaged or holds anything but arrays of floats, or see ``mlx_lm_folder.locate``.
    """
    place = path.parent if path.name == _FILE else path
    where = place / "config.json"
    values = read_json(where)
    config, extra = hf.read_values(values, str(where))
    arrays = read_arrays(place / _FILE)
    found = mlx_lm_folder.plain_names(place / _FILE, config, arrays)
    config = _with_head(place / _FILE, values, config, found)
    wanted, tensors = params.table(config), {}
    shapes = {name: param.shape for name, param in params.table(families.on_disk(config)).items()}
    for name, ours in mlx_lm_names.names(config).items():
        tensor = found.pop(name, None)
        if tensor is None or tensor.shape != shapes[ours]:
            if tensor is None:
                raise TensorError(name, head.missing(place / _FILE, name, arrays, config))
            shown = f"has shape {list(tensor.shape)}, expected {list(shapes[ours])} by config.json"
            raise TensorError(name, f"{place / _FILE}: {name} {shown}")
        if ours in wanted:
            tensors[ours] = tensor
        elif tensor.read().any():
            raise UserError(f"{place / _FILE}: {name} is not zero, but config.json says so under mlxgpt")
    if found:
        said = f"unexpected tensor {min(found)}, for which config.json has no place"
        raise TensorError(min(found), f"{place / _FILE}: {said}")
    tensors = {name: tensors[name] for name in wanted}
    opened = Opened(place, "npz", config, tensors, (place / _FILE,), hf.companions(place), extra)
    opened.notes = list(hf.left_in_folder(place, opened))
    return opened


def _with_head(place: Path, values: Mapping[str, Any], config: ModelConfig, found: dict[str, Tensor]) -> ModelConfig:
    """``config``, tied as it and the arrays say; a head that is the embedding's copy is taken out of them."""
    if "tied" in families.family_of(config).fixed:
        return config
    name, table = (f"{module}.weight" for module in mlx_lm_folder.head_and_table(config))

    def is_copy() -> bool:
        return table in found and np.array_equal(found[name].read(), found[table].read())

    tied = head.is_tied(place, values, config, name, found, is_copy)
    if tied:
        found.pop(name, None)
    return dataclasses.replace(config, tied=tied)


def read_arrays(path: Path, kinds: Mapping[str, str] = KINDS) -> dict[str, Tensor]:
    """Every array of an archive, by its name; headers are read and held against the archive's sizes.

    ``kinds`` are the dtypes that it may have: numpy's spelling -> safetensors' name.

    Raises:
        UserError: the archive is damaged, or has an array of another dtype.
    """
    made: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename or name in made or info.flag_bits & 1:
                    raise UserError(f"{path}: {info.filename}: expected one .npy of each name, not encrypted")
                with archive.open(info) as member:
                    dtype, shape, fortran, start = _npy_header(path, name, member, kinds)
                size = math.prod(shape) * DTYPES[dtype].itemsize
                if start + size != info.file_size:
                    raise UserError(
                        f"{path}: {name}: {info.file_size - start} bytes for {dtype} {list(shape)}, not {size}"
                    )
                made[name] = _tensor(path, info, dtype, shape, fortran, start, file)
    except _DAMAGED as error:
        raise UserError(f"{path}: damaged, or no .npz: {' '.join(str(error).split())}") from None
    return made


def _npy_header(path: Path, name: str, member: Any, kinds: Mapping[str, str]) -> tuple[str, tuple[int, ...], bool, int]:
    """dtype, shape, whether the first index runs fastest, and where the data starts."""
    version = np.lib.format.read_magic(member)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise UserError(f"{path}: {name}: .npy of version {version}, expected 1.0 or 2.0")
    shape, fortran, dtype = reader(member, max_header_size=_MAX_HEADER)
    if dtype.str not in kinds:
        expected = "float32, float16 or bfloat16" + ", or a buffer's" * (kinds is not KINDS)
        raise UserError(f"{path}: {name}: dtype {dtype.str}: expected {expected}")
    return kinds[dtype.str], shape, fortran and len(shape) > 1, member.tell()


def _tensor(
    path: Path, info: zipfile.ZipInfo, dtype: str, shape: tuple[int, ...], fortran: bool, start: int, file: Any
) -> Tensor:
    """One array: where it lies if it is stored as it is, else read from the archive."""
    if info.compress_type == zipfile.ZIP_STORED and len(shape) <= 2:
        file.seek(info.header_offset)
        head = file.read(30)
        # the local header's own lengths: its extra field may differ from the directory's
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30])) + start
        lies = Entry(path, dtype, shape[::-1] if fortran else shape, begin, begin + info.file_size - start)
        return hf.stored_tensor(lies, fortran)

    def read() -> np.ndarray:
        with zipfile.ZipFile(path) as archive:
            flat = np.frombuffer(archive.read(info)[start:], DTYPES[dtype])
        return flat.reshape(shape, order="F" if fortran else "C")

    return Tensor(shape, DTYPES[dtype], read)


def write(opened: Opened, place: Path, options: Options) -> list[str]:
    """weights.npz, config.json and what travels along.

    Raises:
        UserError: see ``hf.write``.
    """
    config = opened.config
    values = hf.with_ids(opened, families.config_to_hf(config), options)
    theirs = {ours: name for name, ours in mlx_lm_names.names(config).items()}
    parts = {
        theirs[families.from_foreign(config)[foreign][0]]: (tensor, hf.stored_dtype(tensor, options))
        for foreign, tensor, _ in hf.in_file(opened)
    }
    place.mkdir()
    with zipfile.ZipFile(place / _FILE, "w", zipfile.ZIP_STORED) as archive:
        for name, (tensor, dtype) in parts.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                write_array(member, name, tensor, dtype, options)
    hf.write_companions(opened, place, values)
    output.write_json(place / "config.json", values)
    notes = hf.mlx_lm_warning(config)
    return notes + ([hf.NO_MOMENTS] if opened.moments else [])


def write_array(member: Any, name: str, tensor: Tensor, dtype: np.dtype, options: Options) -> None:
    """One .npy into the open ``member`` of an archive, a block of rows at a time.

    Raises:
        UserError: a value is not finite, or does not fit.
    """
    descr = "<V2" if dtype == DTYPES["BF16"] else dtype.newbyteorder("<").str
    header: Mapping[str, Any] = {"descr": descr, "fortran_order": False, "shape": tensor.shape}
    np.lib.format.write_array_header_1_0(member, dict(header))
    for block in stream.blocks(name, tensor, dtype, False, options):
        member.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
