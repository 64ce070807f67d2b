"""The BLAS on Linux: which library is chosen, what is said where there is none, and that MLX multiplies with it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torch_ref.device
from mlxgpt import blas
from mlxgpt.common.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Linux process that holds no BLAS, has not imported MLX, and finds no library."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.delenv("MLXGPT_BLAS", raising=False)
    for name, found in (("_in_scope", ""), ("_load_openblas", False), ("_load_mkl", False)):
        monkeypatch.setattr(blas, name, lambda found=found: found)
    return monkeypatch


def load() -> str:
    """What load() does in a process that has not called it."""
    return blas.load.__wrapped__()


def test_openblas_comes_before_mkl(linux: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    linux.setattr(blas, "_load_mkl", lambda: True)
    assert load() == "mkl"
    linux.setattr(blas, "_load_openblas", lambda: True)
    assert load() == "openblas"
    linux.setenv("MLXGPT_BLAS", "mkl")
    assert load() == "mkl"
    assert capsys.readouterr().err == ""


def test_one_warning_names_both_ways_out(linux: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert load() == "reference"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "libopenblas0-pthread" in said
    assert "mlxgpt[cpu-fast]" in said


def test_none_loads_nothing_and_says_nothing(linux: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    linux.setattr(blas, "_load_openblas", lambda: True)
    linux.setenv("MLXGPT_BLAS", "none")
    assert load() == "reference"
    assert capsys.readouterr().err == ""


def test_mlx_imported_too_early_is_said(linux: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    linux.setattr(blas, "_load_openblas", lambda: True)
    linux.setitem(sys.modules, "mlx.core", sys)
    assert load() == "reference"
    assert "before mlxgpt" in capsys.readouterr().err


def test_a_preloaded_library_is_kept(linux: pytest.MonkeyPatch) -> None:
    linux.setattr(blas, "_in_scope", lambda: "openblas")
    assert load() == "openblas"
    linux.setenv("MLXGPT_BLAS", "mkl")
    with pytest.raises(UserError, match="openblas is already loaded"):
        load()


@pytest.mark.parametrize(
    ("choice", "message"), [("atlas", "expected auto, openblas, mkl or none"), ("mkl", "not found")]
)
def test_a_choice_that_cannot_be_met_is_refused(linux: pytest.MonkeyPatch, choice: str, message: str) -> None:
    linux.setenv("MLXGPT_BLAS", choice)
    with pytest.raises(UserError, match=message):
        load()


def test_a_mac_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("MLXGPT_BLAS", "auto")
    assert load() == "accelerate"
    monkeypatch.setenv("MLXGPT_BLAS", "openblas")
    with pytest.raises(UserError, match="on Linux only"):
        load()


def products(choice: str) -> dict:
    """What describe() says in a new process, a digest of a product's bits, and its largest error."""
    code = """
import hashlib, json
from mlxgpt import blas
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
a = np.random.default_rng(0).standard_normal((384, 384), dtype=np.float32)
x = mx.array(a)
mx.eval(y := x @ x)
error = float(np.abs(np.array(y) - a.astype(np.float64) @ a).max())
print(json.dumps(blas.describe() | {"bits": hashlib.sha256(np.array(y).tobytes()).hexdigest(), "error": error}))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"MLXGPT_BLAS": choice}, check=True, capture_output=True, text=True
    )
    return json.loads(run.stdout)


def test_what_is_loaded_multiplies() -> None:
    """Another library adds in another order: the bits of a product say which one multiplied, on a busy machine too."""
    auto, none = products("auto"), products("none")
    assert auto["error"] < 1e-3
    assert none["error"] < 1e-3
    assert auto["name"] == blas.load()
    if auto["name"] in ("openblas", "mkl"):
        assert none["name"] == "reference"
        assert int(auto["threads"]) >= 1
        assert auto["version"]
        assert auto["bits"] != none["bits"]


def test_variables_that_change_a_cpus_products_enter_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """At two threads OMP_DYNAMIC=TRUE gives other bits, while kernels and threads read the same."""
    for name in ("mlxgpt.device", "torch_ref.device"):
        devices = importlib.import_module(name)
        cpu = devices.use("cpu")
        monkeypatch.delenv("OMP_DYNAMIC", raising=False)
        assert "OMP_DYNAMIC" not in devices.describe(cpu)["blas"]
        monkeypatch.setenv("OMP_DYNAMIC", "TRUE")
        assert "OMP_DYNAMIC=TRUE" in devices.describe(cpu)["blas"]


def test_both_frameworks_in_one_process_multiply_right_with_two_threads() -> None:
    """With MKL's layer set by MKL_Set_Threading_Layer, products with a bias were wrong by their own size here."""
    code = """
from mlxgpt import blas
import mlx.core as mx, numpy as np, torch
draw = np.random.default_rng(0)
for m, n, k in ((1, 192, 64), (3, 384, 384), (124, 192, 64)):
    a, w, b = (draw.standard_normal(shape).astype(np.float32) for shape in ((m, k), (n, k), (n,)))
    exact = a.astype(np.float64) @ w.T.astype(np.float64) + b
    ours = np.array(mx.addmm(mx.array(b), mx.array(a), mx.array(w).T, stream=mx.cpu))
    theirs = torch.nn.functional.linear(*map(torch.from_numpy, (a, w, b))).numpy()
    for found in (ours, theirs):
        assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max(), (blas.load(), m, n, k)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "2"}, cwd=ROOT, check=True)


def test_mkl_splits_no_sum_as_threads_become_free_and_the_environment_says_so() -> None:
    code = "import mlxgpt, os; print(os.environ['MKL_CBWR'])"
    own = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    for given, expected in (({}, "AUTO"), ({"MKL_CBWR": "AVX2"}, "AVX2")):
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=own | given, capture_output=True, text=True)
        assert run.stdout == f"{expected}\n"
    described = torch_ref.device.describe(torch_ref.device.use("cpu"))["blas"]
    assert f"CBWR {os.environ['MKL_CBWR']}" in described or "mkl" not in described
    if blas.load() == "mkl":
        assert f"CBWR {os.environ['MKL_CBWR']}" in blas.describe()["core"]
