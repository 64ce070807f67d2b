"""What is flushed is on the disk, not in its cache: fsync, or what macOS has in its place."""

import ast
import errno
import fcntl
import os
from pathlib import Path

import pytest
from test_checkpoint import save

from mlxgpt.common import files
from mlxgpt.common.runs.metrics import Metrics

ROOT = Path(__file__).parent.parent
FULL = 51  # F_FULLFSYNC of macOS


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The system calls that flush, on a system that has none but fsync."""
    made: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: made.append("fsync"))
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    return made


@pytest.fixture
def full(flushes: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same on macOS."""
    real = fcntl.fcntl

    def call(descriptor: int, command: int, argument: int = 0) -> object:
        if command != FULL:
            return real(descriptor, command, argument)
        return flushes.append("full")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", call)
    return flushes


def flush_everything(place: Path) -> None:
    """A file, a folder, JSON, metrics and a checkpoint."""
    (place / "file").write_text("text")
    files.sync(place / "file")
    files.sync(place)
    files.write_json(place / "value.json", {})
    metrics = Metrics(place, [])
    metrics.write(step=1)
    metrics.sync()
    metrics.close()
    save(place, 1)


def test_macos_flushes_the_drives_cache_too(full: list[str], tmp_path: Path) -> None:
    flush_everything(tmp_path)
    assert len(full) > 10 and set(full) == {"full"}


def test_elsewhere_fsync_does(flushes: list[str], tmp_path: Path) -> None:
    flush_everything(tmp_path)
    assert len(flushes) > 10 and set(flushes) == {"fsync"}


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.EIO, errno.ENOSPC])
def test_a_file_system_without_it_is_flushed_by_fsync(
    full: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, command: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    if number in (errno.EIO, errno.ENOSPC):  # the disk is there and fails
        with pytest.raises(OSError, match=os.strerror(number)):
            files.sync(tmp_path)
        assert not full
    else:
        files.sync(tmp_path)
        assert full == ["fsync"]


def own_flushes(source: str) -> list[str]:
    """The functions of the system that a source calls to flush by itself."""
    names = {"fsync", "fdatasync", "F_FULLFSYNC"}
    return [node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute) and node.attr in names]


def test_one_function_flushes() -> None:
    paths = [
        path for package in ("mlxgpt", "torch_ref", "convert", "benchmarks") for path in ROOT.glob(f"{package}/**/*.py")
    ]
    assert [path.name for path in paths if own_flushes(path.read_text())] == ["files.py"]
    assert own_flushes("import os\nos.fsync(file)") == ["fsync"]
