"""What conversion refuses: one line, exit code 2, no destination, the source untouched; also what a break leaves."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_disk
import numpy as np
import pytest
from models import CASES, tiny, weights

import convert.formats.stream
from convert import convert as convert_model
from convert import open_model
from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder, tensors

ROOT = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tied llama in one file."""
    model_folder.write_model(tmp_path / "a", CASES["llama"], weights(CASES["llama"]))
    return tmp_path / "a"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in shards."""
    model_folder.write_model(tmp_path / "a", CASES["llama"], weights(CASES["llama"]), max_shard=60_000)
    return tmp_path / "a"


def digest(place: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in place.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture, source: Path, *args: str, code: int = 2) -> str:
    """The line that the command prints; nothing was made, and the source is as it was."""
    before, beside = digest(source), sorted(source.parent.iterdir())
    capsys.readouterr()
    assert cli.main(["convert", str(source), *args]) == code
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("mlxgpt: error: "), err
    assert digest(source) == before and sorted(source.parent.iterdir()) == beside
    return err.removeprefix("mlxgpt: error: ").rstrip("\n")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin --to hf", "a.GGUF --to mlx-lm"])
def test_a_folder_is_not_made_under_the_name_of_a_file(
    source: Path, capsys: pytest.CaptureFixture, tmp_path: Path, name: str
) -> None:
    file, *rest = name.split()
    said = refused(capsys, source, str(tmp_path / file), *rest)
    assert f"is a folder: expected a name without {Path(file).suffix.lower()}" in said


def test_a_suffix_in_capitals_means_the_same_file(source: Path, tmp_path: Path) -> None:
    assert convert_model(source, tmp_path / "b.GGUF").format == "gguf" and (tmp_path / "b.GGUF").is_file()


def header(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the header of model.safetensors."""
    data = (place / model_folder.SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    values = json.loads(data[8 : 8 + length])
    change(values)
    text = json.dumps(values).encode()
    (place / model_folder.SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overlap(values: dict[str, Any]) -> None:
    values["model.norm.weight"]["data_offsets"] = values["model.layers.0.input_layernorm.weight"]["data_offsets"]


def larger(values: dict[str, Any]) -> None:
    values["model.norm.weight"]["shape"] = [2**40]


def beyond(values: dict[str, Any]) -> None:
    values["model.norm.weight"] = {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}


@pytest.mark.parametrize(
    ("change", "message"),
    [(overlap, "data starts at byte"), (larger, "192 bytes for F32 [1099511627776]"), (beyond, "truncated: data ends")],
)
def test_headers_that_lie(change: Any, message: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    header(source, change)
    assert message in refused(capsys, source, str(tmp_path / "b"))


@pytest.mark.parametrize("size", [4, 100, -100])
def test_truncated_files(size: int, source: Path, tmp_path: Path, capsys: Any) -> None:
    data = (source / model_folder.SINGLE).read_bytes()
    (source / model_folder.SINGLE).write_bytes(data[:size])
    assert str(source / model_folder.SINGLE) in refused(capsys, source, str(tmp_path / "b"))


def test_a_name_twice(source: Path, tmp_path: Path, capsys: Any) -> None:
    data = (source / model_folder.SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(b'"model.norm.weight"', b'"lm_head.weight"', 1)
    text = text.rstrip()[:-1] + b',"lm_head.weight":{}}'
    (source / model_folder.SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert refused(capsys, source, str(tmp_path / "b")).endswith("header is not JSON: a name occurs twice")


@pytest.mark.parametrize("file", ["../a/model.safetensors", "missing.safetensors"])
def test_an_index_that_leads_nowhere(file: str, sharded: Path, tmp_path: Path, capsys: Any) -> None:
    index = json.loads((sharded / model_folder.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / model_folder.INDEX).write_text(json.dumps(index))
    assert file in refused(capsys, sharded, str(tmp_path / "b"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("to", ["hf", "mlx-lm", "npz", "gguf"])
def test_nan_is_refused_by_name_and_number(dtype: str, to: str, tmp_path: Path, capsys: Any) -> None:
    made = {name: array.astype(model_folder.DTYPES[dtype]) for name, array in weights(CASES["gpt2"]).items()}
    made["h.1.mlp.c_fc.weight"][5, 1:4] = np.nan, np.inf, -np.inf
    model_folder.write_model(tmp_path / "a", CASES["gpt2"], weights(CASES["gpt2"]), dtype=dtype)
    arrays = {"h.1.mlp.c_fc.weight": np.ascontiguousarray(made["h.1.mlp.c_fc.weight"].T)}
    tensors.write_tensors(
        tmp_path / "a" / model_folder.SINGLE, tensors.read_tensors(tmp_path / "a" / model_folder.SINGLE) | arrays
    )
    message = refused(capsys, tmp_path / "a", str(tmp_path / "b"), "--to", to)
    assert "h.1.mlp.c_fc.weight: 3 values are not finite (NaN or Inf)" in message and "--allow-nan" in message
    report = convert_model(tmp_path / "a", tmp_path / "b", to, allow_nan=True)
    assert [note for note in report.notes if "3 values are not finite" in note]
    found = open_model(tmp_path / "b").tensors["h.1.mlp.c_fc.weight"].read().astype(np.float32)
    assert np.array_equal(found, made["h.1.mlp.c_fc.weight"].astype(np.float32), equal_nan=True)


def test_nan_is_never_quantized(tmp_path: Path) -> None:
    config = tiny(family="llama", n_embd=64)
    model_folder.write_model(tmp_path / "a", config, weights(config))
    arrays = tensors.read_tensors(tmp_path / "a" / model_folder.SINGLE)
    arrays["model.embed_tokens.weight"][2, 2] = np.nan
    tensors.write_tensors(tmp_path / "a" / model_folder.SINGLE, arrays)
    with pytest.raises(UserError, match=r"^model.embed_tokens.weight: 1 values are not finite"):
        convert_model(tmp_path / "a", tmp_path / "b", "mlx-lm", bits=4, allow_nan=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["b", "--bits", "4"], "--bits 4: --to hf has no such choice, only mlx-lm and gguf"),
        (["b", "--to", "npz", "--max-shard", "1GB"], "only hf and mlx-lm"),
        (["b", "--to", "mlx-lm", "--group-size", "32"], "--group-size 32: expected --bits with it"),
        (["b", "--n-head", "4"], "says itself how many heads it has"),
        (["no/b"], "no: no such folder"),
        (["a"], "is, holds or lies in the source"),
        (["a/b"], "is, holds or lies in the source"),
        (["../{}/a"], "is, holds or lies in the source"),
    ],
)
def test_what_cannot_be_meant(args: list[str], message: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / args[0].format(tmp_path.name)
    assert message in refused(capsys, source, str(place), *args[1:])


def test_nothing_that_is_a_model(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"nothing that anybody knows")
    assert "neither a model folder" in refused(capsys, tmp_path / "a", str(tmp_path / "b"))
    with pytest.raises(UserError, match="not recognized as one of mlx-lm, npz, pytorch, hf"):
        open_model(tmp_path / "a" / "x.bin")


def test_groups_that_divide_nothing(tmp_path: Path) -> None:
    model_folder.write_model(tmp_path / "a", CASES["gpt2"], weights(CASES["gpt2"]))
    with pytest.raises(UserError, match="--group-size 128 divides the inputs of no matrix"):
        convert_model(tmp_path / "a", tmp_path / "b", "mlx-lm", bits=4, group_size=128)


# the destination


def test_what_is_there_stays_unless_forced(source: Path, tmp_path: Path, capsys: Any) -> None:
    convert_model(source, tmp_path / "b")
    (tmp_path / "b" / "mark").write_text("x")
    assert refused(capsys, source, str(tmp_path / "b")) == f"{tmp_path / 'b'}: exists; --force replaces it"
    arrays = tensors.read_tensors(source / model_folder.SINGLE)
    arrays["model.norm.weight"][0] = np.nan
    shutil.copytree(source, tmp_path / "bad")
    tensors.write_tensors(tmp_path / "bad" / model_folder.SINGLE, arrays)
    with pytest.raises(UserError):
        convert_model(tmp_path / "bad", tmp_path / "b", force=True)
    assert (tmp_path / "b" / "mark").exists()
    convert_model(source, tmp_path / "b", force=True)
    assert not (tmp_path / "b" / "mark").exists() and open_model(tmp_path / "b").config == CASES["llama"]
    convert_model(source, tmp_path / "b.gguf")
    convert_model(source, tmp_path / "b.gguf", force=True, dtype="bfloat16")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_force_removes_models_only(source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("x")
    assert "holds none (no config.json)" in refused(capsys, source, str(tmp_path / "home"), "--force")
    note = tmp_path / "home" / "diary.txt"
    assert "replaces a folder with a hf model" in refused(capsys, source, str(note), "--to", "hf", "--force")
    assert note.read_text() == "x"
    (tmp_path / "empty").mkdir()
    convert_model(source, tmp_path / "empty", force=True)
    inside = tmp_path / "a" / "inner"
    shutil.copytree(source, inside)
    with pytest.raises(UserError, match="is, holds or lies in the source"):
        convert_model(inside, source, force=True)


def test_no_room_is_seen_before(source: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    message = refused(capsys, source, str(tmp_path / "b"))
    assert message == f"{tmp_path}: No space left on device: 1 MiB free, the result needs 4 MiB"


@pytest.mark.parametrize("to", ["hf", "npz"])
def test_a_full_disk_leaves_nothing(to: str, source: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(convert.formats.stream.Output):
        def _run(self) -> None:
            self._file.close()
            self._file = full_disk.opened()
            super()._run()

    if to == "hf":
        monkeypatch.setattr(convert.formats.stream, "Output", Full)
    else:
        monkeypatch.setattr("zipfile._ZipWriteFile.write", full)
    message = refused(capsys, source, str(tmp_path / "b"), "--to", to)
    assert message == f"{tmp_path / 'b'}: cannot write: No space left on device"


def test_a_source_that_changes_meanwhile_is_refused(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import convert.formats.hf

    whole = convert.formats.hf.write

    def write(*args: Any) -> list[str]:
        notes = whole(*args)
        os.utime(source / model_folder.SINGLE, (1, 1))
        return notes

    monkeypatch.setattr(convert.formats.hf, "write", write)
    with pytest.raises(UserError, match="changed while it was read"):
        convert_model(source, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_nothing(number: int, code: int, source: Path, tmp_path: Path) -> None:
    slow = (
        "import sys, time, convert.formats.hf, mlxgpt.cli\n"
        "def write(*_):\n    _[1].mkdir(); (_[1] / 'part').write_text('x'); time.sleep(30)\n"
        "convert.formats.hf.write = write\n"
        "sys.exit(mlxgpt.cli.main(['convert', sys.argv[1], sys.argv[2]]))\n"
    )
    command = [sys.executable, "-c", slow, str(source), str(tmp_path / "b")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / ".b.partial" / "b" / "part"
    deadline = time.monotonic() + 30
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    before = digest(source)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and digest(source) == before


# quantized folders


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A llama of 4 bits."""
    config = tiny(family="llama", n_embd=64)
    model_folder.write_model(tmp_path / "f", config, weights(config))
    convert_model(tmp_path / "f", tmp_path / "q", "mlx-lm", bits=4, group_size=32)
    shutil.rmtree(tmp_path / "f")
    return tmp_path / "q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp5"}}, "mode 'mxfp5' is not supported"),
        (
            {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
            "mode 'mxfp4', expected scales and no biases",
        ),
        ({"quantization": {"group_size": 32, "bits": 7}}, "7 bits and group_size 32"),
        ({"quantization": {"group_size": 0, "bits": 4}}, "4 bits and group_size 0"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "found F32 [80, 2], expected F32 or F16 or BF16 [80, 1]"),
        ({"quantization": {"group_size": 32, "bits": 8}}, "found U32 [80, 8], expected U32 [80, 16]"),
        ({"quantization": None}, "quantization is missing, which mlx-lm reads, beside an equal quantization_config"),
        (
            {"quantization": None, "quantization_config": None},
            "model.embed_tokens.scales is there, but config.json has no",
        ),
        ({"quantization": [1]}, "weights quantized by a method that is not named"),
    ],
)
def test_quantized_folders_that_do_not_hold(
    change: Any, message: str, quantized: Path, tmp_path: Path, capsys: Any
) -> None:
    read = json.loads((quantized / "config.json").read_text()) | change
    (quantized / "config.json").write_text(json.dumps(read))
    assert message in refused(capsys, quantized, str(tmp_path / "b"))


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.up_proj.biases"])
def test_quantized_folders_that_are_not_whole(lost: str, quantized: Path, tmp_path: Path, capsys: Any) -> None:
    arrays = tensors.read_tensors(quantized / model_folder.SINGLE)
    del arrays[lost]
    tensors.write_tensors(quantized / model_folder.SINGLE, arrays, {"format": "mlx"})
    index = json.loads((quantized / model_folder.INDEX).read_text())
    del index["weight_map"][lost]
    (quantized / model_folder.INDEX).write_text(json.dumps(index))
    assert lost.removesuffix(".biases") in refused(capsys, quantized, str(tmp_path / "b"))


# archives


def test_archives_that_lie(source: Path, tmp_path: Path) -> None:
    convert_model(source, tmp_path / "n", "npz")
    place = tmp_path / "n" / "weights.npz"
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged, or no \.npz"):
        open_model(tmp_path / "n")
    place.write_bytes(whole.replace(b"'shape': (80, 48)", b"'shape': (80, 49)", 1))
    with pytest.raises(UserError):
        open_model(tmp_path / "n")
    np.savez(place, **{"model.norm.weight": np.array([{}], dtype=object)})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"dtype \|O: expected float32"):
        open_model(tmp_path / "n")


def test_force_does_not_replace_a_device_or_a_pipe(tmp_path: Path) -> None:
    model_folder.write_model(tmp_path / "m", tiny(), weights(tiny()))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        convert_model(tmp_path / "m", tmp_path / "pipe", force=True)
    assert (tmp_path / "pipe").is_fifo()
