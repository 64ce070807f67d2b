"""Before any test file is imported: a double; the BLAS, without which MLX would stay slow; the CPU; signals.

Also the fixtures of several files.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

from doubles import children  # noqa: F401

# isort: split
from mlxgpt import blas  # noqa: F401

# isort: split
import fake_run
import pytest
from doubles.metal import Metal
from fake_train import Go

from mlxgpt import cli
from mlxgpt.common import backend
from mlxgpt.common.train import pretrain

pytest_plugins = ["pinned"]

# a shell that runs the suite in the background ignores Ctrl-C, and so would every child that a test interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metal]:
    """A Metal device, MLX's default and what ``auto`` is, that computes on the CPU and refuses what Metal refuses."""
    if Metal.current:
        pytest.skip("this whole run has it")
    monkeypatch.delenv("MLXGPT_DEVICE", raising=False)
    device = Metal()
    device.install()
    yield device
    device.remove()


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """``mlxgpt train`` with the fake framework, in an empty folder that holds recipe.toml."""
    monkeypatch.setattr(backend, "load", fake_run.load_backend)
    monkeypatch.setattr(backend, "resolve", lambda name, device=None: "fake")
    monkeypatch.setattr(pretrain.token_source, "open_data", fake_run.open_data)
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(fake_run.RECIPE)

    def run(*words: str, recipe: str = "./recipe.toml") -> int:
        fresh = [] if "--resume" in words else [recipe]
        return cli.main(["train", *fresh, *words])

    return run
