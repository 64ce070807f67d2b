"""mlxgpt verify agrees with itself, and names the tensor or field of each thing that was broken on purpose."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest

from convert import convert
from convert.verify import verify
from mlxgpt import cli
from mlxgpt.common import folder, tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny llama."""
    place = tmp_path_factory.mktemp("verify") / "model"
    config = models.CASES["llama"]
    folder.write_model(place, config, models.weights(config))
    return place


def edit(place: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    arrays = {name: array.copy() for name, array in tensors.read_tensors(place / "model.safetensors").items()}
    change(arrays)
    tensors.write_tensors(place / "model.safetensors", arrays)


def flip(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.layers.1.mlp.up_proj.weight"].view(np.uint32)[3, 5] ^= 1


def stretch(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.layers.0.self_attn.v_proj.weight"] *= np.float32(1.01)


def swap(arrays: dict[str, np.ndarray]) -> None:
    for name in [name for name in arrays if name.startswith("model.layers.0.")]:
        other = name.replace("layers.0.", "layers.1.")
        arrays[name], arrays[other] = arrays[other], arrays[name]


def set_field(key: str, value: object) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        values = tensors.read_json(place / "config.json")
        assert values[key] != value
        tensors.write_json(place / "config.json", values | {key: value})

    return change


BROKEN = {
    "one bit": (lambda place: edit(place, flip), "h.1.mlp.c_fc.weight"),
    "layers swapped": (lambda place: edit(place, swap), "h.0."),
    "eps": (set_field("rms_norm_eps", 1e-3), "norm_eps"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, model: Path, tmp_path: Path) -> None:
    change, expected = BROKEN[name]
    place = shutil.copytree(model, tmp_path / "broken")
    change(place)
    report = verify(model, place, weights_only=True)
    assert not report.agrees
    assert any(expected in str(finding) for finding in report.findings), report.findings


def test_a_conversion_agrees_in_both_frameworks(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    convert(model, tmp_path / "a.gguf")
    assert cli.main(["verify", str(model), str(tmp_path / "a.gguf"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agrees"] is True and report["findings"] == []
    assert {"agrees", "findings", "checked", "not_checked"} <= report.keys()


def test_logits_of_another_model_do_not_agree(model: Path, tmp_path: Path) -> None:
    place = shutil.copytree(model, tmp_path / "other")
    edit(place, stretch)
    report = verify(model, place, frameworks=["mlx"], rungs=["logits"])
    assert not report.agrees
    assert any("logits" in str(finding) for finding in report.findings)


def test_libraries_judge_a_folder_and_see_what_is_not_there(model: Path, tmp_path: Path) -> None:
    assert verify(model, f"transformers:{model}", frameworks=["torch"]).agrees
    assert verify(model, f"mlx-lm:{model}", frameworks=["mlx"], rungs=["tensors", "logits", "greedy"]).agrees
    place = shutil.copytree(model, tmp_path / "broken")
    set_field("rope_theta", 500.0)(place)
    values = tensors.read_json(place / "config.json")
    values["rope_parameters"]["rope_theta"] = 500.0
    tensors.write_json(place / "config.json", values)
    report = verify(model, f"transformers:{place}", frameworks=["torch"], rungs=["logits"])
    assert not report.agrees and any("logits" in str(finding) for finding in report.findings)
