"""The doubles of a Mac refuse what a Mac refuses, and let through what it lets through."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from doubles import children
from doubles.metal import GIB, Metal
from test_engine import batch, recipe

import mlxgpt.engine
import mlxgpt.model
from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common.model import params

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


ROOT = Path(__file__).parent.parent
# what is run on a double in every run of the suite, with the number of tests: the fastest of what differs there
SELECTED = {
    "metal": (["-m", "accelerator", "-k", "mlxgpt", "tests/test_accelerator.py"], 12),
    "macos": (["tests/test_files.py", "tests/test_metrics.py", "tests/test_runs.py", "tests/test_trainer.py"], 30),
}


def on_double(double: str, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A Python process that has the double."""
    paths = children.environment(double)
    paths["PYTHONPATH"] += os.pathsep + str(ROOT)
    given = {**os.environ, **paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], env=given, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("double", SELECTED)
def test_the_product_works_there(double: str) -> None:
    words, least = SELECTED[double]
    done = on_double(double, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *words)
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and passed and int(passed[1]) >= least, done.stdout


def step() -> bool:
    """A training step on the default device, with dropout, in micro-batches."""
    config = recipe("llama", dropout=0.1, micro_batch_size=4, compile="off")
    engine = mlxgpt.engine.Engine(config, params.init_params(config.model, 3))
    assert engine.device == mx.Device(mx.gpu)
    return engine.train_step(1, batch(config, 1).split(4), 1e-3).finite


PLANTED: dict[str, tuple[Callable[[mx.array], mx.array], str]] = {
    "float64": (lambda x: x.astype(mx.float64).astype(mx.float32), "float64 is not supported on the GPU"),
    "svd": (lambda x: x * mx.linalg.svd(mx.eye(2))[1][0], r"\[linalg::svd\]"),
    "8-byte scatter": (lambda x: x + mx.zeros(4, mx.int64).at[mx.array([1])].add(0)[0], r"\[Scatter::eval_gpu\]"),
}


@pytest.mark.parametrize("fault", [None, *PLANTED])
def test_metal_sees_a_fault_in_a_training_step(
    metal: Metal, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault is None:
        assert step() and metal.used > 1000
        return
    change, message = PLANTED[fault]
    real = mlxgpt.model.Model.hidden
    monkeypatch.setattr(mlxgpt.model.Model, "hidden", lambda *args, **words: change(real(*args, **words)))
    with pytest.raises(ValueError, match=message):
        step()


# what a program of this repository finds there, or the error that it ends in
ON_MACOS = {
    "sys.platform == 'darwin' and platform.system() == 'Darwin' and platform.machine() == 'arm64'": "",
    "not Path('/proc/self/statm').exists() and not os.path.exists('/dev/full')": "",
    "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 4 << 20 and fcntl.F_FULLFSYNC": "",
    "resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256": "",
    "chips.chip_name() == 'Apple M2 Pro' and machine.free() == 16384 * (301234 + 301220 + 2345 + 4321)": "",
    "files.sync(Path('.')) is None and os.stat('.') and os.listdir('.')": "",
    "Path('/proc/self/statm').read_text()": "FileNotFoundError: [Errno 2] No such file or directory",
    "open('/sys/fs/cgroup/memory.max')": "FileNotFoundError: [Errno 2] No such file or directory",
    "open('/dev/full', 'w')": "FileNotFoundError: [Errno 2] No such file or directory",
    "os.listdir('/proc')": "FileNotFoundError: [Errno 2] No such file or directory",
    "os.sched_getaffinity(0)": "AttributeError: module 'os' has no attribute 'sched_getaffinity'",
    "signal.SIGRTMIN": "AttributeError: module 'signal' has no attribute 'SIGRTMIN'",
    "(place / 'Model').write_text('') or (place / 'model').mkdir()": "AssertionError: on macOS ",
    "(place / 'caf\\u00e9').mkdir() or (place / 'cafe\\u0301').write_text('')": "AssertionError: on macOS ",
    "machine.Path('/proc/meminfo').read_text() and machine.free()": "FileNotFoundError: [Errno 2] No such file",
}
PROGRAM = """
import fcntl, os, platform, resource, signal, sys
from pathlib import Path
from mlxgpt.common import files
from mlxgpt.common.plan import chips, machine
for n, code in enumerate(sys.argv[2:]):
    place = Path(sys.argv[1], str(n))
    place.mkdir()
    try:
        assert eval(code), "false"
        print("")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_macos_has_no_linux(tmp_path: Path) -> None:
    done = on_double("macos", "-c", PROGRAM, str(tmp_path), *ON_MACOS)
    said = done.stdout.splitlines()
    assert len(said) == len(ON_MACOS), done.stderr
    for (code, expected), found in zip(ON_MACOS.items(), said, strict=True):
        assert found.startswith(expected) and (expected or not found), (code, found)


def test_macos_leaves_libraries_their_linux() -> None:
    code = "import numpy, mlxgpt.blas, mlx.core as mx, ctypes, subprocess, tokenizers; print(mx.ones(2).sum().item())"
    assert on_double("macos", "-c", code).stdout == "2.0\n"
