"""The framework half of a command: mlxgpt or torch_ref, imported by name, for this package may import neither."""

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

from mlxgpt.common.errors import UserError

PACKAGES = {"mlx": "mlxgpt", "torch": "torch_ref"}
_INSTALL = {"mlx": "pip install mlx (on Linux: 'mlx[cpu]')", "torch": "pip install 'mlxgpt[torch]'"}


@dataclass(frozen=True)
class Backend:
    """One framework's modules; both frameworks' have the same functions and classes."""

    name: str
    engine: ModuleType
    load: ModuleType
    generate: ModuleType


def resolve(name: str | None) -> str:
    """``mlx`` or ``torch``: as asked, else MLX where it runs, else torch.

    Raises:
        UserError: the one asked for does not import here, or neither does.
    """
    if name is None:
        for candidate in PACKAGES:
            if not _broken(candidate):
                return candidate
        raise UserError(f"neither MLX nor PyTorch is installed: {_INSTALL['mlx']}, or {_INSTALL['torch']}")
    reason = _broken(name)
    if reason:
        raise UserError(f"--backend {name}: {reason}; {_INSTALL[name]}")
    return name


def load(name: str | None) -> Backend:
    """The modules of a backend; ``name`` as in ``resolve``."""
    name = resolve(name)
    return Backend(
        name, *(importlib.import_module(f"{PACKAGES[name]}.{part}") for part in ("engine", "load", "generate"))
    )


def _broken(name: str) -> str:
    """Why a framework cannot be used here, or ''."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        # the device module imports the framework, and before MLX its BLAS
        importlib.import_module(f"{PACKAGES[name]}.device")
    except ImportError as error:
        return f"does not import ({error})".replace("\n", " ")
    return ""
