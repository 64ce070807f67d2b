"""The suite computes on the CPU; what would not fails, each way in which a test can choose another device."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doubles import children

from mlxgpt import device as mlx_device
from mlxgpt.common.errors import UserError
from torch_ref import device as torch_device

# a test file, run on the double of a Metal device, whose default device is the GPU
FILE = """
import subprocess, sys
import pytest, torch
from mlxgpt import device
from torch_ref import device as torch_device
import mlx.core as mx
CHILD = "from mlxgpt import device; import mlx.core as mx; {}; mx.eval(mx.ones(3) * 2)"

def child(first):
    return subprocess.run([sys.executable, "-c", CHILD.format(first)], capture_output=True, text=True)

@pytest.fixture(scope="module")
def chosen():
    device.use("gpu")

def test_passes_auto(): assert str(device.use("auto").type).endswith("cpu") and mx.default_device().type == mx.cpu
def test_passes_auto_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device.use("auto").type == "cpu"
def test_fails_product(): device.use("gpu"); mx.eval(mx.ones(3))
def test_fails_and_returns(): device.use("gpu"); device.use("cpu")
def test_fails_default(): mx.set_default_device(mx.gpu)
def test_fails_stream():
    with mx.stream(mx.gpu): pass
def test_fails_one_operation(): mx.add(1, 2, stream=mx.gpu)
def test_fails_fixture(chosen): pass
def test_fails_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch_device.use("gpu")
def test_passes_next(): assert mx.default_device().type == mx.cpu; mx.eval(mx.ones(3))
@pytest.mark.accelerator
def test_passes_marked(): assert device.use("auto").type == mx.gpu; mx.eval(mx.ones(3))
def test_passes_after_it(): assert device.use("auto").type == mx.cpu
def test_passes_child(): assert child('device.use("auto")').returncode == 0
def test_child_that_chooses_nothing():
    assert "ones computes on the GPU, which MLXGPT_DEVICE=cpu excludes" in child("0").stderr
"""


def test_a_test_on_another_device_fails(tmp_path: Path) -> None:
    (tmp_path / "test_devices.py").write_text(FILE)
    environment = {**os.environ, **children.environment("metal")}
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent.parent)
    environment.pop("MLXGPT_DEVICE", None)
    options = ["-q", "-n", "0", "-p", "pinned", "-p", "no:cacheprovider", "-rA", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options]
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\w+)", said, re.MULTILINE)
    assert len(found) == FILE.count("def test_"), said
    for outcome, name in found:
        assert (outcome == "PASSED") == ("fails" not in name), said
    assert said.count("\ncomputes on MLX's GPU: only a test marked accelerator may") == 4, said
    assert said.count("\ncomputes on PyTorch's cuda: only a test marked accelerator may") == 1, said


@pytest.mark.parametrize("use", [mlx_device.use, torch_device.use])
def test_the_environment_says_what_auto_is(use: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(use)
    monkeypatch.setenv("MLXGPT_DEVICE", "tpu")
    with pytest.raises(UserError, match="^MLXGPT_DEVICE=tpu: .* has .*cpu on this machine"):
        use("auto")
    assert str(use("cpu")) in ("cpu", "Device(cpu, 0)")
    with pytest.raises(UserError, match="^--device tpu: "):
        use("tpu")
