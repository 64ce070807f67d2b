"""The format that a map is: a model here as the file of their own code again, by the map that its adoption made."""

import copy
import functools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.adopt import apply, map_file, source
from convert.adopt.maps import buffers, moments
from convert.adopt.rules import Map
from convert.formats import npz, stream
from convert.formats.limits import left_behind
from convert.formats.opened import Opened, Options, Tensor
from convert.formats.torch_files import file as torch_file
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders.model_folder import DTYPES

SUFFIXES = {".pt": "pt", ".pth": "pt", ".bin": "pt", ".ckpt": "pt", ".safetensors": "safetensors", ".npz": "npz"}


class Writer:
    """The format that a map is."""

    KIND = "file"

    def __init__(self, path: Path, dst: Path):
        """``path`` is the map; the suffix of ``dst`` says the container.

        Raises:
            UserError: there is no such container; or see ``map_file.read`` and ``map_file.read_kept``.
        """
        if dst.suffix.lower() not in SUFFIXES:
            raise UserError(f"{dst}: expected a name that ends in {', '.join(SUFFIXES)}: by a map one file is written")
        self.path, self.kind = path, SUFFIXES[dst.suffix.lower()]
        self.map = map_file.read(path)
        self.buffers = buffers.again(self.map, map_file.read_kept(path, self.map))

    def check(self, opened: Opened) -> None:
        """Refuses a model that is not the map's.

        Raises:
            UserError: names the first tensor that only one has, or that has another shape.
        """
        wanted = {name: tuple(param.shape) for name, param in apply.Plan(self.map).table.items()}
        found = {name: tuple(param.shape) for name, param in apply.Plan(apply.fusion(opened.config)).table.items()}
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                one, other = (f"{list(each[name])}" if name in each else "none" for each in (found, wanted))
                cure = "correct its [model]" if name in found and name in wanted else "expected the model it is of"
                raise UserError(f"{opened.path}: {name}: {one} here, {other} by {self.path}: {cure}")

    def ours(self, opened: Opened) -> dict[str, Tensor]:
        """The model's tensors, none fused."""
        return apply.lazily(apply.fusion(opened.config), opened.tensors)

    def write(self, opened: Opened, place: Path, options: Options) -> list[str]:
        """Their file; notes of what it has no place for.

        Raises:
            UserError: a value is not finite or does not fit, or the system refuses to write.
        """
        theirs = apply.back_lazily(self.map, self.ours(opened))
        dtypes, notes = _dtypes(self.map, theirs, options)
        notes += left_behind(opened, "the map", moments=True)
        if opened.moments and not (self.kind == "pt" and self.map.optimizer):
            cure = "[optimizer] in the map, and a .pt, give them a place"
            notes.append(f"AdamW's moments are left behind: {cure}")
        if self.kind == "pt":
            self._write_pt(opened, theirs, dtypes, place, options)
            return notes
        if self.map.beside:
            notes.append(f"left behind, as .{self.kind} has no place for it: {', '.join(map(str, self.map.beside))}")
        parts = {self._full(name): (name, tensor, dtypes[name]) for name, tensor in theirs.items()}
        own = {self._full(name): array for name, array in self.buffers.items()}
        if self.kind == "safetensors":
            made = [stream.plain(full, tensor, dtype, False, options) for full, (_, tensor, dtype) in parts.items()]
            made += [_part(full, array) for full, array in own.items()]
            stream.write_safetensors(place.parent, place.name, sorted(made, key=_wide_first), None, options)
            return notes
        with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
            for full, (_, tensor, dtype) in parts.items():
                with archive.open(zipfile.ZipInfo(f"{full}.npy"), "w", force_zip64=True) as member:
                    npz.write_array(member, full, tensor, dtype, options)
            for full, array in own.items():
                with archive.open(zipfile.ZipInfo(f"{full}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, _npy(array), allow_pickle=False)
        return notes

    def verify(self, opened: Opened, place: Path) -> None:
        """Reads what was written by the map.

        Raises:
            RunError: a value is not the model's, as the file's dtype has it.
        """
        state = source.read(place)
        read = apply.lazily(self.map, state.tensors)
        for name, tensor in self.ours(opened).items():
            found = read[name].read()
            if found.tobytes() != np.ascontiguousarray(tensor.read().astype(found.dtype)).tobytes():
                raise RunError(f"{place}: {name}: read back, it differs; nothing was kept")

    def _full(self, name: str) -> str:
        """Their name as the file has it."""
        return (self.map.prefix + name).replace(".", self.map.separator)

    def _write_pt(
        self,
        opened: Opened,
        theirs: Mapping[str, Tensor],
        dtypes: Mapping[str, np.dtype],
        place: Path,
        options: Options,
    ) -> None:
        """A file of torch.save; copies of a tied tensor, and equal buffers, share their memory."""
        archive = torch_file.Archive(options)
        plan, one = apply.Plan(self.map), dict[Any, Any]()
        state: dict[str, Any] = OrderedDict()
        for name, tensor in theirs.items():
            rule = plan.rule_of[name]
            key = (rule.to, rule.axes, dtypes[name]) if name == rule.theirs else name
            if key not in one:
                one[key] = archive.add(name, tensor, dtypes[name])
            state[self._full(name)] = one[key]
        for name, array in self.buffers.items():
            state[self._full(name)] = one.setdefault(id(array), torch_file.as_torch(array))
        content: Any = copy.deepcopy(dict(self.map.beside))
        content = _put(content, self.map.under, _nested(state) if self.map.nested else state)
        if opened.moments and self.map.optimizer:
            made = moments.write(
                self.map, opened.moments, opened.config, lambda n, each: archive.add(n, each, each.dtype)
            )
            content = _put(content, self.map.optimizer.at, made)
            moments.set_step(content, self.map.optimizer.step, opened.moments.step)
        archive.save(_lists(content), place)


def _dtypes(made: Map, theirs: Mapping[str, Tensor], options: Options) -> tuple[Mapping[str, np.dtype], list[str]]:
    """The dtype that each is written as: the file's where no value changes by that; and a note where one would."""
    if options.dtype:
        asked = DTYPES[options.dtype]
        return {name: asked for name in theirs}, []
    plan = apply.Plan(made)
    found = {name: tensor.dtype for name, tensor in theirs.items()}
    narrower: dict[str, np.dtype] = {}
    for name, dtype in found.items():
        said = made.dtypes.get(name) or made.dtypes.get(plan.rule_of[name].theirs) or made.dtypes.get("")
        wanted = buffers.dtype_of(said) if said else dtype
        if apply.promote((wanted, dtype)) == wanted:
            found[name] = wanted
        else:
            narrower[name] = wanted
    exact = all(_fits(theirs[name].read(), dtype) for name, dtype in narrower.items())
    if exact:
        return found | narrower, []
    name = next(iter(narrower))
    said = f"{len(narrower)} tensors are {found[name]}, where the file had {narrower[name]}"
    return found, [f"{said}, which would round them: --dtype {narrower[name]} does"]


def _fits(array: np.ndarray, dtype: np.dtype) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype).astype(array.dtype).tobytes() == np.ascontiguousarray(array).tobytes()


def _part(name: str, array: np.ndarray) -> stream.Part:
    """A buffer of a safetensors file, whose values may be -inf."""
    return stream.Part({name: (array.dtype, array.shape)}, lambda out: out.write(np.ascontiguousarray(array)))


def _wide_first(part: stream.Part) -> int:
    return -next(iter(part.specs.values()))[0].itemsize


def _npy(array: np.ndarray) -> np.ndarray:
    """As numpy writes it; bfloat16 as MLX does, as two raw bytes."""
    return array.view("V2") if array.dtype == DTYPES["bfloat16"] else array


def _put(content: dict[str, Any], at: Sequence[str], value: Any) -> Any:
    """``content`` with a value at a place in nested dicts, beside what is there."""
    if not at:
        return value if not content else content | value
    content[at[0]] = _put(content.get(at[0], {}), at[1:], value)
    return content


def _nested(state: Mapping[str, Any]) -> Any:
    """Names with dots as dicts and lists."""
    made: dict[str, Any] = {}
    for name, value in state.items():
        *before, last = name.split(".")
        functools.reduce(lambda here, word: here.setdefault(word, {}), before, made)[last] = value
    return _lists(made)


def _lists(value: Any) -> Any:
    """Dicts whose keys are 0 1 2 ... as texts, as lists."""
    if not isinstance(value, dict) or isinstance(value, OrderedDict):
        return value
    made = {key: _lists(each) for key, each in value.items()}
    return list(made.values()) if made and list(made) == [str(at) for at in range(len(made))] else made
