"""GGUF models in several files, written by the gguf package: whichever is named is read whole, or refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf as package
import models
import numpy as np
import pytest
from test_gguf import assert_same, opened, without_ours

from convert import convert, open_model
from convert.formats.gguf import model as gguf
from convert.formats.gguf.file import read_gguf, read_stored
from convert.formats.opened import Options
from convert.verify import verify
from mlxgpt.common.errors import UserError

CONFIG = models.CASES["llama"]


def split(place: Path, small_first: bool) -> list[Path]:
    """The model in files of at most six tensors, and as whole.gguf."""
    gguf.write(opened(CONFIG), place / "whole.gguf", Options())
    values, stored = read_gguf(place / "whole.gguf")
    without_ours(values, {})
    writer = package.GGUFWriter(None, "llama", split_max_tensors=6, small_first_shard=small_first)
    for key, value in values.items():
        if key != "general.architecture" and not isinstance(value, np.ndarray):
            kind = package.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, package.GGUFValueType.UINT32 if kind == 5 else kind)
    for name, one in stored.items():
        writer.add_tensor(name, read_stored(one))
    writer.write_header_to_file(place / "model.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(place.glob("model-*.gguf"))


@pytest.mark.parametrize("small_first", [False, True])
def test_any_of_the_files_is_the_whole_model(small_first: bool, tmp_path: Path) -> None:
    parts = split(tmp_path, small_first)
    assert len(parts) == 4 + small_first
    expected = open_model(tmp_path / "whole.gguf")
    for part in parts:
        found = open_model(part)
        assert_same(found, expected)
        assert found.files == tuple(parts)
    report = convert(parts[1], tmp_path / "folder", "hf")
    assert set(report.sha256) == {"model.safetensors"}
    assert verify(parts[-1], tmp_path / "folder", weights_only=True).agrees


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda parts: parts[2].unlink(), "1 of its 4 files are not beside it: model-00003-of-00004.gguf"),
        (lambda parts: shutil.copy(parts[2], parts[1]), "split.no 2, split.count 4: expected 1 and 4 by its name"),
        (lambda parts: parts[0].rename(parts[0].with_name("first.gguf")), "expected NAME-00001-of-00004.gguf"),
        (lambda parts: shutil.copy(parts[0].with_name("whole.gguf"), parts[3]), "split.no None, split.count None"),
    ],
)
def test_files_that_are_no_whole_are_refused(change: Callable[[list[Path]], object], says: str, tmp_path: Path) -> None:
    parts = split(tmp_path, small_first=False)
    change(parts)
    first = parts[0] if parts[0].exists() else tmp_path / "first.gguf"
    with pytest.raises(UserError) as raised:
        open_model(first)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_lost_tensor_is_counted(tmp_path: Path) -> None:
    parts = split(tmp_path, small_first=False)
    data = parts[0].read_bytes()
    key = b"split.tensors.count"
    at = data.index(key) + len(key) + 4
    assert int.from_bytes(data[at : at + 4], "little") == len(open_model(parts[0]).tensors)
    parts[0].write_bytes(data[:at] + (99).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(UserError, match="split.tensors.count = 99: the 4 files have"):
        open_model(parts[2])
