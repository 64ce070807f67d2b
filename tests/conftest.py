"""Before any test file is imported: the BLAS, without which MLX would stay slow for the whole process; signals.

Also the fixtures of several files.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

from mlxgpt import blas  # noqa: F401

# isort: split
import fake_run
import mlx.core as mx
import pytest
from doubles.metal import Metal
from fake_train import Go

from mlxgpt import cli
from mlxgpt.common import backend
from mlxgpt.common.train import pretrain

# a shell that runs the suite in the background ignores Ctrl-C, and so would every child that a test interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cpu() -> Iterator[None]:
    """MLX on the CPU, whatever its default is."""
    before = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    yield
    mx.set_default_device(before)


@pytest.fixture
def metal() -> Iterator[Metal]:
    """A Metal device, MLX's default, that computes on the CPU and refuses what Metal refuses."""
    device = Metal()
    device.install()
    yield device
    device.remove()


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """``mlxgpt train`` with the fake framework, in an empty folder that holds recipe.toml."""
    monkeypatch.setattr(backend, "load", fake_run.load_backend)
    monkeypatch.setattr(backend, "resolve", lambda name: "fake")
    monkeypatch.setattr(pretrain.token_source, "open_data", fake_run.open_data)
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(fake_run.RECIPE)

    def run(*words: str, recipe: str = "./recipe.toml") -> int:
        fresh = [] if "--resume" in words else [recipe]
        return cli.main(["train", *fresh, *words])

    return run
