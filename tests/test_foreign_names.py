"""Heads and names as others leave them: what a file lacks, and what wrappers put before a tensor's name."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from compare import agree
from models import CASES, tiny, weights

from convert import convert as convert_model
from convert import open_model
from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder, tensors
from mlxgpt.common.model import families
from mlxgpt.load import load as mlx_load
from torch_ref.load import load as torch_load

NAMES = ("llama", "llama-untied", "gpt2-untied", "gpt_neox")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    """Models of several families, written by us; none may be changed."""
    made = {name: tmp_path_factory.mktemp("names") / name for name in NAMES}
    for name, place in made.items():
        model_folder.write_model(place, CASES[name], weights(CASES[name]))
    return made


def renamed(source: Path, place: Path, rename: Any) -> Path:
    """A copy whose tensors have other names."""
    shutil.copytree(source, place)
    rewrite(place, lambda arrays: {rename(name): array for name, array in arrays.items()})
    return place


def check(name: str, place: Path) -> None:
    """What both readers make of a folder is the model of that name, bit for bit."""
    config, expected = CASES[name], weights(CASES[name])
    assert model_folder.read_config(place) == config
    found = model_folder.read_params(place, config)
    opened = open_model(place)
    assert opened.config == config
    for each, array in expected.items():
        assert np.array_equal(found[each], array) and np.array_equal(opened.tensors[each].read(), array), each


def rewrite(place: Path, change: Any) -> None:
    """Changes the arrays of a folder's model.safetensors or weights.npz; its index goes."""
    if (place / "weights.npz").is_file():
        np.savez(place / "weights.npz", **change(dict(np.load(place / "weights.npz"))))
        return
    made, metadata = place / model_folder.SINGLE, tensors.read_header(place / model_folder.SINGLE)[1]
    tensors.write_tensors(made, change(tensors.read_tensors(made)), metadata)
    (place / model_folder.INDEX).unlink(missing_ok=True)


def bare(name: str) -> str:
    for trunk in ("model.", "gpt_neox.", "transformer."):
        name = name.removeprefix(trunk)
    return name


PREFIXES = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "compile in data parallel": lambda name: f"module._orig_mod.{name}",
    "data parallel in compile": lambda name: f"_orig_mod.module.{name}",
    "Lightning of compile": lambda name: f"model._orig_mod.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT twice": lambda name: f"base_model.model.base_model.model.{name}",
    "text part": lambda name: f"language_model.{name}",
    "text part of a trunk": lambda name: f"model.language_model.{bare(name)}",
    "text model of one": lambda name: f"language_model.model.{bare(name)}",
    "the trunk alone": bare,
    "GPT-2's trunk": lambda name: f"transformer.{bare(name)}",
    "blocks compiled": lambda name: name.replace("layers.0.", "layers.0._orig_mod.").replace("h.0.", "h.0._orig_mod."),
    "blocks of FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(".1.", ".1._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", NAMES)
def test_wrappers_names_are_read_by_both_readers(
    name: str, prefix: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    check(name, renamed(folders[name], tmp_path / "m", PREFIXES[prefix]))


def test_both_frameworks_load_a_wrapped_model(folders: dict[str, Path], tmp_path: Path) -> None:
    place = renamed(folders["llama-untied"], tmp_path / "m", lambda name: f"module._orig_mod.{name}")
    tokens = [[1, 5, 79, 3]]
    theirs, plain = (
        torch_load(each, device="cpu")[0](torch.tensor(tokens)).detach().numpy()
        for each in (place, folders["llama-untied"])
    )
    assert np.array_equal(theirs, plain)
    agree("MLX", np.array(mlx_load(place, device="cpu")[0](mx.array(tokens))), plain, 1e-5)


@pytest.mark.parametrize("to", ["npz", "mlx-lm"])
def test_archives_and_quantized_folders_may_have_prefixes_too(to: str, tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        config = tiny(family=name, n_embd=64)
        model_folder.write_model(tmp_path / name, config, weights(config))
        place = tmp_path / f"{name}-to"
        options: dict[str, Any] = {"bits": 8, "group_size": 32} if to == "mlx-lm" else {}
        convert_model(tmp_path / name, place, to, **options)
        expected = {each: tensor.read() for each, tensor in open_model(place).tensors.items()}
        prefix = f"{'_orig_mod' if to == 'npz' else 'language_model'}."
        rewrite(place, lambda arrays, prefix=prefix: {prefix + each: array for each, array in arrays.items()})
        found = open_model(place)
        assert found.config == config
        assert all(np.array_equal(found.tensors[each].read(), array) for each, array in expected.items())


UNKNOWN = [
    (lambda name: f"student.{name}", "all 21 tensors begin with 'student.', which is not known"),
    (lambda name: f"module.net.{name}", "all 21 tensors begin with 'module.net.', which is not known"),
    (lambda name: f"ema.{name}" if "layers.1" in name else name, "9 of 21 tensors begin with 'ema.'"),
    (
        lambda name: name.replace("q_proj.weight", "q_proj.lora_A.default.weight"),
        "lora_A.default.weight is an adapter's",
    ),
]


@pytest.mark.parametrize(("rename", "message"), UNKNOWN, ids=["one", "two", "some", "adapter"])
def test_a_prefix_that_is_not_known_is_named(
    rename: Any, message: str, folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    place = renamed(folders["llama-untied"], tmp_path / "m", rename)
    for call in (lambda: model_folder.read_params(place, CASES["llama-untied"]), lambda: open_model(place)):
        with pytest.raises(UserError) as caught:
            call()
        assert message in str(caught.value) and str(place) in str(caught.value)
    assert cli.main(["convert", str(place), str(tmp_path / "b")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err and not (tmp_path / "b").exists()


def test_towers_beside_the_text_model_are_refused_by_their_name(folders: dict[str, Path], tmp_path: Path) -> None:
    place = renamed(folders["llama"], tmp_path / "m", lambda name: f"language_model.{name}")
    arrays = tensors.read_tensors(place / model_folder.SINGLE)
    arrays |= {f"vision_tower.layers.{n}.q.weight": np.ones((2, 2), np.float32) for n in range(3)}
    tensors.write_tensors(place / model_folder.SINGLE, arrays)
    with pytest.raises(
        UserError, match=r"unexpected tensor vision_tower.*; 3 such tensors begin with 'vision_tower\.'"
    ):
        model_folder.read_params(place, model_folder.read_config(place))


def test_a_model_of_several_parts_says_which_is_read_alone() -> None:
    values = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    with pytest.raises(UserError, match="model_type 'llava' .*; its text_config is a llama, which is read as"):
        families.config_from_hf(values)


# heads


@pytest.mark.parametrize("name", ["llama-untied", "gpt2-untied", "gpt_neox", "qwen3-untied"])
@pytest.mark.parametrize("to", ["hf", "mlx-lm", "npz"])
def test_an_untied_model_without_its_head_is_refused(name: str, to: str, tmp_path: Path) -> None:
    config = CASES[name]
    model_folder.write_model(tmp_path / "a", config, weights(config))
    place = tmp_path / "b"
    convert_model(tmp_path / "a", place, to)
    heads = (families.to_foreign(config, "lm_head.weight")[0], "lm_head.weight", "model.embed_out.weight")
    heads += ("model.lm_head.weight",)
    rewrite(place, lambda arrays: {each: array for each, array in arrays.items() if each not in heads})
    values = json.loads((place / "config.json").read_text())
    key = "tie_word_embeddings"
    for said, config_json in ((f"has {key} = false", values), (f"no {key}, which", values | {key: None})):
        if config_json[key] is None:
            del config_json[key]
            if config.family == "gpt2":
                continue  # whose default is a tied head
        (place / "config.json").write_text(json.dumps(config_json))
        with pytest.raises(UserError, match=rf"is missing, and config.json .*{said}.*expected the head"):
            open_model(place)
        if to != "npz":
            with pytest.raises(UserError, match="expected the head"):
                model_folder.read_config(place)


@pytest.mark.parametrize("to", ["hf", "mlx-lm", "npz"])
def test_an_equal_head_of_a_tied_model_is_no_second_one(to: str, tmp_path: Path) -> None:
    config = CASES["llama"]
    model_folder.write_model(tmp_path / "a", config, weights(config))
    place = tmp_path / "b"
    convert_model(tmp_path / "a", place, to)
    rewrite(place, lambda arrays: arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]})
    assert open_model(place).config == config and "lm_head.weight" not in open_model(place).tensors
    rewrite(place, lambda arrays: arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"] + 1})
    assert not open_model(place).config.tied, "another head than the embedding is one of its own"


def test_an_equal_head_in_mlx_lms_quantization_is_no_second_one(tmp_path: Path) -> None:
    config = tiny(family="llama", n_embd=64)
    model_folder.write_model(tmp_path / "a", config, weights(config))
    place = tmp_path / "b"
    convert_model(tmp_path / "a", place, "mlx-lm", bits=4, group_size=32)
    table, parts = "model.embed_tokens", ("weight", "scales", "biases")
    rewrite(place, lambda arrays: arrays | {f"lm_head.{part}": arrays[f"{table}.{part}"] for part in parts})
    assert open_model(place).config == model_folder.read_config(place) == config
    assert "lm_head.weight" not in model_folder.read_params(place, config)
    rewrite(place, lambda arrays: arrays | {"lm_head.biases": arrays["lm_head.biases"] + 1})
    assert not model_folder.read_config(place).tied
