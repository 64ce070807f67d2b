"""Any state dict: wherever the tensors lie in a file of any kind; and what is refused, in one line that names it."""

import argparse
import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from convert.adopt import source
from mlxgpt import cli
from mlxgpt.common.errors import UserError

NAMES = ["emb.weight", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "head.weight"]

OPTIMIZER: dict[str, Any] = {"state": {}, "param_groups": [{"lr": 1e-3, "params": []}]}


@dataclasses.dataclass
class GPTConfig:
    """Settings as nanoGPT's, which a checkpoint may hold as an object."""

    n_head: int = 4
    act: Any = torch.nn.functional.gelu


class Model(nn.Module):
    """Names as a model's."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(Model().state_dict())


def arrays(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def savez(path: Path, named: dict[str, np.ndarray], write: Any = np.savez) -> None:
    with path.open("wb") as file:
        write(file, **named)


def check(path: Path, state: dict[str, torch.Tensor], **expected: Any) -> source.State:
    """The file has the tensors of ``state``, bit for bit, and the fields that are expected."""
    read = source.read(path)
    assert set(read.tensors) == set(state)
    for name, tensor in read.tensors.items():
        assert np.array_equal(tensor.read(), state[name].numpy()), name
        assert tensor.shape == tuple(state[name].shape) and tensor.dtype == np.float32
    for name, value in expected.items():
        assert getattr(read, name) == value, name
    return read


def wrapped(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


PLACES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], tuple[str, ...], str]] = {
    "bare": (lambda x: x, (), ""),
    "model": (lambda x: {"model": x, "iter_num": 3}, ("model",), ""),
    "model_state": (lambda x: {"model_state": x, "epoch": 3}, ("model_state",), ""),
    "model_state_dict": (lambda x: {"epoch": 3, "model_state_dict": x}, ("model_state_dict",), ""),
    "state_dict": (lambda x: {"state_dict": wrapped("model.", x)}, ("state_dict",), "model."),
    "module": (lambda x: {"module": wrapped("module.", x)}, ("module",), "module."),
    "net": (lambda x: {"net": x}, ("net",), ""),
    "weights": (lambda x: {"weights": x}, ("weights",), ""),
    "ema beside": (lambda x: {"ema": {k: v * 0 for k, v in x.items()}, "model": x}, ("model",), ""),
    "ema alone": (lambda x: {"ema": x}, ("ema",), ""),
    "deeper": (lambda x: {"checkpoint": {"model": wrapped("_orig_mod.", x)}}, ("checkpoint", "model"), "_orig_mod."),
    "Flax": (lambda x: {"params": x}, ("params",), ""),
    "some key": (lambda x: {"my_net": x, "note": "final"}, ("my_net",), ""),
    "compiled and parallel": (lambda x: wrapped("module._orig_mod.", x), (), "module._orig_mod."),
    "any attribute": (lambda x: wrapped("gpt.", x), (), "gpt."),
}


@pytest.mark.parametrize("place", PLACES)
def test_tensors_are_found_wherever_they_lie(place: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    make, under, prefix = PLACES[place]
    torch.save(make(state), tmp_path / "x.pt")
    check(tmp_path / "x.pt", state, under=under, prefix=prefix, kind="pt", separator=".")


def test_dicts_and_lists_are_flattened(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    rest = {key: state[f"{key}.weight"] for key in ("emb", "head")}
    blocks = [{key: state[f"blocks.{n}.{key}"] for key in ("weight", "bias")} for n in range(2)]
    torch.save({key: {"weight": each} for key, each in rest.items()} | {"blocks": blocks}, tmp_path / "x.pt")
    check(tmp_path / "x.pt", state, nested=True)


@pytest.mark.parametrize(
    "kind", ["legacy", "safetensors", "npz", "compressed", "slashes", "folder", "shards", "bin shards"]
)
def test_every_container_is_read(kind: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path, own = tmp_path / "weights.npz", arrays(state)
    if kind == "legacy":
        torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    elif kind == "npz":
        savez(path, own)
    elif kind == "compressed":
        savez(path, own, np.savez_compressed)
    elif kind == "slashes":
        savez(path, {f"params/{name.replace('.', '/')}": each for name, each in own.items()})
    elif kind == "safetensors":
        save_file(own, tmp_path / "x.safetensors")
        path = tmp_path / "x.safetensors"
    elif kind == "folder":
        save_file(own, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"n_head": 4}')
        path = tmp_path
    else:
        end = "bin" if kind == "bin shards" else "safetensors"
        stem = "pytorch_model" if end == "bin" else "model"
        files = {name: f"{stem}-0000{1 + (name == 'head.weight')}-of-00002.{end}" for name in own}
        for file in set(files.values()):
            part = {name: own[name] for name in own if files[name] == file}
            if end == "bin":
                torch.save({name: state[name] for name in part}, tmp_path / file)
            else:
                save_file(part, tmp_path / file)
        (tmp_path / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        path = tmp_path
    read = check(path, state)
    if kind == "folder":
        assert read.extras == {"config.json": {"n_head": 4}}
    if kind == "slashes":
        assert (read.prefix, read.separator) == ("params.", "/")


def test_float_kinds_stay_and_buffers_are_kept(tmp_path: Path) -> None:
    tensors = {
        "a.half": torch.ones(2, 3, dtype=torch.float16),
        "a.brain": torch.full((2, 3), 1.5, dtype=torch.bfloat16),
        "a.wide": torch.full((2, 3), 1 / 3, dtype=torch.float64),
        "b.ids": torch.arange(5)[None],
        "b.mask": torch.ones(3, 3, dtype=torch.bool),
        "b.turns": torch.polar(torch.ones(3), torch.ones(3)),
        "b.rows": torch.arange(3).expand(2, 3),
        "b.none": torch.zeros(0, 3),
    }
    torch.save(tensors, tmp_path / "x.pt")
    read = source.read(tmp_path / "x.pt")
    for name, tensor in tensors.items():
        found = read.tensors[name].read()
        expected = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        assert np.array_equal(found.astype(expected.dtype), expected) and found.shape == tensor.shape, name
        assert read.tensors[name].dtype == found.dtype
    assert read.tensors["a.brain"].dtype == ml_dtypes.bfloat16
    assert "1 tensors are float64, such as a.wide: their values are rounded to float32" in read.notes[0]


def test_settings_beside_are_plain_values(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = Model()
    model.head.weight = model.emb.weight
    content = {
        "config": GPTConfig(),
        "args": argparse.Namespace(n_head=2, out=pathlib.Path("/x/y")),
        "best": np.float64(1.5),
        "loss": torch.tensor(2.5),
        "itos": {0: "a", 1: None},
        "rng": torch.get_rng_state(),
        "numpy": np.random.default_rng(0).normal(size=3),
        "model": model.state_dict(),
        "optimizer": OPTIMIZER,
    }
    for legacy in (False, True):
        torch.save({"checkpoint": content}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        read = source.read(tmp_path / "x.pt")
        plain = {
            "config": {"n_head": 4, "act": "torch._C._nn.gelu"},
            "args": {"n_head": 2, "out": "/x/y"},
            "best": 1.5,
            "loss": 2.5,
            "itos": {0: "a", 1: None},
        }
        assert read.extras == plain and read.beside == {"checkpoint": plain}
        assert read.tied == (("emb.weight", "head.weight"),)
        assert read.optimizer is not None and read.optimizer_at == ("checkpoint", "optimizer")
        assert read.notes == (f"{tmp_path / 'x.pt'}: left behind beside model: rng, numpy",)


def test_lightning_s_optimizer_and_settings(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    content = {
        "state_dict": wrapped("model.", state),
        "hyper_parameters": {"n_head": 4},
        "optimizer_states": [OPTIMIZER],
    }
    torch.save(content | {"global_step": 5, "callbacks": {"best": {"score": torch.tensor(1.0)}}}, tmp_path / "x.ckpt")
    read = check(tmp_path / "x.ckpt", state, optimizer_at=("optimizer_states", "0"), prefix="model.")
    assert read.extras["hyper_parameters"] == {"n_head": 4} and read.extras["global_step"] == 5


def test_a_head_that_is_a_copy_is_noted(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(arrays(state) | {"head.weight": state["emb.weight"].numpy().copy()}, tmp_path / "x.safetensors")
    assert source.read(tmp_path / "x.safetensors").tied == (("emb.weight", "head.weight"),)


class Runs:
    """Would run a command where it is unpickled."""

    def __init__(self, call: Callable[..., Any]):
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, ((["touch", "ran"],) if self.call is subprocess.Popen else ("touch ran",))


WEIGHTS = {"w": torch.eye(3)}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a module": (lambda p: torch.save(Model(), p), r"object of the class \S*Model, .* only; nothing was run: --module"),
    "a module inside": (lambda p: torch.save({"model": Model()}, p), "an object of the class .*Model"),
    "a command": (lambda p: torch.save(WEIGHTS | {"x": Runs(os.system)}, p), "holds posix.system, .* --module FILE.py"),
    "a process": (lambda p: torch.save(WEIGHTS | {"x": Runs(subprocess.Popen)}, p), "holds subprocess.Popen"),
    "code": (lambda p: torch.save(WEIGHTS | {"x": Runs(eval)}, p), "holds builtins.eval"),
    "no tensors": (lambda p: torch.save({"epoch": 3, "args": {}}, p), "holds no tensors: found args, epoch"),
    "one tensor": (lambda p: torch.save(torch.eye(3), p), r"one tensor \[3, 3\], expected tensors by name"),
    "a number": (lambda p: torch.save(3, p), "int, expected tensors by name"),
    "terabytes": (lambda p: torch.save({"w": torch.ones(1).expand(10**13)}, p), r"w: \[1000000+\] values that the"),
    "sparse": (lambda p: torch.save(WEIGHTS | {"s": torch.eye(3).to_sparse()}, p), "s is sparse_coo: a sparse or"),
    "quantized": (
        lambda p: torch.save({"q": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)}, p),
        "q is torch.qint8: a sparse or quantized tensor",
    ),
    "fp8": (lambda p: torch.save({"f": torch.eye(3).to(torch.float8_e4m3fn)}, p), "f is torch.float8_e4m3fn"),
    "no values": (lambda p: torch.save({"m": torch.empty(3, 3, device="meta")}, p), "m is on the device meta"),
    "two of a name": (lambda p: torch.save({"a.b": WEIGHTS["w"], "a": {"b": WEIGHTS["w"]}}, p), "two tensors are"),
    "twice but for a prefix": (
        lambda p: torch.save({"w.a": WEIGHTS["w"], "_orig_mod.w.a": WEIGHTS["w"]}, p),
        "w.a and _orig_mod.w.a are one name but for a wrapper's prefix",
    ),
    "a bare pickle": (lambda p: p.write_bytes(pickle.dumps({"w": np.eye(3)})), "a bare pickle, which only"),
    "GGUF": (lambda p: p.write_bytes(b"GGUF" + bytes(40)), "GGUF: mlxgpt convert reads it"),
    "text": (lambda p: p.write_text("hello there"), "bytes 68 65 6c 6c 6f 20 74 68: expected a file of torch.save"),
    "nothing": (lambda p: p.write_bytes(b""), "empty: expected a file of torch.save"),
    "objects": (lambda p: savez(p, {"a": np.array([{}], dtype=object)}), r"a: dtype \|O: expected float32"),
    "an archive of something": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "a"), "with 0 data.pkl"),
    "header of terabytes": (lambda p: _liar(p, 2**42), "header of .* bytes in a file of|truncated: data ends"),
    "a header that is no JSON": (lambda p: p.write_bytes((8).to_bytes(8, "little") + b"{{{{{{{{"), "not JSON"),
    "nowhere": (lambda p: None, "no such file or folder"),
    "an empty folder": (lambda p: p.mkdir(), "found no file of weights: expected the path of one .pt"),
    "two files": (
        lambda p: (p.mkdir(), torch.save(WEIGHTS, p / "a.pt"), torch.save(WEIGHTS, p / "b.pt")),
        "found a.pt, b.pt: expected the path of one",
    ),
}  # fmt: skip


def _liar(path: Path, size: int) -> None:
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    text = json.dumps({"w": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_state_dict_is_refused_in_one_line(case: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make, expected = REFUSED[case]
    make(tmp_path / "x.pt")
    with pytest.raises(UserError, match=expected) as error:
        source.read(tmp_path / "x.pt")
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{tmp_path / 'x.pt'}: ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("kind", ["pt", "legacy", "npz", "safetensors"])
def test_a_truncated_file_is_refused(kind: str, share: float, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind in ("pt", "legacy"):
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "pt")
    elif kind == "npz":
        savez(path, arrays(state))
    else:
        save_file(arrays(state), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="truncated|damaged|expected a file of torch.save|not a zip"):
        source.read(path)


def test_an_unknown_file_names_the_way(tmp_path: Path, capsys: Any) -> None:
    torch.save({"my.weight": torch.eye(3)}, tmp_path / "x.pt")
    assert cli.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and f"mlxgpt adopt {tmp_path / 'x.pt'} --out DIR" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
