"""The doubles of a Mac refuse what a Mac refuses, and let through what it lets through."""

from collections.abc import Callable

import pytest
from doubles.metal import GIB, Metal

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn

_LONG, _COMPLEX, _REAL = ((4, 4), mx.int64), ((4, 4), mx.complex64), ((4, 4), mx.float32)
_PLACES = [1, 2]
_CPU_ONLY = r"This op is not yet supported on the GPU\. Explicitly pass a CPU stream"


def assigned(shape: tuple[int, ...], dtype: mx.Dtype, places: int | list[int]) -> mx.array:
    made = mx.zeros(shape, dtype)
    made[mx.array(places) if isinstance(places, list) else places] = 1
    return made


def on_cpu() -> mx.array:
    with mx.stream(mx.cpu):
        return mx.linalg.svd(mx.ones((3, 3), mx.float64))[1]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "float64": (lambda: mx.ones(3).astype(mx.float64), "float64 is not supported on the GPU"),
    "float64 read": (lambda: mx.array([1.0], mx.float64) + 1, "float64 is not supported on the GPU"),
    "float64 compiled": (lambda: mx.compile(lambda x: x.astype(mx.float64))(mx.ones(3)), "float64 is not supported"),
    "float64 in a gradient": (lambda: mx.grad(lambda x: x.astype(mx.float64).sum())(mx.ones(3)), "float64 is not"),
    "svd": (lambda: mx.linalg.svd(mx.ones((3, 3))), rf"\[linalg::svd\] {_CPU_ONLY}"),
    "inverse": (lambda: mx.linalg.inv(mx.ones((3, 3))), rf"\[linalg::inv\] {_CPU_ONLY}"),
    "nuclear norm": (lambda: mx.linalg.norm(mx.ones((3, 3)), "nuc"), rf"\[linalg::svd\] {_CPU_ONLY}"),
    "int64 scatter": (lambda: mx.zeros(*_LONG).at[mx.array(_PLACES)].add(1), "Scatter::eval_gpu.*int64"),
    "int64 assigned": (lambda: assigned(*_LONG, _PLACES), "Scatter::eval_gpu.*int64"),
    "int64 along an axis": (
        lambda: mx.put_along_axis(mx.zeros(*_LONG), mx.zeros((4, 1), mx.int32), mx.ones((4, 1), mx.int64), 1),
        "ScatterAxis::eval_gpu.*int64",
    ),
    "complex product": (lambda: mx.zeros(*_COMPLEX).at[mx.array(_PLACES)].multiply(1), "Scatter::eval_gpu.*complex64"),
    "wired limit": (lambda: mx.set_wired_limit(12 * GIB), "wired limit larger than the maximum working set"),
}
ALLOWED: dict[str, Callable[[], object]] = {
    "float64 on the host": lambda: mx.array([1.0], mx.float64).tolist(),
    "float64 on the CPU": on_cpu,
    "svd on the CPU": lambda: mx.eval(mx.linalg.svd(mx.ones((3, 3)), stream=mx.cpu)),
    "norm": lambda: mx.linalg.norm(mx.ones((3, 3))).item(),
    "float32 scatter": lambda: mx.zeros(*_REAL).at[mx.array(_PLACES)].add(1).tolist(),
    "complex sum": lambda: mx.zeros(*_COMPLEX).at[mx.array(_PLACES)].add(1).tolist(),
    "int64 slice": lambda: assigned(*_LONG, 1).tolist(),
    "layer": lambda: nn.Linear(3, 4)(mx.ones((2, 3))).tolist(),
    "named stream": lambda: mx.add(1, 2, stream=mx.gpu).item(),
    "wired limit": lambda: mx.set_wired_limit(11 * GIB),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metal_refuses(metal: Metal, case: str) -> None:
    made, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        made()


@pytest.mark.parametrize("case", ALLOWED)
def test_metal_allows(metal: Metal, case: str) -> None:
    ALLOWED[case]()


def test_what_the_cpu_is_asked_for_is_not_the_gpus(metal: Metal) -> None:
    assert mx.default_device() == mx.Device(mx.gpu) and mx.is_available(mx.gpu) and mx.metal.is_available()
    mx.eval(mx.ones(3) * 2)
    before = metal.used
    mx.set_default_device(mx.Device(mx.cpu))
    assert mx.ones(3, mx.float64).sum().item() == 3
    assert metal.used == before > 0
    with mx.stream(mx.gpu), pytest.raises(ValueError, match="float64"):
        mx.ones(3, mx.float64)


def test_metal_leaves_mlx_as_it_was() -> None:
    before = {name: getattr(mx, name) for name in dir(mx)}, dict(vars(mx.array)), mx.linalg.svd
    device = Metal()
    device.install()
    assert mx.linalg.svd is not before[2]
    device.remove()
    assert ({name: getattr(mx, name) for name in dir(mx)}, dict(vars(mx.array)), mx.linalg.svd) == before
