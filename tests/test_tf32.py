"""TF32: off in both frameworks, whatever the environment says, unless train.tf32 asks; then everything says so."""

import dataclasses
import inspect
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.metal import Metal
from fake_train import Go

import mlxgpt.device
import torch_ref.device
from mlxgpt import blas, cli
from mlxgpt.common import backend, tf32
from mlxgpt.common.config import TrainConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.inference.probe import Request
from mlxgpt.common.plan import measured
from mlxgpt.common.runs.checkpoint import RunState
from mlxgpt.common.train import resume
from mlxgpt.probe import probe

ASKED = TrainConfig(tf32=True)


@pytest.fixture
def m5(metal: Metal) -> Metal:
    """The first chip of Apple's that multiplies in TF32."""
    metal.name, metal.architecture = "Apple M5", "applegpu_g17g"
    return metal


@pytest.fixture
def torch_flags() -> Iterator[None]:
    """What torch has for the whole process, put back."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has imported neither MLX nor mlxgpt.blas, and whose user has MLX_ENABLE_TF32=1."""
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    monkeypatch.delenv(tf32.VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core")
    return monkeypatch


def decided() -> tuple[str, str]:
    """What precision() decides in a process that has not called it, and what MLX will read."""
    return blas.precision.__wrapped__(), os.environ["MLX_ENABLE_TF32"]


def test_off_over_a_users_value_and_on_only_where_mlxgpt_is_asked(fresh: pytest.MonkeyPatch) -> None:
    assert decided() == ("off", "0")
    fresh.setenv(tf32.VARIABLE, "1")
    assert decided() == ("on", "1")
    fresh.setenv(tf32.VARIABLE, "yes")
    with pytest.raises(UserError, match="MLXGPT_TF32=yes: expected 0 or 1"):
        decided()


def test_mlx_finds_the_variable_when_it_is_imported() -> None:
    code = (
        "import os, sys, builtins\nfind = builtins.__import__\n"
        "def see(name, *rest, **more):\n"
        "    name == 'mlx.core' and 'mlx.core' not in sys.modules and print(os.environ['MLX_ENABLE_TF32'])\n"
        "    return find(name, *rest, **more)\n"
        "builtins.__import__ = see\nimport mlxgpt.engine"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MLX_ENABLE_TF32": "1"}, capture_output=True, text=True
    )
    assert set(run.stdout.split()) == {"0"}, run.stderr


def test_mlx_imported_earlier_is_said_once_and_no_gate_judges(
    m5: Metal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    monkeypatch.delenv(tf32.VARIABLE, raising=False)
    assert decided()[0] == "unknown"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "MLX was imported before mlxgpt" in said
    monkeypatch.setattr("mlxgpt.probe.load", lambda *_, **__: (None, None))
    monkeypatch.setattr(blas, "precision", lambda: "unknown")
    with pytest.raises(UserError, match="no gate can be judged"):
        list(probe(tmp_path, Request(ids=np.arange(3)), "gpu"))
    unknown = mlxgpt.device.describe(mlxgpt.device.use("gpu"))
    assert unknown["tf32"] == "unknown"
    with pytest.raises(UserError, match="no gate can be judged"):
        resume.say_environment(RunState(1, {}, {}, "mlx", unknown | {"tf32": "off"}), unknown, [], print)


def test_mlx_imported_earlier_without_tf32_is_as_good(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "mlx.core", sys)
    fresh.setenv("MLX_ENABLE_TF32", "0")
    assert decided() == ("off", "0")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "0"),
        (["--set", "train.tf32=true"], "1"),
        (["--set", "train.tf32=true", "--set", "train.tf32=false"], "0"),
        (["--resume", "run"], "1"),
        (["--resume", "run", "--set", "train.tf32=false"], "0"),
    ],
)
def test_the_recipe_decides_before_a_framework_is_imported(
    words: list[str], expected: str, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Imported(Exception):
        pass

    def imports(*_: Any) -> str:
        raise Imported(os.environ[tf32.VARIABLE])

    monkeypatch.setenv(tf32.VARIABLE, "0" if expected == "1" else "1")  # the recipe's word counts
    monkeypatch.setattr(backend, "resolve", imports)
    monkeypatch.setattr(measured, "look", imports)  # where plan starts the process that imports it
    Path("run").mkdir()
    Path("run/recipe.toml").write_text("[train]\ntf32 = true\n")
    with pytest.raises(Imported, match=expected):
        go(*words)
    with pytest.raises(Imported, match=expected):
        cli.main(["finetune", *words] if "--resume" in words else ["plan", *words])


@pytest.mark.parametrize(
    ("text", "expected"), [("[train]\ntf32 = true\n", "1"), ("[train]\n", "0"), ("train = 3\n", "0"), ("?", "0")]
)
def test_so_does_a_file_of_fine_tunings_settings(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tf32.VARIABLE, "1" if expected == "0" else "0")
    (tmp_path / "tune.toml").write_text(text)
    tf32.take(Namespace(set=[], config=str(tmp_path / "tune.toml"), resume=None))
    assert os.environ[tf32.VARIABLE] == expected


def test_the_environment_says_which(m5: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "precision", lambda: "on")
    gpu, cpu = (mlxgpt.device.use(name) for name in ("gpu", "cpu"))
    assert [mlxgpt.device.describe(device)["tf32"] for device in (gpu, cpu)] == ["on", "off"]
    m5.architecture = "applegpu_g16s"  # an M4 has no TF32, whatever is asked of it
    assert mlxgpt.device.describe(gpu)["tf32"] == "off"
    assert mlxgpt.device.limit(gpu, ASKED) == ["train.tf32: no effect in MLX on a Metal GPU before the M5"]
    assert torch_ref.device.describe(torch.device("cpu"))["tf32"] == "off"


@pytest.mark.usefixtures("torch_flags")
def test_a_recipe_that_asks_is_told_what_it_gets(m5: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = (mlxgpt.device.use(name) for name in ("gpu", "cpu"))
    monkeypatch.setattr(blas, "precision", lambda: "on")
    assert mlxgpt.device.limit(gpu, ASKED) == mlxgpt.device.limit(gpu, TrainConfig()) == [tf32.NOTE]
    assert mlxgpt.device.limit(cpu, ASKED) == ["train.tf32: no effect in MLX on a CPU"]
    assert torch_ref.device.limit(torch.device("cpu"), ASKED) == ["train.tf32: no effect in PyTorch on cpu"]
    monkeypatch.setattr(blas, "precision", lambda: "off")
    with pytest.raises(UserError, match="set MLXGPT_TF32=1 before Python starts"):
        mlxgpt.device.limit(gpu, ASKED)


def torch_state(device: torch.device) -> tuple[bool, bool, str, str]:
    """What torch may do on CUDA (products, cuDNN) and on the CPU, and what we say of the device."""
    cuda, cpu = torch.backends.cuda.matmul.allow_tf32, torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[reportAttributeAccessIssue]
    return bool(cuda), torch.backends.cudnn.allow_tf32, cpu, torch_ref.device.tf32_state(device)


@pytest.mark.usefixtures("torch_flags")
def test_torch_multiplies_in_float32_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv(tf32.VARIABLE, raising=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    use = inspect.unwrap(torch_ref.device.use)  # nothing is computed there
    torch.set_float32_matmul_precision("medium")  # the user's
    off, on = (False, False, "ieee", "off"), (True, True, "ieee", "on")
    cuda = use("cuda")
    assert torch_state(cuda) == off and os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    assert torch_ref.device.limit(cuda, TrainConfig()) == []
    assert torch_ref.device.limit(cuda, ASKED) == [tf32.NOTE]
    assert torch_state(cuda) == on and os.environ["NVIDIA_TF32_OVERRIDE"] == "1"
    torch.set_float32_matmul_precision("medium")
    use("cpu")
    assert torch_state(cuda) == off
    monkeypatch.setenv(tf32.VARIABLE, "1")
    assert torch_state(use("cuda")) == on


def test_torchs_own_variable_does_not_turn_it_on() -> None:
    code = (
        "import torch, torch_ref.device as device; assert torch.backends.cuda.matmul.allow_tf32\n"
        "device.use('cpu'); assert not torch.backends.cuda.matmul.allow_tf32"
    )
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", tf32.VARIABLE: "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_resumed_run_says_that_tf32_changed_and_promises_nothing() -> None:
    def said(before: dict[str, str], after: dict[str, str]) -> list[str]:
        state = RunState(1, {}, {}, "mlx", before)
        lines: list[str] = []
        resume.say_environment(state, after, [], lines.append)
        return lines

    cpu, gpu = {"device": "cpu"}, {"device": "Apple M5", "tf32": "off"}
    assert said(cpu, cpu | {"tf32": "off"}) == []
    [line] = said(gpu, gpu | {"tf32": "on"})
    assert "tf32 off -> on" in line and tf32.NOTE in line and "2e-5" not in line
    assert "2e-5" in said(gpu, gpu | {"device": "Apple M4"})[0]
    assert resume.changes({"train": dataclasses.asdict(TrainConfig())}, resumed())["train.tf32"] == (False, True)
    assert "train.tf32" in resume.ROUNDING & resume.ACCEPTED


def resumed() -> Any:
    from mlxgpt.common.recipes import build

    return build({"train": {"tf32": True}})
