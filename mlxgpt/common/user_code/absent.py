"""Libraries that a user's file imports and this machine lacks, such as what its training logs to.

They stand in as empty modules, since a model seldom needs them; whoever uses one of them is told that it is missing.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

NEEDED = ("torch", "mlx", "numpy", "jax", "tensorflow")
_BRINGS = {"tensorboard": "torch.utils.tensorboard"}  # what fails to import without it


class _Kind(type):
    """Any name of a library that is not there: it can be named and inherited from, not called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _kind(cls.library, name)

    def __call__(cls, *given: Any, **named: Any) -> Any:
        raise ModuleNotFoundError(f"{cls.library} is not installed here", name=cls.library)

    library = ""


def _kind(library: str, name: str) -> Any:
    return _Kind(name, (), {"library": library})


class _Absent(types.ModuleType):
    """A module that is not there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _kind(self.__name__.partition(".")[0], name)


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of libraries that were missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def miss(self, error: ModuleNotFoundError) -> bool:
        """Lets the library stand in that an import missed; False if that is no help."""
        root = (error.name or "").partition(".")[0]
        if not root or root in (*NEEDED, *self.missed, *sys.modules):
            return False
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self.missed.append(root)
        return True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As Python's import asks."""
        roots = [root for each in self.missed for root in (each, _BRINGS.get(each, each))]
        if not any(fullname == root or fullname.startswith(f"{root}.") for root in roots):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """An empty one."""
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing."""
