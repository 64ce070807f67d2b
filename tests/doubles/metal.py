"""A Metal device for MLX on a machine without one: MLX says that it has a GPU, and computes on the CPU.

The branches that the product has for a GPU run, and what Metal refuses is refused with its message, as MLX 0.32's
sources have it: float64 in any operation (array.cpp), linalg without a CPU stream (linalg.cpp), a scatter of 8-byte
elements (backend/metal/indexing.cpp), a wired limit above the working set (backend/metal/allocator.cpp). Every function
of ``mlx.core`` and every method of its arrays is wrapped, so what Python builds is seen, traced functions included;
what C++ builds alone (gradients) is not. Metal's rounding, speed and memory are not imitated.

One test: the fixture ``metal`` of conftest.py. Any test, and the processes that it starts::

    MLXGPT_DOUBLE=metal MLXGPT_DEVICE=auto python -m pytest tests/test_generate.py

Without MLXGPT_DEVICE the suite pins the CPU, and computing on the device is an error, in child processes too.
"""

import functools
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

GIB = 2**30
# not operations: they take or give devices, or evaluate; those that matter here have a stand-in
_LEFT = {
    "async_eval", "checkpoint", "compile", "custom_function", "disable_compile", "enable_compile", "eval",
    "export_function", "export_to_dot", "exporter", "grad", "import_function", "jvp", "value_and_grad", "vjp", "vmap",
}  # fmt: skip
_LEFT_METHODS = {
    "__new__",
    "__init__",
    "item",
    "tolist",
    "__getstate__",
    "__setstate__",
    "__dlpack__",
    "__array__",
    "__repr__",
}
_SCATTERS = {"__setitem__", "put_along_axis", "add", "subtract", "multiply", "divide", "maximum", "minimum"}
_NEEDS_CPU = "This op is not yet supported on the GPU. Explicitly pass a CPU stream to run it."
_ON_GPU = {"norm", "cross"}  # of linalg; the other functions need a CPU stream


@dataclass
class Metal:
    """The device: what ``mx.device_info`` says of it, and whether it is MLX's default now."""

    current: ClassVar["Metal | None"] = None  # the one that is installed
    name: str = "Apple M2 Pro"
    architecture: str = "applegpu_g14s"
    memory: int = 16 * GIB
    working_set: int = 11 * GIB
    default: bool = True
    forbidden: bool = False  # under MLXGPT_DEVICE=cpu every operation on it is an error
    used: int = 0  # operations that were built on it
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _streams: list[Any] = field(default_factory=list)
    _wired: int = 0

    def info(self) -> dict[str, str | int]:
        """``mx.device_info`` of the device."""
        return {
            "device_name": self.name,
            "architecture": self.architecture,
            "max_buffer_length": self.working_set * 3 // 4,
            "max_recommended_working_set_size": self.working_set,
            "memory_size": self.memory,
            "resource_limit": 499_000,
        }

    def install(self) -> None:
        """Replaces what of ``mlx.core`` knows a device; ``remove`` puts it back."""
        import mlx.core as mx

        Metal.current = self
        self._devices(mx)
        parts = (mx, mx.linalg, mx.fast, mx.random, mx.fft)
        for part in parts:
            for name in dir(part):
                real = getattr(part, name)
                if type(real).__name__ == "nb_func" and not name.startswith("_") and not (part is mx and name in _LEFT):
                    cpu_only = name if part is mx.linalg and name not in _ON_GPU else ""
                    cpu_only = "svd" if name == "multivariate_normal" else cpu_only
                    self._set(part, name, self._operation(real, name, cpu_only))
        for kind in (mx.array, mx.ArrayAt):
            for name, real in list(vars(kind).items()):
                if type(real).__name__ == "nb_method" and name not in _LEFT_METHODS:
                    self._set(kind, name, self._operation(real, name, ""))

    def remove(self) -> None:
        """MLX as it was."""
        Metal.current = None
        while self._undo:
            self._undo.pop()()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append(functools.partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _is_gpu(self, place: Any) -> bool:
        """Whether a device, device type or stream is the double's; None is the default."""
        if place is None:
            return self.default
        import mlx.core as mx

        return place in (mx.gpu, mx.Device(mx.gpu)) or any(place is stream for stream in self._streams)

    def _devices(self, mx: ModuleType) -> None:
        gpu, cpu = mx.Device(mx.gpu), mx.Device(mx.cpu)
        real = {name: getattr(mx, name) for name in dir(mx)}

        def set_default_device(device: Any) -> None:
            self.default = self._is_gpu(device)

        def new_stream(device: Any) -> Any:
            made = real["new_stream"](mx.cpu)
            if self._is_gpu(device):
                self._streams.append(made)
            return made

        @contextmanager
        def stream(place: Any) -> Iterator[None]:
            before, self.default = self.default, self._is_gpu(place)
            try:
                with real["stream"](mx.cpu if place in (mx.gpu, gpu) else place):
                    yield
            finally:
                self.default = before

        def set_wired_limit(limit: int) -> int:
            if limit > self.working_set:
                text = "Setting a wired limit larger than the maximum working set size is not allowed."
                raise ValueError(f"[metal::set_wired_limit] {text}")
            before, self._wired = self._wired, limit
            return before

        stands = {
            "default_device": lambda: gpu if self.default else cpu,
            "set_default_device": set_default_device,
            "is_available": lambda device: self._is_gpu(device) or real["is_available"](device),
            "device_count": lambda kind: 1 if kind == mx.gpu else real["device_count"](kind),
            "device_info": lambda device=None: (
                self.info() if self._is_gpu(device) else real["device_info"](device or cpu)
            ),
            "default_stream": lambda device: real["default_stream"](cpu if self._is_gpu(device) else device),
            "new_stream": new_stream,
            "stream": stream,
            "set_wired_limit": set_wired_limit,
        }
        for name, stand in stands.items():
            self._set(mx, name, stand)
        self._set(mx.metal, "is_available", lambda: True)
        self._set(mx.metal, "device_info", self.info)
        self._set(mx.metal, "set_wired_limit", set_wired_limit)

    def _operation(self, real: Any, name: str, cpu_only: str) -> Any:
        """``real`` that refuses on the device what Metal refuses; ``cpu_only``: the name of what Metal lacks."""
        import mlx.core as mx

        @functools.wraps(real)
        def call(*args: Any, **words: Any) -> Any:
            gpu = self._is_gpu(words.get("stream"))
            if gpu and "stream" in words:
                words["stream"] = None
            if gpu and cpu_only:
                raise ValueError(f"[linalg::{cpu_only}] {_NEEDS_CPU}")
            found = real(*args, **words)
            if not gpu:
                return found
            made = [args[0]] if name == "__setitem__" else list(_arrays(found, mx.array))
            self.used += bool(made)
            if self.forbidden and made and os.environ.get("MLXGPT_DEVICE") == "cpu":
                raise AssertionError(f"{name} computes on the GPU, which MLXGPT_DEVICE=cpu excludes")
            for array in (*made, *_arrays(args, mx.array)):
                if array.dtype == mx.float64:
                    raise ValueError("float64 is not supported on the GPU")
            if name in ("norm", "matrix_norm") and "SVD" in _primitives(made[0], mx):
                raise ValueError(f"[linalg::svd] {_NEEDS_CPU}")
            if name in _SCATTERS and made and made[0].dtype.size == 8:
                last = _primitives(made[0], mx)[-1]
                if last.startswith("Scatter") and (last.split()[-1], made[0].dtype) != ("Sum", mx.complex64):
                    kind = str(made[0].dtype).removeprefix("mlx.core.")
                    raise ValueError(f"[{last.split()[0]}::eval_gpu] Does not support {kind}")
            return found

        return call


def _primitives(array: Any, mx: ModuleType) -> list[str]:
    """The names of the primitives that make an array, from the first to its own; '' before them."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return ["", *re.findall(r'label ="([^"]*)"', graph.getvalue())]


def _arrays(value: Any, kind: type) -> Iterable[Any]:
    """The arrays in what an operation takes or gives."""
    if isinstance(value, kind):
        return (value,)
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in _arrays(part, kind)]
    return ()
