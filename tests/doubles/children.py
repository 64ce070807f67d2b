"""A double for a whole process and those that it starts: MLXGPT_DOUBLE names it, ``metal`` or ``macos`` or both.

conftest.py imports this module first; in every other process ``site/sitecustomize.py`` does, which Python imports as it
starts.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

VARIABLE = "MLXGPT_DOUBLE"
_SITE = Path(__file__).parent / "site"


def environment(double: str) -> dict[str, str]:
    """The variables with which a child process has the double, and its children too."""
    places = [str(_SITE), str(_SITE.parent.parent)]
    before = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place not in places]
    names = [*os.environ.get(VARIABLE, "").split(), double]
    return {VARIABLE: " ".join(dict.fromkeys(names)), "PYTHONPATH": os.pathsep.join([*places, *before])}


def _begin() -> None:
    """Installs the doubles that the environment names, as this process starts; once."""
    names = os.environ.get(VARIABLE, "").split()
    for name in names:
        os.environ.update(environment(name))
    if "metal" in names and "mlx.core" not in sys.modules:
        sys.meta_path.insert(0, _Finder())
    if "macos" in names:
        importlib.import_module("doubles.macos").MacOS().install()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds mlx.core, which then has the device from its first line on."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "mlx.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)  # pyright: ignore[reportArgumentType]
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module("doubles.metal").Metal(forbidden=True).install()


_begin()
