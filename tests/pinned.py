"""A pytest plugin: the suite computes on the CPU, and a test that does not fails, unless it is marked ``accelerator``.

``auto`` means the CPU in both packages, also in child processes, by the variable that users have (MLXGPT_DEVICE); what
uses MLX itself finds the CPU as its default device. ``MLXGPT_DEVICE=auto pytest FILE`` runs tests elsewhere, unwatched.
A marked test has the machine's own devices. So has one with the fixture ``metal``, whose device is the CPU.
"""

import functools
import os
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

VARIABLE = "MLXGPT_DEVICE"
_PINNED = os.environ.get(VARIABLE, "cpu") == "cpu"
_default = mx.default_device  # also where a test replaces it
_OWN = _default()  # before the suite chooses
_CPU = mx.Device(mx.cpu)
_used: list[str] = []  # devices since the last look


def pytest_configure() -> None:
    """The CPU, before a test file is imported."""
    if _PINNED:
        os.environ[VARIABLE] = "cpu"
        mx.set_default_device(_CPU)
        mx.set_default_device = _seen(mx.set_default_device)
        mx.stream = _seen(mx.stream)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A marked test begins with the machine's own devices, and the next one on the CPU again."""
    if not (_PINNED and item.get_closest_marker("accelerator")):
        return (yield)
    del os.environ[VARIABLE]
    mx.set_default_device(_OWN)
    try:
        return (yield)
    finally:
        os.environ[VARIABLE] = "cpu"
        mx.set_default_device(_CPU)
        _used.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Fixtures of a module or session too."""
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """The test itself."""
    return (yield from _watched(item))


def _watched(item: pytest.Item) -> Generator[None, object, object]:
    """Fails where another device was chosen meanwhile, and chooses the CPU again."""
    free = item.get_closest_marker("accelerator") or "metal" in getattr(item, "fixturenames", ())
    if not _PINNED or free:
        return (yield)
    _watch_torch()
    try:
        result = yield
    finally:
        if _default() != _CPU:
            _note(_default())
            mx.set_default_device(_CPU)
        found = sorted({*_used, *_torch_devices()})
        _used.clear()
    if found:
        pytest.fail(f"computes on {', '.join(found)}: only a test marked accelerator may", pytrace=False)
    return result


def _note(place: Any) -> None:
    device = getattr(place, "device", place)  # of a stream
    if device not in (mx.cpu, _CPU):
        _used.append("MLX's GPU")


def _seen(choose: Callable[..., Any]) -> Callable[..., Any]:
    """A function that chooses a device; its first argument is remembered if it is not the CPU."""

    @functools.wraps(choose)
    def call(place: Any) -> Any:
        _note(place)
        return choose(place)

    return call


def _watch_torch() -> None:
    """Sees what torch_ref's ``use`` returns, from when it is imported."""
    devices = sys.modules.get("torch_ref.device")
    if not devices or hasattr(devices.use, "__wrapped__"):
        return
    real = devices.use

    @functools.wraps(real)
    def use(name: str = "auto") -> Any:
        device = real(name)
        if device.type != "cpu":
            _used.append(f"PyTorch's {device}")
        return device

    devices.use = use  # pyright: ignore[reportAttributeAccessIssue]


def _torch_devices() -> list[str]:
    """Where PyTorch holds tensors now, beside the CPU."""
    torch = sys.modules.get("torch")
    if not torch:
        return []
    cuda = torch.cuda.is_initialized() and torch.cuda.memory_allocated()
    mps = torch.backends.mps.is_available() and torch.mps.current_allocated_memory()
    return [f"PyTorch's {name}" for name, held in (("cuda", cuda), ("mps", mps)) if held]
