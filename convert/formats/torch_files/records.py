"""Settings that a file of ``torch.save`` holds as an object: read as plain values, without the class that it is of.

For every name that PyTorch does not know as harmless a class of ours stands in, which keeps what it is given and runs
nothing. Whatever would be called with arguments is refused, but for numpy's numbers and paths; so is a whole module.
"""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_GIVEN = ("numpy.", "pathlib.")
_MODULE = {"_modules", "_parameters", "_buffers"}


class Record:
    """What was made of an unknown class: its name, its arguments and its attributes."""

    name = ""
    given: tuple[Any, ...] = ()

    def __new__(cls, *args: Any) -> "Record":
        """Keeps the arguments.

        Raises:
            pickle.UnpicklingError: the name is not one whose arguments are harmless.
        """
        if args and not cls.name.startswith(_GIVEN):
            raise pickle.UnpicklingError(f"unsupported operand {cls.name} with arguments")
        made = super().__new__(cls)
        made.given = args
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Keeps the attributes, of __slots__ too."""
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        for part in parts:
            if isinstance(part, Mapping):
                self.__dict__.update({str(key): value for key, value in part.items()})


def stand_ins(names: Iterable[str]) -> list[tuple[type[Record], str]]:
    """A class for each name, as ``torch.serialization.safe_globals`` takes them."""
    return [(type("Record", (Record,), {"name": name}), name) for name in names]


def module_in(value: Any) -> str:
    """The name of the first class of which a whole module, or anything that holds tensors, lies in ``value``; or ''."""
    import torch

    if isinstance(value, Record):
        held = vars(value)
        if held.keys() >= _MODULE or any(isinstance(each, torch.Tensor) for each in held.values()):
            return value.name
        return next(filter(None, map(module_in, held.values())), "")
    if isinstance(value, Mapping):
        return next(filter(None, map(module_in, value.values())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, map(module_in, value)), "")
    return ""


def plain(record: Record) -> Any:
    """A record as a plain value: a number, a path's text, its attributes by name; None if it is none of these."""
    if record.name in _SCALARS and len(record.given) == 2:
        kind, data = record.given
        code = kind.given[0] if isinstance(kind, Record) and kind.given else ""
        if isinstance(code, str) and code[:1] in "fiub" and isinstance(data, bytes):
            try:
                return np.frombuffer(data, np.dtype(code))[0].item()
            except (TypeError, ValueError, IndexError):
                return None
        return None
    if record.name.startswith("pathlib."):
        return str(PurePosixPath(*map(str, record.given)))
    own = {key: value for key, value in vars(record).items() if key != "given"}
    return own or None
