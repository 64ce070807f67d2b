"""What goes along with the weights, through every format that can hold it; what is proven before it is kept."""

import dataclasses
import doctest
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import fake_run
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from models import CASES, NO_BIAS, tiny, weights

import convert.conversion
import convert.formats.hf
from convert import convert as convert_model
from mlxgpt import cli
from mlxgpt.common import backend
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import RunError
from mlxgpt.common.folders import model_folder, tensors
from mlxgpt.common.model import families, params
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.train import pretrain

CARD = "---\nlicense: mit\ntags:\n- stories\nbase_model: someone/base\n---\n# Card\n"
GENERATION = {"temperature": 0.7, "eos_token_id": [0, 3], "do_sample": True}


@pytest.fixture
def dressed(tmp_path: Path) -> Path:
    """A llama with a tokenizer and everything else that folders of the hub have."""
    config, place = tiny(family="llama", vocab_size=300), tmp_path / "dressed"
    tokenizer = train_tokenizer("bpe", ["the quick brown fox " * 50], 280)
    model_folder.write_model(place, config, weights(config), tokenizer=tokenizer, extra={"bos_token_id": 0})
    (place / "README.md").write_text(CARD)
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (place / "generation_config.json").write_text(json.dumps(GENERATION))
    return place


def rest(place: Path) -> dict[str, bytes]:
    """The files beside weights and config."""
    own = ("config.json", model_folder.SINGLE, model_folder.INDEX, "weights.npz")
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name not in own}


@pytest.mark.parametrize("route", [("mlx-lm", "gguf", "hf"), ("npz", "gguf", "mlx-lm"), ("gguf", "npz", "hf")])
def test_everything_travels_and_the_last_one_says_from_what(
    route: tuple[str, ...], dressed: Path, tmp_path: Path
) -> None:
    before = place = dressed
    for step, to in enumerate(route):
        before, place = place, tmp_path / (f"{step}.gguf" if to == "gguf" else str(step))
        convert_model(before, place, to)
    assert rest(place) == rest(dressed)
    values = json.loads((place / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (0, 0)
    came = values["mlxgpt"]["provenance"]
    source = before if before.is_file() else next(before.glob("*weights*")) if route[-2] == "npz" else before
    assert came["from"]["sha256"] == {source.name: hashlib.sha256(source.read_bytes()).hexdigest()}
    assert came["mlxgpt"] == convert.conversion.mlxgpt.__version__ and came["to"]["format"] == route[-1]


def test_what_a_format_has_no_place_for_is_named(dressed: Path, tmp_path: Path) -> None:
    notes = convert_model(dressed, tmp_path / "m.bin").notes
    assert any("chat_template.jinja, generation_config.json, README.md" in note for note in notes)


# what mlx-lm computes otherwise


@pytest.mark.parametrize("name", ["gpt2-nobias-erf", "gemma"])
def test_what_is_warned_of_is_what_mlx_lm_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm's logits are those of the model that the warning describes, and not those of this one."""
    from mlxgpt.load import load

    config = CASES[name]
    model_folder.write_model(tmp_path / "a", config, weights(config, scale=3.0))
    said = families.mlx_lm_deviations(config)
    assert len(said) == 1 and config.activation in said[0]
    theirs = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}[config.activation]
    assert f"mlx-lm computes {theirs}" in said[0]
    tokens = mx.array([[1, 5, 79, 3, 3, 0, 44, 12]])
    ours, found = (np.array(model(tokens)) for model in (load(tmp_path / "a")[0], load_model(tmp_path / "a")[0]))
    monkeypatch.setattr(model_folder, "read_config", lambda place: dataclasses.replace(config, activation=theirs))
    described = np.array(load(tmp_path / "a")[0](tokens))
    assert 10 * np.abs(found - described).max() < np.abs(found - ours).max()


def test_a_run_warns_once_of_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(backend, "load", fake_run.load_backend)
    monkeypatch.setattr(backend, "resolve", lambda name, device=None: "fake")
    monkeypatch.setattr(pretrain.token_source, "open_data", fake_run.open_data)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(fake_run.RECIPE)
    for out, family, activation, times in (("a", "gpt2", "gelu", 1), ("b", "gpt2", "gelu_tanh", 0)):
        settings = [f"model.family={family}", f"model.activation={activation}", "train.save_every=4"]
        assert cli.main(["train", "./r.toml", "--out", out, *(x for each in settings for x in ("--set", each))]) == 0
        said = capsys.readouterr()
        assert (said.out + said.err).count("mlx-lm computes gelu_tanh in gpt2, this model has gelu") == times


# moments


def moments(config: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """m and v of which no two values are equal."""
    made: dict[str, dict[str, np.ndarray]] = {"m": {}, "v": {}}
    at = 1
    for group in made.values():
        for name, param in params.table(config).items():
            count = int(np.prod(param.shape))
            group[name] = (np.arange(at, at + count, dtype=np.float32) / 2**20).reshape(param.shape)
            at += count
    return made


@pytest.mark.parametrize(
    ("family", "route"),
    [
        (dict(family="gpt2", activation="gelu", **NO_BIAS), ("hf", "nanogpt", "hf", "nanogpt", "hf")),
        (dict(family="gpt2", activation="gelu"), ("nanogpt", "hf")),
        (dict(family="gpt2", tied=False), ("gptmodel", "hf")),
        (dict(family="llama"), ("hf",)),
        (dict(family="gpt_neox"), ("hf",)),
    ],
)
def test_moments_pass_by_value(family: dict[str, Any], route: tuple[str, ...], tmp_path: Path) -> None:
    config = tiny(**family)
    made = moments(config)
    snapshot: Any = {"params": weights(config), "t": 5, **made}
    (tmp_path / "run").mkdir()
    state = checkpoint.RunState(1, {"train": "x"}, {"model": {}}, "mlx", {}, step=6, t=5)
    place = checkpoint.write(tmp_path / "run", snapshot, config, None, state, 0)[0]
    for n, to in enumerate(route):
        before, place = place, tmp_path / f"{n}{'.pt' * (to != 'hf')}"
        convert_model(before, place, to)
    back = checkpoint.read_snapshot(place, config)
    assert back["t"] == 5
    for group, expected in (("params", snapshot["params"]), *made.items()):
        assert all(np.array_equal(back[group][name], expected[name]) for name in expected), group
    assert checkpoint.verify(place).t == 5


# proof before the name


@pytest.mark.parametrize("there", [False, True])
def test_verify_keeps_nothing_of_a_writer_that_is_broken(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The mutation: two layers are swapped as they are written; what was there before stays."""
    config = CASES["llama"]
    model_folder.write_model(tmp_path / "a", config, weights(config))
    if there:
        model_folder.write_model(tmp_path / "b", config, weights(config, seed=2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").glob("*")}
    whole = convert.formats.hf.write

    def broken(opened: Any, place: Path, options: Any) -> list[str]:
        notes = whole(opened, place, options)
        arrays = tensors.read_tensors(place / model_folder.SINGLE)
        one, two = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
        arrays[one], arrays[two] = arrays[two], arrays[one]
        tensors.write_tensors(place / model_folder.SINGLE, arrays, {"format": "pt"})
        return notes

    monkeypatch.setattr(convert.formats.hf, "write", broken)
    command = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--verify", *(["--force"] if there else [])]
    assert cli.main(command) == 1
    err = capsys.readouterr().err
    assert "does not agree, nothing was kept" in err and "mlp.c_fc.weight" in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").glob("*")} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(RunError):
        convert_model(tmp_path / "a", tmp_path / "b", force=there, verify=True)


def test_two_conversions_to_one_place_do_not_meet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from convert.formats.output import workplace

    model_folder.write_model(tmp_path / "a", CASES["llama"], weights(CASES["llama"]))
    with workplace(tmp_path / "b", False) as place:
        place.mkdir()
        assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
        assert "another process is converting to it" in capsys.readouterr().err and place.is_dir()
    convert_model(tmp_path / "a", tmp_path / "b")


def test_what_a_kill_left_is_put_back_or_removed(tmp_path: Path) -> None:
    model_folder.write_model(tmp_path / "a", CASES["llama"], weights(CASES["llama"]))
    convert_model(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / ".b.old")
    (tmp_path / ".b.partial").mkdir()
    (tmp_path / ".b.partial" / "b").write_bytes(b"half")
    with pytest.raises(convert.conversion.UserError, match="exists; --force"):
        convert_model(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_round_trip_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """convert's docstrings are run as they stand."""
    config = tiny(family="gpt2", activation="gelu")
    model_folder.write_model(tmp_path / "model", config, weights(config))
    monkeypatch.chdir(tmp_path)
    convert_model("model", "ckpt.pt")
    shutil.rmtree("model")
    for module in (convert, convert.conversion):
        found = doctest.testmod(module, raise_on_error=True)
        assert found.attempted >= 3
