"""Files of ``torch.save``: tensors and plain values in, nothing else; and out again.

Nothing that a pickle names is ever run: ``weights_only``, and before that the zip archive's own numbers are held
against the file's size. PyTorch reads and writes the structure alone; tensors pass one by one, in blocks.
"""

import _compat_pickle
import ctypes
import io
import math
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from convert.formats import stream
from convert.formats.opened import Options, Tensor
from convert.formats.torch_files import records
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.model_folder import DTYPES
from mlxgpt.common.folders.tensors import DTYPES as STORED
from mlxgpt.common.model import module_names

if TYPE_CHECKING:
    import torch

_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # what such a file begins with
_LEGACY_PICKLES = 4  # that number, a version, the machine's sizes, and the content
_LONGEST = 1 << 26  # bytes of a pickle without its tensors; an optimizer of 10,000 tensors has 2 MB
# PyTorch's dtypes -> safetensors' names of them
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
CODES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3"}
CODES |= {"float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "uint32": "U32", "uint16": "U16", "uint64": "U64"}
CODES = {f"torch.{name}": code for name, code in CODES.items()}


def strings_in_pickle(path: Path) -> frozenset[str]:
    """The strings in the pickle of a file of ``torch.save``: what tells formats apart; none in any other file."""
    found: set[str] = set()
    try:
        with open(path, "rb") as file:
            if is_legacy(path):
                for _ in range(_LEGACY_PICKLES):
                    found |= _strings(file)
                return frozenset(found)
            with zipfile.ZipFile(file) as archive:
                found |= _strings(io.BytesIO(archive.read(_pickle(path, archive))))
    except Exception:
        # a file of any kind at all may stand here, and pickletools raises whatever it meets
        return frozenset()
    return frozenset(found)


def _strings(file: BinaryIO | io.BytesIO) -> set[str]:
    """The strings of the pickle that begins here."""
    operations = pickletools.genops(file)
    return {each for operation, each, _ in operations if "UNICODE" in operation.name and isinstance(each, str)}


def is_legacy(path: Path) -> bool:
    """Whether a file is of the kind that ``torch.save`` wrote before it wrote zip archives."""
    with open(path, "rb") as file:
        return file.read(len(_LEGACY)) == _LEGACY


def _pickle(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The archive's pickle, once all of its members are true of the file."""
    size = path.stat().st_size
    for member in archive.infolist():
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        if not stored or not 0 <= member.header_offset <= size - member.file_size:
            raise UserError(f"{path}: {member.filename}: {member.file_size} bytes, not stored as torch.save does")
    found = [member for member in archive.infolist() if re.fullmatch(r"[^/]+/data\.pkl", member.filename)]
    if len(found) != 1:
        raise UserError(f"{path}: a zip archive with {len(found)} data.pkl, expected one, as torch.save makes it")
    if found[0].file_size > _LONGEST:
        raise UserError(f"{path}: {found[0].filename}: {found[0].file_size} bytes, expected at most {_LONGEST}")
    return found[0]


def globals_in_pickle(path: Path) -> list[str]:
    """The names of classes and functions in the pickle of a file of ``torch.save``, in its order; [] if damaged."""
    found: dict[str, None] = {}
    try:
        with open(path, "rb") as file:
            if is_legacy(path):
                pickles = [file] * _LEGACY_PICKLES
            else:
                with zipfile.ZipFile(file) as archive:
                    pickles = [io.BytesIO(archive.read(_pickle(path, archive)))]
            for each in pickles:
                names = (str(name) for operation, name, _ in pickletools.genops(each) if operation.name == "GLOBAL")
                found |= dict.fromkeys(map(_today, names))
    except Exception:
        # pickletools raises whatever it meets, see strings_in_pickle
        return []
    return list(found)


def _today(name: str) -> str:
    """A pickle's ``module name`` of protocol 2 as Python 3 has it."""
    module, _, own = name.partition(" ")
    module, own = _compat_pickle.NAME_MAPPING.get((module, own), (module, own))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{own}" if own else module


def load_file(path: Path, settings: bool = False) -> Any:
    """What the file holds; its tensors are mapped, not read, but for files of before torch 1.6.

    With ``settings`` objects of unknown classes are ``records.Record``, whose code is not needed and never run.

    Raises:
        UserError: truncated, no file of torch.save, or it holds more than tensors and plain values.
    """
    try:
        mapped = not is_legacy(path)
        if mapped:
            with zipfile.ZipFile(path) as archive:
                _pickle(path, archive)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: truncated, or no file of torch.save: {error}") from None
    torch = _torch(path)
    known = records.stand_ins(globals_in_pickle(path)) if settings else []
    try:
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:
        # torch.load lets through whatever a damaged pickle makes its reader raise
        reason = " ".join(str(error).split())
        named = re.search(r"GLOBAL (\S+)|[Uu]nsupported (?:class|operand) ([\w.]+)", reason)
        if named:
            what = _today(" ".join((named[1] or named[2]).rsplit(".", 1)))
            raise UserError(f"{path}: holds {what}, expected tensors and plain values only; nothing was run") from None
        raise UserError(f"{path}: damaged: {type(error).__name__}: {reason[:200]}") from None
    for tensor in _tensors(content) if mapped else ():
        tensor.mapped = True  # type: ignore[attr-defined]
    return content


def _tensors(content: Any) -> "Iterator[torch.Tensor]":
    """Every tensor in dicts and sequences, in the order in which they are saved."""
    import torch

    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping):
        for one in content.values():
            yield from _tensors(one)
    elif isinstance(content, list | tuple | set):
        for one in content:
            yield from _tensors(one)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: files of torch.save need PyTorch: pip install 'mlxgpt[torch]'") from None
    return torch


def by_name(where: str, value: Any) -> Mapping[str, Any]:
    """``value``, which maps names to tensors and nothing else.

    Raises:
        UserError: it is something else.
    """
    import torch

    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {type(value).__name__}, expected tensors by name")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{where}: {name!r}: {type(tensor).__name__}, expected a tensor by its name")
    return value


def state_dict(where: str, value: Any, keep: Collection[str] = (), table: str = "") -> dict[str, Any]:
    """Tensors by name, without what wrappers put before names, see ``module_names.peel``.

    ``table`` is what the embedding's name must be, if it is known.

    Raises:
        UserError: see ``by_name``; or a name is there twice, with and without a prefix; or a prefix is not known.
    """
    made: dict[str, Any] = {}
    for name, tensor in by_name(where, value).items():
        plain = module_names.peel(name, keep)
        if plain in made:
            raise UserError(f"{where}: {plain} is there twice, with and without a prefix")
        made[plain] = tensor
    strange = next((name.removesuffix(table) for name in made if table and name.endswith(f".{table}")), "")
    if strange and table not in made:
        share = f"{sum(name.startswith(strange) for name in made)} of {len(made)}"
        raise UserError(f"{where}: {share} tensors begin with {strange!r}, which is not known: expected {table}")
    return made


def lazy(where: str, tensor: Any, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a file, as one of ours; ``where`` is what messages call it.

    Raises:
        UserError: another shape or dtype, or values that the file does not have one by one.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{where}: {type(tensor).__name__}, expected a tensor")
    if tuple(tensor.shape) != shape:
        raise UserError(f"{where} has shape {list(tensor.shape)}, expected {list(shape)}")
    dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise UserError(f"{where}: {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    check_held(where, tensor)
    return Tensor(shape, dtype, lambda: as_numpy(tensor))


def check_held(where: str, tensor: "torch.Tensor") -> None:
    """Refuses a tensor of which the file does not have every value.

    Raises:
        UserError: it is sparse, quantized, or one value repeated.
    """
    import torch

    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{where}: {list(tensor.shape)} values that the file does not hold")


def as_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """A copy of a loaded tensor's values; its pages leave memory again, else all of a file would gather there."""
    import torch

    whole = tensor.detach().contiguous()
    kind = STORED.get(CODES.get(str(whole.dtype), ""), np.dtype(np.uint8))
    if kind.kind == "V":  # a dtype of ml_dtypes, which PyTorch does not give to numpy
        made = whole.view(torch.int16 if whole.element_size() == 2 else torch.uint8).numpy().copy().view(kind)
    else:
        made = whole.numpy().copy()
    if not hasattr(tensor, "mapped"):
        return made
    storage, page = tensor.untyped_storage(), mmap.PAGESIZE
    start = -(-storage.data_ptr() // page) * page
    length = (storage.data_ptr() + storage.nbytes() - start) // page * page
    if length > 0:
        # unchanged pages of a private mapping, which are read again from the file where somebody asks for them
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
    return made


def as_torch(array: np.ndarray) -> "torch.Tensor":
    """An array as a tensor of its dtype, bfloat16 too."""
    import torch

    if array.dtype.kind != "V":
        return torch.from_numpy(array.copy())
    whole = torch.from_numpy(array.view(np.dtype(f"i{array.dtype.itemsize}")).copy())
    return whole.view(getattr(torch, array.dtype.name))


def number(value: Any) -> float:
    """A number, or a tensor of one; NaN for anything else."""
    import torch

    plain = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    return float(plain) if type(plain) in (int, float) else math.nan


def shared(one: Any, other: Any) -> bool:
    """Whether two tensors are one in memory, and so in the file: tied."""
    import torch

    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


class Archive:
    """A file of torch.save in the making: its tensors stand for ours, which are read one by one as they are written."""

    def __init__(self, options: Options):
        self._options = options
        # by id; the tensor is kept, so that no other gets its id
        self._sources: dict[int, tuple[torch.Tensor, str, Tensor, np.dtype]] = {}

    def add(self, name: str, tensor: Tensor, dtype: np.dtype | None = None) -> "torch.Tensor":
        """What to save in the place of ``tensor``: memory that nobody ever touches, as ``dtype`` or as asked for."""
        import torch

        wide = DTYPES[self._options.dtype] if self._options.dtype else tensor.dtype
        dtype = dtype or wide
        made = torch.empty(tensor.shape, dtype=getattr(torch, dtype.name))
        self._sources[id(made)] = made, name, tensor, dtype
        return made

    def save(self, value: Any, place: Path) -> None:
        """Writes tensors and plain values to a new file, as ``torch.save`` does.

        Raises:
            UserError: a value is not finite or does not fit, or the system refuses to write.
        """
        torch = _torch(place)
        try:
            with torch.serialization.skip_data(), open(place, "wb") as file:
                torch.save(value, file)
            # each storage is data/N, in the order in which they are first met
            storages = {tensor.data_ptr(): tensor for tensor in _tensors(value)}
            with open(place, "r+b") as file, zipfile.ZipFile(file) as archive:
                for n, tensor in enumerate(storages.values()):
                    member = archive.getinfo(f"archive/data/{n}")
                    assert member.file_size == tensor.untyped_storage().nbytes(), member.filename
                    file.seek(member.header_offset + 26)
                    start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                    member.CRC = self._fill(file, tensor, start)
                    _note_sum(file, member, start + member.file_size)
                _note_sums(file, archive)
        except (OSError, RuntimeError) as error:
            # torch's writer wraps what the system says in a RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"{place}: cannot write: {reason}") from None

    def _fill(self, file: BinaryIO, tensor: "torch.Tensor", start: int) -> int:
        """Writes a tensor's values, in blocks; returns their CRC."""
        import torch

        file.seek(start)
        found = bad = 0
        if id(tensor) not in self._sources:  # a mask, say, of which -inf is a value
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            return zlib.crc32(data)
        _, name, source, dtype = self._sources[id(tensor)]
        for block in stream.blocks(name, source, dtype, False, self._options):
            bad += stream.count_not_finite(block)
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
            found = zlib.crc32(data, found)
            file.write(data)
        if name not in self._options.bad:
            stream.note_bad(name, bad, self._options)
        return found


def _note_sum(file: BinaryIO, member: zipfile.ZipInfo, end: int) -> None:
    """A member's CRC into the record behind its data, which ends at ``end``."""
    file.seek(end)
    assert file.read(4) == b"PK\x07\x08", f"{member.filename}: no record behind its data"
    file.write(struct.pack("<I", member.CRC))


def _note_sums(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """The members' CRCs into the archive's directory."""
    at = archive.start_dir
    for member in archive.infolist():
        file.seek(at + 16)
        file.write(struct.pack("<I", member.CRC))
        file.seek(at + 28)
        at += 46 + sum(struct.unpack("<HHH", file.read(6)))
