"""The BLAS that MLX's CPU backend multiplies with on Linux; the only place that loads one.

The Linux wheel of MLX links netlib's reference BLAS. The dynamic linker searches a process's global scope first, so an
OpenBLAS or MKL loaded with RTLD_GLOBAL *before* ``import mlx.core`` takes its place: float32 products are then 15 to 30
times faster. macOS has Accelerate and needs nothing. Every module that imports MLX imports this one first, which is why
MLX's TF32 is decided here as well (common/tf32.py).

The environment variable MLXGPT_BLAS forces a choice: auto (OpenBLAS, else MKL), openblas, mkl or none.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mlxgpt.common import tf32
from mlxgpt.common.errors import UserError

_ADVICE = "install OpenBLAS (Debian: apt install libopenblas0-pthread) or, on x86-64, pip install 'mlxgpt[cpu-fast]'"
# A function that only this library exports tells it from the others.
_MARKS = {"openblas": "openblas_get_config", "mkl": "MKL_Get_Max_Threads"}
# Its OpenMP comes with the wheel; the sequential layer would also slow a PyTorch imported later. By the variable only:
# after MKL_Set_Threading_Layer(INTEL), products of two threads with a bias are wrong once PyTorch is imported as well.
_LAYER = {"MKL_THREADING_LAYER": "INTEL"}


@functools.cache
def load() -> str:
    """Loads the fastest BLAS found, once, and returns its name: openblas, mkl, reference or accelerate (macOS).

    Raises:
        UserError: MLXGPT_BLAS is not a choice, or names a library that is not here.
    """
    choice = os.environ.get("MLXGPT_BLAS", "auto")
    if choice not in ("auto", *_MARKS, "none"):
        raise UserError(f"MLXGPT_BLAS={choice}: expected auto, openblas, mkl or none")
    if sys.platform != "linux":
        if choice in _MARKS:
            raise UserError(f"MLXGPT_BLAS={choice}: a BLAS is loaded on Linux only; expected auto or none")
        return "accelerate"
    present = _in_scope()
    if present:
        if choice not in ("auto", present):
            raise UserError(f"MLXGPT_BLAS={choice}: {present} is already loaded in this process (LD_PRELOAD?)")
        return present
    if choice == "none":
        return "reference"
    if "mlx.core" in sys.modules:
        _warn("MLX was imported before mlxgpt and keeps its slow reference BLAS; import mlxgpt.blas first")
        return "reference"
    for name in _MARKS if choice == "auto" else [choice]:
        if _load_openblas() if name == "openblas" else _load_mkl():
            return name
    if choice != "auto":
        raise UserError(f"MLXGPT_BLAS={choice}: this library was not found; {_ADVICE}")
    _warn(f"MLX has only its slow reference BLAS here; {_ADVICE}")
    return "reference"


@functools.cache
def precision() -> str:
    """Decides, once, how MLX multiplies float32 on a GPU: TF32 ``on`` or ``off``, ``unknown`` if MLX came first.

    Raises:
        UserError: MLXGPT_TF32 is neither 0 nor 1.
    """
    on = tf32.asked()
    # MLX reads the variable at its first product, which may be behind us
    late = "mlx.core" in sys.modules and os.environ.get("MLX_ENABLE_TF32", "1") != ("1" if on else "0")
    os.environ["MLX_ENABLE_TF32"] = "1" if on else "0"
    tf32.override(on)
    if not late:
        return "on" if on else "off"
    mx = sys.modules["mlx.core"]
    if mx.is_available(mx.gpu):
        _warn("MLX was imported before mlxgpt: its float32 products may be TF32; import mlxgpt first", "")
    return "unknown"


def describe() -> dict[str, str]:
    """``name``, ``version``, ``core`` (its kernels), ``threads``, and ``jit``: g++, which mx.compile calls, or ''."""
    name, scope = load(), ctypes.CDLL(None)
    known = {"name": name, "version": "", "core": "", "threads": "1", "jit": ""}
    if name == "openblas":
        scope.openblas_get_config.restype = scope.openblas_get_corename.restype = ctypes.c_char_p
        known["version"] = scope.openblas_get_config().decode()
        known["core"] = scope.openblas_get_corename().decode()
        known["threads"] = str(scope.openblas_get_num_threads())
    elif name == "mkl":
        text = ctypes.create_string_buffer(256)
        scope.MKL_Get_Version_String(text, len(text))
        known["version"] = text.value.decode().strip()
        known["core"] = f"branch {scope.MKL_CBWR_Get_Auto_Branch()}, CBWR {os.environ.get('MKL_CBWR', 'OFF')}"
        known["threads"] = str(scope.MKL_Get_Max_Threads())
    elif name == "accelerate":
        known["threads"] = ""
    if sys.platform == "linux" and shutil.which("g++"):
        known["jit"] = "g++"
    return known


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Products by one thread within; where the BLAS has no such setting, as they are."""
    name, scope = load(), ctypes.CDLL(None)
    if name not in _MARKS:
        yield
        return
    get, put = {
        "openblas": ("openblas_get_num_threads", "openblas_set_num_threads"),
        "mkl": ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
    }[name]
    before = getattr(scope, get)()
    getattr(scope, put)(1)
    try:
        yield
    finally:
        getattr(scope, put)(before)


def _in_scope() -> str:
    """The BLAS that the process's global scope already holds, or ''."""
    scope = ctypes.CDLL(None)
    return next((name for name, mark in _MARKS.items() if hasattr(scope, mark)), "")


def _load_openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _load_mkl() -> bool:
    """The wheel ``mkl`` puts its libraries into the environment's lib folder; a system's MKL has the bare name."""
    wheel = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so.*"))
    for path in (*wheel, "libmkl_rt.so"):
        try:
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        chosen = {name: value for name, value in _LAYER.items() if name not in os.environ}
        os.environ.update(chosen)
        library.MKL_Get_Max_Threads()  # the first call loads the layer
        for name in chosen:  # a child process chooses for itself
            del os.environ[name]
        return True
    return False


def _warn(text: str, hint: str = " (MLXGPT_BLAS=none hides this)") -> None:
    print(f"mlxgpt: warning: {text}{hint}", file=sys.stderr)


load()
precision()
