"""A sample of the user's own model: token ids, the logits that it gives for them, and hidden states if there are any.

A file is .npz, .safetensors or of torch.save, with these names:

ids (also tokens, input_ids)          (T,) or (B, T) whole numbers
logits (also log_probs, output)       (T, V) or (B, T, V); of the last position alone (V,), (B, V) or (B, 1, V)
hidden, or hidden.0, hidden.1 ...     optional: (n_layer + 1, T, C) or (n_layer + 1, B, T, C), or one array a place,
                                      (T, C) or (B, T, C): what enters the first block, then what each block gives

B batch, T tokens, C n_embd, V vocabulary.
"""

import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.formats.torch_files import file as torch_file
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import tensors as safetensors

IDS = ("ids", "tokens", "input_ids", "idx")
LOGITS = ("logits", "log_probs", "output")
LARGEST = 1 << 32  # bytes of all arrays: 16 thousand tokens of a vocabulary of 64 thousand, in float32
ENOUGH = 32  # tokens: fewer leave choices open, such as the base of rope's frequencies
_ONE = re.compile(r"hidden(?:_states)?[._/\[]?(\d+)\]?")
# what zipfile raises for a broken archive, and numpy for the header of an array, which it reads as Python
_DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError)
_DAMAGED += (tokenize.TokenError, SyntaxError, RecursionError)


@dataclass(frozen=True)
class Sample:
    """What a model gave. ``logits`` float32 are (B, T, V), or (B, V) where only the last position's are known.

    ``normalized``: they are known up to a constant a row, as log-softmax gives them. ``dtype`` is the coarsest of
    float64, float32, float16, bfloat16 that holds every value: what the numbers were most likely computed in.
    """

    ids: np.ndarray  # (B, T) int32
    logits: np.ndarray
    hidden: tuple[np.ndarray, ...] | None = None  # each (B, T, C) float32; [0] enters the first block
    dtype: str = "float32"
    normalized: bool = False
    notes: tuple[str, ...] = ()
    where: str = "sample"

    @property
    def last(self) -> bool:
        """Whether logits are of the last position alone."""
        return self.logits.ndim == 2

    @property
    def vocab_size(self) -> int:
        """V: as many as there are logits of a token."""
        return self.logits.shape[-1]

    @property
    def step(self) -> float:
        """The relative rounding of one number of the sample's dtype."""
        return {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(self.dtype, 2.0**-24)

    def comparable(self, logits: np.ndarray) -> np.ndarray:
        """A candidate's logits (B, T, V) as the sample has them: of the last position, or normalized."""
        chosen = logits[:, -1] if self.last else logits
        return log_softmax(chosen).astype(np.float32) if self.normalized else chosen

    def check(self, vocab_size: int, n_layer: int = 0, n_embd: int = 0, block_size: int = 0) -> None:
        """Refuses a sample of a model of other sizes; 0 is a size that is not known.

        Raises:
            UserError: the first that differs, with the sample's and the model's.
        """
        if self.ids.max() >= vocab_size:
            raise UserError(f"{self.where}: ids: the largest is {self.ids.max()}, but the vocabulary has {vocab_size}")
        if self.vocab_size != vocab_size:
            raise UserError(
                f"{self.where}: logits of {self.vocab_size} tokens, but the vocabulary has {vocab_size}:"
                " expected the sample of this very model"
            )
        if block_size and self.ids.shape[1] > block_size:
            raise UserError(f"{self.where}: {self.ids.shape[1]} tokens, but the context holds {block_size}")
        if self.hidden and n_layer and len(self.hidden) != n_layer + 1:
            raise UserError(
                f"{self.where}: {len(self.hidden)} hidden states, expected {n_layer + 1}:"
                f" what enters the first of {n_layer} blocks, and what each gives"
            )
        if self.hidden and n_embd and self.hidden[0].shape[-1] != n_embd:
            raise UserError(f"{self.where}: hidden states of {self.hidden[0].shape[-1]} numbers, expected {n_embd}")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def read(path: Path | str) -> Sample:
    """The sample in a file.

    Raises:
        UserError: one line: no such file, damaged, Python objects in it, a missing or misshapen array, values that are
            not finite, or logits that say nothing.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(f"{place}: {'a folder, expected a file' if place.exists() else 'no such file'}")
    return of_arrays(_arrays(place), str(place))


def of_arrays(given: Mapping[str, np.ndarray], where: str) -> Sample:
    """The sample that arrays by name are.

    Raises:
        UserError: see ``read``.
    """
    ids = _ids(where, *_named(where, given, IDS))
    name, logits = _named(where, given, LOGITS)
    if not _is_float(logits):
        raise UserError(f"{where}: {name} are {logits.dtype}, expected floats")
    dtype, ready = coarsest(logits), _shaped(where, name, logits, ids.shape)
    _check_finite(where, name, ready)
    hidden = _hidden(where, given, ids.shape)
    ready, normalized, said = _normalized(ready)
    _check_telling(where, name, ready)
    notes = [*_remarks(ids, dtype, ready), *said]
    return Sample(ids, ready, hidden, dtype, normalized, tuple(notes), where)


def _named(where: str, given: Mapping[str, np.ndarray], names: tuple[str, ...]) -> tuple[str, np.ndarray]:
    """The first of these names that is there."""
    found = next((name for name in names if name in given), None)
    if found is None:
        listed = ", ".join(sorted(given)[:8]) or "nothing"
        raise UserError(f"{where}: no {names[0]}: holds {listed}; expected ids, logits and, optionally, hidden")
    return found, given[found]


def _ids(where: str, name: str, given: np.ndarray) -> np.ndarray:
    """(B, T) int32."""
    if given.dtype.kind not in "fiu" or (given.dtype.kind == "f" and not (given == np.floor(given)).all()):
        raise UserError(f"{where}: {name} are {given.dtype}, expected token ids, whole numbers")
    if given.ndim not in (1, 2):
        raise UserError(f"{where}: {name} {_shape(given)}: expected (T,) or (B, T)")
    if not given.size:
        raise UserError(f"{where}: {name} {_shape(given)}: no tokens")
    if given.min() < 0 or given.max() >= 2**31:
        wrong = given.min() if given.min() < 0 else given.max()
        raise UserError(f"{where}: {name}: {wrong:g} is no token id")
    return np.atleast_2d(given).astype(np.int32)


def _shaped(where: str, name: str, logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Logits as (B, T, V) or, of the last position, (B, V), in float32."""
    b, t = shape
    values, v = logits.astype(np.float32), logits.shape[-1] if logits.ndim else 0
    if v < 2:
        raise UserError(f"{where}: {name} {_shape(logits)}: expected ({b}, {t}, V), V the vocabulary")
    leading = logits.shape[:-1]
    if leading in ((b, t), (b * t,)) or (b == 1 and leading == (t,)):
        return values.reshape(b, t, v)
    if leading in ((b,), (b, 1)) or (b == 1 and leading == ()):
        return values.reshape(b, v)
    transposed = logits.ndim > 1 and logits.shape[-1] == t and logits.shape[-2] != t
    cure = f": transposed? ({b}, {t}, V) is expected" if transposed else f" for ids ({b}, {t}): expected ({b}, {t}, V)"
    raise UserError(f"{where}: {name} {_shape(logits)}{cure}")


def _hidden(where: str, given: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, ...] | None:
    """The hidden states, each (B, T, C) float32."""
    b, t = shape
    whole = next((name for name in ("hidden", "hidden_states") if name in given), None)
    if whole is not None:
        found = [(f"{whole}[{n}]", state) for n, state in enumerate(given[whole])]
        if given[whole].ndim not in (3, 4):
            raise UserError(f"{where}: {whole} {_shape(given[whole])}: expected (n_layer + 1, T, C), T = {t}")
    else:
        numbers = {int(match[1]): name for name in given if (match := _ONE.fullmatch(name))}
        missing = next((n for n in range(max(numbers, default=-1) + 1) if n not in numbers), None)
        if missing is not None:
            raise UserError(f"{where}: no hidden.{missing}: expected hidden.0 to hidden.{max(numbers)}")
        found = [(numbers[n], given[numbers[n]]) for n in sorted(numbers)]
    if not found:
        return None
    states = []
    for name, state in found:
        fits = state.ndim >= 2 and (state.shape[:-1] == (b, t) or (b == 1 and state.shape[:-1] == (t,)))
        if not fits or not _is_float(state):
            raise UserError(f"{where}: {name} {_shape(state)} of {state.dtype}: expected floats ({b}, {t}, C)")
        if state.shape[-1] != found[0][1].shape[-1]:
            raise UserError(
                f"{where}: {name} has {state.shape[-1]} numbers a token, {found[0][0]} {found[0][1].shape[-1]}"
            )
        ready = state.astype(np.float32).reshape(b, t, -1)
        _check_finite(where, name, ready)
        states.append(ready)
    return tuple(states)


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def _shape(array: np.ndarray) -> str:
    return f"({', '.join(map(str, array.shape))})"


def _check_finite(where: str, name: str, array: np.ndarray) -> None:
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise UserError(f"{where}: {name}: {bad} of {array.size} values are not finite")


def _check_telling(where: str, name: str, logits: np.ndarray) -> None:
    """Refuses logits that any weights at all could give."""
    if np.ptp(logits) == 0:
        raise UserError(
            f"{where}: {name} are {logits.flat[0]:g} everywhere, which says nothing: expected those of a trained model"
        )


def is_normalized(logits: np.ndarray) -> bool:
    """Whether rows are log-probabilities."""
    sums = np.exp(np.minimum(logits, 1.0).astype(np.float64)).sum(axis=-1)
    return bool(logits.max() <= 1e-3 and np.abs(sums - 1).max() < 5e-3)


def _normalized(logits: np.ndarray) -> tuple[np.ndarray, bool, list[str]]:
    """Whether rows are log-probabilities; probabilities become them; and what is to be said of it."""
    if is_normalized(logits):
        return logits, True, ["the rows are log-probabilities: compared as such"]
    if logits.min() > 0 and np.abs(logits.sum(axis=-1, dtype=np.float64) - 1).max() < 5e-3:
        return np.log(logits), True, ["the rows are probabilities: their logarithms are compared"]
    return logits, False, []


def coarsest(array: np.ndarray) -> str:
    """The coarsest of bfloat16, float16, float32, float64 that holds every value as it is."""
    if array.dtype == ml_dtypes.bfloat16:
        return "bfloat16"
    if array.dtype.kind != "f" or not array.size:
        return "float32"
    flat = array.reshape(-1)[: 1 << 20]
    with np.errstate(over="ignore"):
        for name, kind in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)):
            if np.array_equal(flat.astype(kind).astype(flat.dtype), flat):
                return name
    return "float64"


def _remarks(ids: np.ndarray, dtype: str, logits: np.ndarray) -> list[str]:
    """What weakens a sample that can be used."""
    made, (b, t) = [], ids.shape
    if dtype in ("float16", "bfloat16"):
        made.append(
            f"the logits are {dtype}: choices that differ by less than its rounding stay open; float32 tells more"
        )
    if t < ENOUGH:
        made.append(f"{t} token{'s' * (t > 1)}, which may be too few to tell choices apart: {ENOUGH} or more tell more")
    if t > 1 and (ids == ids[:, :1]).all():
        made.append("every token of a row is the same one, which says little of attention: random ids tell more")
    elif t > 1 and b == 1 and len(np.unique(ids)) < min(t, 8) / 2:
        made.append(f"only {len(np.unique(ids))} different tokens: random ids tell more")
    if logits.ndim == 3 and t > 1 and np.ptp(logits, axis=1).max() == 0 and len(np.unique(ids)) > 1:
        made.append("the logits are the same at every position: the model does not look at its tokens")
    if logits.ndim == 2 and t > 1:
        made.append("logits of the last position alone: a choice that shows only elsewhere stays open")
    return made


def _arrays(place: Path) -> dict[str, np.ndarray]:
    """Every array of the file by its name, bfloat16 as such."""
    try:
        if safetensors_like(place):
            entries, _ = safetensors.read_header(place)
            _check_size(place, sum(math.prod(entry.shape) * 8 for entry in entries.values()))
            return {name: entry.read() for name, entry in entries.items()}
        if torch_file.strings_in_pickle(place):
            return _of_torch(place)
        if not zipfile.is_zipfile(place):
            raise UserError(f"{place}: truncated, or no .npz, .safetensors or file of torch.save")
        return _of_npz(place)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror or error}") from None


def safetensors_like(place: Path) -> bool:
    """Whether a file begins as safetensors do: a length, then JSON."""
    with open(place, "rb") as file:
        return file.read(9)[8:] == b"{"


def _check_size(place: Path, size: int) -> None:
    if size > LARGEST:
        raise UserError(f"{place}: {size / 2**30:.1f} GiB of arrays: a sample of a few dozen tokens is enough")


def _of_npz(place: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz; their sizes are known before any is read, and Python objects are refused."""
    made: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(place) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            _check_size(place, sum(info.file_size for info in members))
            for info in members:
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as member:
                    _check_header(f"{place}: {name}", member, info.file_size)
                with archive.open(info) as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                made[name] = array.view(ml_dtypes.bfloat16) if array.dtype.str in ("|V2", "<V2") else array
    except _DAMAGED as error:
        raise UserError(f"{place}: damaged, or no .npz: {' '.join(str(error).split())}") from None
    return made


def _check_header(where: str, member: Any, size: int) -> None:
    """Refuses an array of Python objects, and one that is not as large as it says."""
    version = np.lib.format.read_magic(member)
    first = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = first(member)
    if dtype.hasobject:
        raise UserError(f"{where}: Python objects, which are never unpickled: expected an array of numbers")
    if member.tell() + math.prod(shape) * dtype.itemsize != size:
        raise UserError(f"{where}: {size - member.tell()} bytes for {dtype} {list(shape)}: damaged")


def _of_torch(place: Path) -> dict[str, np.ndarray]:
    """The tensors that ``torch.save`` wrote: a dict, in which a list is one array a place."""
    content = torch_file.load_file(place)
    if not isinstance(content, Mapping):
        raise UserError(f"{place}: {type(content).__name__}, expected a dict of ids, logits and, optionally, hidden")
    made, total = {}, 0
    for key, value in content.items():
        if isinstance(value, list) and value and all(type(one) is int for one in value):
            made[str(key)] = np.array(value)
            continue
        several = isinstance(value, list | tuple)
        for name, tensor in [(f"{key}.{n}", one) for n, one in enumerate(value)] if several else [(str(key), value)]:
            if not hasattr(tensor, "untyped_storage"):
                continue
            torch_file.check_held(f"{place}: {name}", tensor)
            total += tensor.numel() * tensor.element_size()
            _check_size(place, total)
            made[name] = torch_file.as_numpy(tensor)
    return made
