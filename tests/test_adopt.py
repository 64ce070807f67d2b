"""mlxgpt adopt from end to end: a state dict and a sample in, a folder out that gives the same logits, or nothing."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from convert import adoption
from mlxgpt import cli
from mlxgpt.common.backend import PACKAGES

V, C, L, H, T = 61, 32, 2, 8, 48


class Layer(nn.Module):
    """A block as somebody's course has it; q, k and v lie head by head."""

    def __init__(self, after: bool):
        super().__init__()
        self.after = after
        self.norm_a, self.norm_b = nn.LayerNorm(C, eps=1e-3), nn.LayerNorm(C, eps=1e-3)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(C, 3 * C), "merge": nn.Linear(C, C)})
        self.feed_forward = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (each.transpose(1, 2) for each in self.attention["qkv"](x).view(b, t, H, 3, C // H).unbind(3))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention["merge"](y.transpose(1, 2).reshape(b, t, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.after:  # as in 2017
            x = self.norm_a(x + self.attend(x))
            return self.norm_b(x + self.feed_forward(x))
        x = x + self.attend(self.norm_a(x))
        return x + self.feed_forward(self.norm_b(x))


class Home(nn.Module):
    def __init__(self, after: bool = False, seed: int = 0):
        torch.manual_seed(seed)
        super().__init__()
        self.token_table, self.place_table = nn.Embedding(V, C), nn.Embedding(T, C)
        self.layers = nn.ModuleList(Layer(after) for _ in range(L))
        self.norm_end = nn.LayerNorm(C, eps=1e-3)
        self.to_vocab = nn.Linear(C, V, bias=False)
        with torch.no_grad():
            for each in self.parameters():
                each.mul_(2).add_(torch.randn_like(each) * 0.05)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token_table(ids) + self.place_table(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.to_vocab(self.norm_end(x))


def put(folder: Path, model: Home) -> tuple[Path, Path]:
    """The checkpoint and the sample of a model, as docs/adopt.md makes one."""
    checkpoint, sample = folder / "ckpt.pt", folder / "sample.npz"
    torch.save({"model_state_dict": model.state_dict(), "epoch": 3}, checkpoint)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, V, (1, 32)))
    with torch.no_grad():
        np.savez(sample, ids=ids.numpy(), logits=model(ids).numpy())
    return checkpoint, sample


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("home")
    model = Home()
    checkpoint, sample = put(folder, model)
    return SimpleNamespace(folder=folder, model=model, checkpoint=checkpoint, sample=sample)


def adopt(capsys: pytest.CaptureFixture, *words: Any, backend: str = "torch") -> tuple[int, str, str]:
    code = cli.main(["adopt", *map(str, words), "--backend", backend])
    return code, *capsys.readouterr()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process of transformers, which one test runs."""
    monkeypatch.setattr(adoption, "_transformers", lambda *_: 0.0)


@pytest.fixture(scope="module")
def adopted(home: Any) -> Path:
    folder = home.folder / "model"
    assert cli.main(["adopt", str(home.checkpoint), "--like", str(home.sample), "--out", str(folder)]) == 0
    return folder


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers judges")
def test_a_home_made_gpt_becomes_a_folder_that_three_programs_agree_on(home: Any, adopted: Path) -> None:
    config = json.loads((adopted / "config.json").read_text())
    assert (config["model_type"], config["n_head"], config["activation_function"]) == ("gpt2", H, "relu")
    assert config["layer_norm_epsilon"] == 1e-3 and not config["tie_word_embeddings"]
    own = config["mlxgpt"]["provenance"]["adopted"]
    assert own["proved"] and own["choices"]["activation"] == ["relu", "proved"]
    ids = np.random.default_rng(7).integers(0, V, (2, T)).astype(np.int32)
    with torch.no_grad():
        wanted = home.model(torch.from_numpy(ids).long()).numpy()
    for package in PACKAGES.values():
        logits = importlib.import_module(f"{package}.trial").answer(adopted, ids)
        np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_the_map_takes_the_folder_back_bit_for_bit(home: Any, adopted: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.pt"
    assert cli.main(["convert", str(adopted), str(back), "--map", str(adopted / "map.toml")]) == 0
    state = torch.load(back, weights_only=True)["model_state_dict"]
    assert list(state) == list(home.model.state_dict())
    assert all(torch.equal(value, home.model.state_dict()[name]) for name, value in state.items())


@pytest.mark.usefixtures("quick")
def test_what_no_architecture_says_is_written_as_our_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint, sample = put(tmp_path, Home(after=True))
    code, out, _ = adopt(capsys, checkpoint, "--like", sample, "--out", tmp_path / "m", "--json", backend="mlx")
    report = json.loads(out)
    assert code == 0 and report["landing"]["family"] == "mlxgpt" and "placement" in report["landing"]["why"]
    assert set(report["verified"]) == set(PACKAGES) and max(report["verified"].values()) < 1e-5
    told = {row["name"]: row for row in report["choices"]}
    assert told["placement"]["value"] == "post_add" and told["placement"]["verdict"] == "proved"
    assert report["proved"] and report["candidates"] > 10 and report["sizes"]["n_head"] == H
    assert {"theirs", "ours", "shape", "axes", "sure", "why"} <= set(report["mapping"][0])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "mlxgpt" and "transformers" in config["mlxgpt"]["note"]


def test_without_evidence_nothing_is_written_unless_asked(
    home: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, out, error = adopt(capsys, home.checkpoint, "--out", tmp_path / "m")
    assert code == 2 and "--set n_head=" in error and "--unproved" in error and not (tmp_path / "m").exists()
    assert "n_head" in out and "relu" in out  # the choices with their options
    sets = ["--set", f"n_head={H}", "--set", "activation=relu", "--set", "norm_eps=1e-3"]
    code, out, _ = adopt(capsys, home.checkpoint, "--out", tmp_path / "m", "--unproved", *sets)
    assert code == 0 and "given" in out
    own = json.loads((tmp_path / "m" / "config.json").read_text())["mlxgpt"]["provenance"]["adopted"]
    assert not own["proved"] and own["choices"]["n_head"][1] == "given"


def test_a_sample_of_another_model_writes_nothing(home: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "other").mkdir()
    _, other = put(tmp_path / "other", Home(seed=5))
    known = ("n_head=8", "activation=relu", "placement=pre", "qkv=q_k_v_head_by_head", "embed_scale=1", "norm_eps=1e-3")
    sets = [word for item in known for word in ("--set", item)]
    code, out, error = adopt(capsys, home.checkpoint, "--like", other, "--out", tmp_path / "m", *sets)
    assert code == 1 and "no candidate gives the sample's logits" in error and "nothing was written" in error
    assert not (tmp_path / "m").exists() and "tried" in out


@pytest.mark.usefixtures("quick")
def test_a_map_decides_and_evidence_checks_it(
    home: Any, adopted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [home.checkpoint, "--like", home.sample, "--out", tmp_path / "m"]
    code, out, _ = adopt(capsys, *given, "--map", adopted / "map.toml", "--json")
    assert code == 0 and json.loads(out)["candidates"] == 1 and json.loads(out)["choices"] == []
    text = (adopted / "map.toml").read_text()
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(text.replace('activation = "relu"', 'activation = "gelu"'))
    code, _, error = adopt(capsys, *given, "--force", "--map", wrong)
    assert code == 1 and "no candidate" in error and (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "n_head"], "--set n_head: expected key=value"),
        (["--set", "activation=tanh"], "--set activation=tanh: expected one of"),
        (["--set", "colour=3"], "colour is no choice of this model"),
        (["--set", "n_head=8", "--set", "n_head=4"], "n_head is set twice"),
        (["--like", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--like", "a.npz", "--module", "a.py:A"], "--like and --module: expected one"),
        (["--kwargs", "{}"], "--kwargs: expected --module"),
        (["--map", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_written(
    words: list[str], said: str, home: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, _, error = adopt(capsys, home.checkpoint, "--out", tmp_path / "m", *words)
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_refused_before_the_search(
    home: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = (home.checkpoint, "--like", home.sample)
    code, out, error = adopt(capsys, *given, "--out", tmp_path)
    assert code == 2 and "--force" in error and not out
    code, out, error = adopt(capsys, *given, "--out", tmp_path / "no" / "m")
    assert code == 2 and "no such folder" in error and not out


def test_no_decoder_is_refused_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 10)).state_dict(), tmp_path / "cnn.pt")
    code, _, error = adopt(capsys, tmp_path / "cnn.pt")
    assert code == 2 and "cnn.pt: a convolutional network" in error


def test_a_folder_that_gives_other_logits_is_not_kept(
    home: Any, adopted: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = adoption.opening.tensors

    def swapped(*given: Any) -> dict[str, Any]:
        made = plain(*given)
        norm = made["ln_f.weight"]
        return made | {"ln_f.weight": dataclasses.replace(norm, read=lambda: norm.read()[::-1].copy())}

    monkeypatch.setattr(adoption.opening, "tensors", swapped)
    given = ("--like", home.sample, "--map", adopted / "map.toml")
    code, _, error = adopt(capsys, home.checkpoint, *given, "--out", tmp_path / "m")
    assert code == 1 and "nothing was kept" in error and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_where_transformers_differs_our_own_family_is_written(
    home: Any, adopted: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "_transformers", lambda *_: 0.5)
    given = ("--like", home.sample, "--map", adopted / "map.toml")
    code, out, _ = adopt(capsys, home.checkpoint, *given, "--out", tmp_path / "m")
    assert code == 0 and "transformers is off by 5.0e-01" in out
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "mlxgpt"


def test_the_table_fits_80_columns(home: Any, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = adopt(capsys, home.checkpoint)
    table = out.partition("\nsizes:")[0]
    assert code == 0 and max(map(len, table.splitlines())) <= 80
    for name in ("token_table", "layers.{n}.attention.qkv", "h.{n}.attn.q_proj"):
        assert name in table
