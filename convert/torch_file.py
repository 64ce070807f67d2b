"""Files of ``torch.save``: tensors and plain values in, nothing else; and out again.

The one place that imports PyTorch for a file. Nothing that a pickle names is ever run: ``weights_only``, and before
that the zip archive's own numbers are held against the file's size.
"""

import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from convert.model import Options, Tensor
from convert.stream import cast, count_not_finite, note_bad
from mlxgpt.common.errors import UserError
from mlxgpt.common.folder import DTYPES

if TYPE_CHECKING:
    import torch

_LONGEST = 1 << 26  # bytes of a pickle without its tensors; an optimizer of 10,000 tensors has 2 MB
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def names(path: Path) -> frozenset[str]:
    """The strings in the pickle of a file of ``torch.save``: what tells formats apart; none in any other file."""
    found: set[str] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            for operation, argument, _ in pickletools.genops(archive.read(_pickle(path, archive))):
                if "UNICODE" in operation.name and isinstance(argument, str):
                    found.add(argument)
    except Exception:
        # a file of any kind at all may stand here, and pickletools raises whatever it meets
        return frozenset()
    return frozenset(found)


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


def load(path: Path) -> Any:
    """What the file holds; its tensors are mapped, not read.

    Raises:
        UserError: truncated, no file of torch.save (1.6 or later), or it holds more than tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _pickle(path, archive)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: truncated, or no file of torch.save: {error}") from None
    torch = _torch(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # torch.load lets through whatever a damaged pickle makes its reader raise
        reason = " ".join(str(error).split())
        named = re.search(r"GLOBAL (\S+)|[Uu]nsupported (?:class|operand) (\S+)", reason)
        if named:
            what = named[1] or named[2]
            raise UserError(f"{path}: holds {what}, expected tensors and plain values only; nothing was run") from None
        raise UserError(f"{path}: damaged: {type(error).__name__}: {reason[:200]}") from None


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: files of torch.save need PyTorch: pip install 'mlxgpt[torch]'") from None
    return torch


def state_dict(where: str, value: Any) -> dict[str, Any]:
    """A mapping from names to tensors, without the prefix that ``torch.compile`` gives; of a prefix and none: refused.

    Raises:
        UserError: it is something else.
    """
    import torch

    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {type(value).__name__}, expected tensors by name")
    made: dict[str, Any] = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{where}: {name!r}: {type(tensor).__name__}, expected a tensor by its name")
        plain = name.removeprefix("_orig_mod.")
        if plain in made:
            raise UserError(f"{where}: {plain} is there twice, with and without _orig_mod.")
        made[plain] = tensor
    return made


def lazy(where: str, name: str, tensor: Any, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a file, as one of ours.

    Raises:
        UserError: another shape or dtype, or values that the file does not have one by one.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{where}: {name}: {type(tensor).__name__}, expected a tensor")
    if tuple(tensor.shape) != shape:
        raise UserError(f"{where}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise UserError(f"{where}: {name}: {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{where}: {name}: {list(shape)} values that the file does not hold")
    return Tensor(shape, dtype, lambda: as_numpy(tensor))


def shared(one: Any, other: Any) -> bool:
    """Whether two tensors are one in memory, and so in the file: tied."""
    import torch

    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def as_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """A copy of a tensor's values."""
    import torch

    whole = tensor.detach().contiguous()
    if whole.dtype == torch.bfloat16:
        return whole.view(torch.int16).numpy().copy().view(_BFLOAT16)
    return whole.numpy().copy()


def as_torch(name: str, tensor: Tensor, options: Options) -> "torch.Tensor":
    """A tensor of ours with its values read, looked through and cast as ``options`` say.

    Raises:
        UserError: a value is not finite, or does not fit the dtype.
    """
    import torch

    array = np.ascontiguousarray(tensor.read())
    bad = count_not_finite(array)
    if bad and name not in options.bad:
        note_bad(name, bad, options)
    array = cast(name, array, DTYPES[options.dtype] if options.dtype else tensor.dtype)
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def save(value: Any, place: Path) -> None:
    """Writes tensors and plain values to a new file.

    Raises:
        UserError: the system refuses to write, such as with no space left.
    """
    torch = _torch(place)
    try:
        with open(place, "xb") as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:
        # torch's writer wraps what the system says in a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{place}: cannot write: {reason}") from None
