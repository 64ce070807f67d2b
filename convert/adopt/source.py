"""Any state dict: tensors by name out of .pt, .pth, .bin, .safetensors or .npz, and what stands beside them.

Nothing that a pickle names is run. Names are flattened with ``.``; what every name begins with is taken off, and so are
the keys of the file under which the tensors lie. Both are kept, since ``convert --map`` writes them again.
"""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.adopt.maps import content
from convert.formats import hf, npz, stream
from convert.formats.opened import Tensor
from convert.formats.torch_files import file as torch_file
from convert.formats.torch_files import records
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import weight_files
from mlxgpt.common.folders.tensors import DTYPES, read_header
from mlxgpt.common.model import module_names

FLOATS = ("float64", "float32", "float16", "bfloat16")  # the dtypes of weights; a tensor of another is a buffer
SEPARATORS = ".", "/"
_SETTINGS = (
    "config.json",
    "params.json",
    "hyperparameters.json",
    "args.json",
    "model_args.json",
    "generation_config.json",
)
_NPY = {"|b1": "BOOL", "|i1": "I8", "|u1": "U8", **npz.KINDS}
_NPY |= {"<i2": "I16", "<i4": "I32", "<i8": "I64", "<u2": "U16", "<u4": "U32", "<u8": "U64", "<f8": "F64"}
_ABSURD = 1 << 26  # bytes that a buffer may have beyond what the file holds of it


@dataclass(frozen=True)
class State:
    """A state dict: ``tensors`` in the file's order, as they lie there; the rest is what the file says beside.

    ``extras`` are plain values by name, a settings file beside it under its name. ``optimizer`` is the state dict of a
    torch optimizer, as it was loaded. ``tied`` are names of one and the same values.
    """

    path: Path
    kind: str  # pt, safetensors or npz
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    under: tuple[str, ...] = ()
    prefix: str = ""
    separator: str = "."  # between the words of a name in the file
    extras: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    nested: bool = False  # whether the words of names were dicts and lists in the file
    beside: Mapping[str, Any] = field(default_factory=dict)  # the plain values of the file alone, as they lie there
    optimizer_at: tuple[str, ...] = ()


def read(path: Path | str) -> State:
    """The state dict in a file, or in the one that a folder holds.

    Raises:
        UserError: no such file, damaged, more than tensors and plain values, no tensors, or a name that is there twice.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    place = _file_of(path) if path.is_dir() else path
    if not place.is_file():
        raise UserError(f"{place}: neither a file nor a folder")
    kind = _kind(place)
    notes: list[str] = []
    extras: dict[str, Any] = {}
    held, tied = content.Held(), list[tuple[str, ...]]()
    if kind == "pt":
        loaded, files = _torch_content(place)
        held = content.look(place, loaded)
        notes += held.notes
        extras |= held.extras
        tied = _shared(held.tensors)
        found = {name: _tensor(f"{place}: {name}", tensor) for name, tensor in held.tensors.items()}
    elif kind == "npz":
        found, files = npz.read_arrays(place, _NPY), (place,)
    else:
        found, files, extras = _safetensors(place)
    if not found:
        raise UserError(f"{place}: holds no tensors{_shown(extras)}")
    found, separator = _dotted(place, found)
    prefix = _prefix(found)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    _check_twice(place, tensors)
    wide = [name for name, tensor in tensors.items() if tensor.dtype == np.float64]
    if wide:
        notes.append(
            f"{place}: {len(wide)} tensors are float64, such as {wide[0]}: their values are rounded to float32"
        )
    for name in _SETTINGS:
        if (place.parent / name).is_file():
            extras.setdefault(name, read_json(place.parent / name))
    groups = [tuple(name.removeprefix(prefix) for name in group) for group in tied]
    groups += _copies(tensors, groups)
    return State(
        place, kind, tensors, files, held.under, prefix, separator, extras, held.optimizer, tuple(groups), tuple(notes),
        held.nested, held.beside, held.optimizer_at,
    )  # fmt: skip


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and values, bit for bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return np.ascontiguousarray(one.read()).tobytes() == np.ascontiguousarray(other.read()).tobytes()


def check_finite(where: str, array: np.ndarray) -> None:
    """Refuses weights with NaN or Inf.

    Raises:
        UserError: says how many.
    """
    count = stream.count_not_finite(array)
    if count:
        raise UserError(
            f"{where}: {count} of {array.size} values are not finite (NaN or Inf): expected trained weights"
        )


def _file_of(folder: Path) -> Path:
    """The file of weights in a folder; an index where they are in shards."""
    for name in (
        weight_files.SINGLE,
        weight_files.INDEX,
        weight_files.PICKLED,
        weight_files.PICKLED_INDEX,
        "weights.npz",
    ):
        if (folder / name).is_file():
            return folder / name
    found = weight_files.pickled(folder) + sorted([*folder.glob("*.safetensors"), *folder.glob("*.npz")])
    if len(found) == 1:
        return found[0]
    shown = ", ".join(each.name for each in found[:5]) or "no file of weights"
    raise UserError(f"{folder}: found {shown}: expected the path of one .pt, .pth, .bin, .safetensors or .npz")


def _kind(place: Path) -> str:
    """pt, safetensors or npz, by what the file begins with.

    Raises:
        UserError: it is none of these.
    """
    if place.name.endswith(".index.json"):
        return "safetensors" if place.name == weight_files.INDEX else "pt"
    try:
        with open(place, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(place) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"{place}: truncated, or damaged: {error}") from None
        return "npz" if names and all(name.endswith(".npy") for name in names) else "pt"
    if torch_file.is_legacy(place):
        return "pt"
    if place.suffix == ".safetensors" or head[8:9] == b"{":
        return "safetensors"
    found = (
        "GGUF: mlxgpt convert reads it" if head[:4] == b"GGUF" else f"bytes {head[:8].hex(' ')}" if head else "empty"
    )
    found = "a bare pickle, which only running code can read" if head[:1] == b"\x80" else found
    raise UserError(f"{place}: {found}: expected a file of torch.save, .safetensors or .npz")


def _safetensors(place: Path) -> tuple[dict[str, Tensor], tuple[Path, ...], dict[str, Any]]:
    if place.name == weight_files.INDEX:
        entries = weight_files.read_shards(place.parent, place.name, lambda path: read_header(path)[0])
        metadata: Mapping[str, str] = {}
    else:
        entries, metadata = read_header(place)
    for name, entry in entries.items():
        if entry.dtype.startswith("F8"):
            raise UserError(
                f"{place}: {name} is {entry.dtype}: a quantized tensor, expected float32, float16 or bfloat16"
            )
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].path, item[1].start)))
    files = tuple(sorted({entry.path for entry in entries.values()}))
    extras = {key: value for key, value in metadata.items() if key != "format"}
    return {name: hf.stored_tensor(entry) for name, entry in ordered.items()}, files, extras


def _torch_content(place: Path) -> tuple[Any, tuple[Path, ...]]:
    """What a file holds, or all the shards of an index."""
    if not place.name.endswith(".index.json"):
        return _load(place), (place,)
    shards: dict[Path, Mapping[str, Any]] = {}

    def read_one(path: Path) -> Mapping[str, Any]:
        if path not in shards:
            shards[path] = torch_file.by_name(str(path), _load(path))
        return shards[path]

    merged = weight_files.read_shards(place.parent, place.name, read_one)
    return merged, tuple(shards)


def _load(place: Path) -> Any:
    """What the file holds, settings that are objects as records.

    Raises:
        UserError: a whole module, a function that would be called, or damage.
    """
    cure = "--module FILE.py:Class runs your code, which is not done here; or save model.state_dict()"
    try:
        loaded = torch_file.load_file(place, settings=True)
    except UserError as error:
        raise UserError(
            f"{error}: {cure}" if "expected tensors and plain values" in str(error) else str(error)
        ) from None
    name = records.module_in(loaded)
    if name:
        what = f"holds an object of the class {name}, expected tensors and plain values only"
        raise UserError(f"{place}: {what}; nothing was run: {cure}")
    return loaded


def _tensor(where: str, tensor: Any) -> Tensor:
    """A loaded tensor as one of ours.

    Raises:
        UserError: sparse, quantized, or far more values than the file holds.
    """
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or "float8" in str(tensor.dtype):
        what = str(tensor.layout).removeprefix("torch.") if tensor.layout != torch.strided else str(tensor.dtype)
        raise UserError(f"{where} is {what}: a sparse or quantized tensor, expected float32, float16 or bfloat16")
    if tensor.device.type != "cpu":
        raise UserError(f"{where} is on the device {tensor.device}, without values: expected a saved tensor")
    if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), _ABSURD):
        raise UserError(f"{where}: {list(tensor.shape)} values that the file does not hold")
    code = torch_file.CODES.get(str(tensor.dtype))
    dtype = DTYPES[code] if code else torch.empty(0, dtype=tensor.dtype).numpy().dtype
    return Tensor(tuple(tensor.shape), dtype, lambda: torch_file.as_numpy(tensor))


def _shared(flat: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Names of tensors that are one in memory, and so in the file."""
    places: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in flat.items():
        if tensor.numel() and tensor.layout.__str__() == "torch.strided":
            where = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype)
            places.setdefault(where, []).append(name)
    return [tuple(names) for names in places.values() if len(names) > 1]


def _copies(tensors: Mapping[str, Tensor], known: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Matrices outside of blocks that are equal bit for bit: a head that is the embedding's copy."""
    shared = {name for group in known for name in group[1:]}
    rest = [
        name
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and tensor.dtype.name in FLOATS and name not in shared
        and not any(word.isdigit() for word in name.split("."))
    ]  # fmt: skip
    while rest:
        first = rest.pop(0)
        same = [name for name in rest if equal(tensors[first], tensors[name])]
        if same:
            yield first, *same
            rest = [name for name in rest if name not in same]


def _dotted(place: Path, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Names with ``.`` between words; and what the file has there, which Flax and TensorFlow write as ``/``."""
    if any("." in name for name in found) or not any("/" in name for name in found):
        return found, "."
    return {name.replace("/", "."): tensor for name, tensor in found.items()}, "/"


def _prefix(names: Mapping[str, Any]) -> str:
    """What every name begins with: the attributes under which wrappers hold a model; not its list of blocks."""
    words, count = [name.split(".") for name in names], 0
    while len(words) > 1 and all(
        len(each) >= count + 2 and each[count] == words[0][count] and not each[count + 1].isdigit() for each in words
    ):
        count += 1
    return "".join(f"{word}." for word in words[0][:count])


def _check_twice(place: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses a name that is there with and without a wrapper's word."""
    seen: dict[str, str] = {}
    for name in tensors:
        plain = ".".join(word for word in name.split(".") if word not in module_names.ANYWHERE)
        if plain in seen:
            raise UserError(f"{place}: {seen[plain]} and {name} are one name but for a wrapper's prefix: expected one")
        seen[plain] = name


def _shown(extras: Mapping[str, Any]) -> str:
    return f": found {', '.join(sorted(extras)[:6])}" if extras else ""
