"""Adapter folders load in PEFT and in mlx-lm with the same logits, and theirs load here; broken ones are caught."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interop
import numpy as np
import peft
import pytest
from interop import FULL, GATE, METHODS, MODELS, written

from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, mlx_lm_adapter, model_folder, peft_adapter
from mlxgpt.common.model import adapters


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in MODELS for method in (METHODS if name in FULL else ("lora",))]
)
def test_adapters_mean_the_same_in_every_library(tmp_path: Path, name: str, method: str) -> None:
    figures = interop.cell(tmp_path, name, method)
    assert all(figure <= GATE for figure in figures.values()), figures


# what an adapter of ours may be beside the matrix: by a name, the model and the settings
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "last-layer": ("llama-gqa", {"layers": 1, "ranks": ("q_proj=8",), "alphas": ("v_proj=3.5",)}),
    "layers-apart": ("gpt2", {"targets": (r"h\.0\.attn\.c_attn", r"h\.1\.mlp\.c_proj")}),
    "dora-layers-apart": ("gpt2", {"targets": (r"h\.0\.attn\.c_attn", r"h\.1\.mlp\.c_proj"), "method": "dora"}),
    "pissa": ("qwen3", {"init": "pissa", "rslora": True}),
    "dora-pissa": ("phi3", {"init": "pissa", "method": "dora"}),
    "tied-embedding": ("gpt2", {"targets": ("wte", "all-linear")}),
    "embedding-and-head": ("llama-untied", {"targets": ("wte", "lm_head", "q_proj")}),
    "neox-head": ("gpt_neox", {"targets": ("wte", "embed_out")}),
}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "tied-embedding-whole": ("llama-gqa", {"train": ("wte",)}),
    "embedding-and-head-whole": ("gpt_neox", {"train": ("wte", "lm_head")}),
    "matrix-and-norm-whole": ("gpt2", {"train": ("wpe", "ln_f", "h.0.mlp.c_fc"), "targets": ("c_attn",)}),
    "biases": ("gpt2", {"bias": "all"}),
    "biases-of-targets": ("phi", {"bias": "adapted", "train": ("lm_head",), "targets": ("q_proj", "fc1")}),
}


@pytest.mark.parametrize("choice", [*CHOICES, *WHOLE])
def test_what_may_be_trained_survives_the_folder(tmp_path: Path, choice: str) -> None:
    name, settings = (CHOICES | WHOLE)[choice]
    made = written(tmp_path, name, alpha=4.0, **settings)
    assert interop.to_peft(made) <= GATE
    if choice in CHOICES:
        assert interop.to_mlx_lm(made) <= GATE
    else:
        assert not (made.adapter / mlx_lm_adapter.TENSORS).exists()
        assert "mlx-lm" in adapter_folder.limits(made.recipe)[0]
    found = adapter_folder.read_adapter(made.adapter, made.base, made.config)
    again = adapter_folder.to_config(found, made.config)
    assert adapters.targets(made.config, again) == found.targets
    expected = interop.our_logits(interop.torch_ref, made.fused)
    for package in (interop.mlxgpt, interop.torch_ref):
        assert interop.worst(choice, interop.our_logits(package, made.base, made.adapter), expected) <= GATE
        assert interop.worst(choice, interop.our_logits(package, made.adapter), expected) <= GATE  # it names its base


def test_dora_of_the_embedding_is_for_mlx_lm_alone(tmp_path: Path) -> None:
    made = written(tmp_path, "llama-untied", targets=("wte", "q_proj"), method="dora", alpha=4.0)
    assert not (made.adapter / peft_adapter.TENSORS).exists()
    assert interop.to_mlx_lm(made) <= GATE
    assert "PEFT" in adapter_folder.limits(made.recipe)[0]


def test_what_neither_library_holds_is_refused_before_it_trains(tmp_path: Path) -> None:
    settings = interop.recipe("llama-untied", targets=("wte",), method="dora", train=("ln_f",))
    with pytest.raises(UserError, match=r"PEFT normalizes its columns.*mlx-lm holds no tensors"):
        adapter_folder.limits(settings)


# what PEFT may be asked for: by a name, the model, LoraConfig's arguments, and the targets that are expected here
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": ("llama-gqa", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2},
                               "alpha_pattern": {"v_proj": 5}}),
    "regex": ("llama-gqa", {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj", "exclude_modules": ".*1.*up.*"}),
    "layers": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    "one-layer": ("qwen3", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "whole": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "c_fc"], "fan_in_fan_out": True}),
    "tied-whole": ("llama-gqa", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                                 "ensure_weight_tying": True}),
    "bias": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "all-biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}),
    "embedding": ("llama-untied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied-embedding": ("llama-gqa", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "neox": ("gpt_neox", {"target_modules": ["query_key_value", "lm_head"], "use_dora": True}),
    "gaussian": ("qwen3", {"target_modules": "all-linear", "init_lora_weights": "gaussian", "use_rslora": True}),
}  # fmt: skip


@pytest.mark.parametrize("choice", PEFT)
def test_what_peft_saves_loads_here(tmp_path: Path, choice: str) -> None:
    name, settings = PEFT[choice]
    base = interop.write_base(tmp_path / "base", MODELS.get(name) or interop.CASES[name])
    expected = interop.write_peft(tmp_path / "adapter", base, **settings)
    figures = interop.from_library(base, tmp_path / "adapter", expected)
    assert all(figure <= GATE for figure in figures.values()), figures
    config = model_folder.read_config(base)
    found = adapter_folder.read_adapter(tmp_path / "adapter", base, config)
    assert adapters.targets(config, adapter_folder.to_config(found, config)).keys() == found.targets.keys()


MLX_LM: dict[str, tuple[str, dict[str, Any]]] = {
    "keys": ("llama-gqa", {"keys": ["self_attn.q_proj", "mlp.down_proj"], "scale": 20.0}),
    "last": ("gpt2", {"layers": 1}),
    "dora": ("qwen3", {"method": "dora", "keys": ["self_attn.k_proj"]}),
    "embedding": ("llama-gqa", {"keys": ["self_attn.q_proj", "model.embed_tokens"]}),
    "dora-embedding": ("llama-gqa", {"method": "dora", "keys": ["model.embed_tokens"]}),
    "head": ("llama-untied", {"keys": ["lm_head"]}),
}


@pytest.mark.parametrize("choice", MLX_LM)
def test_what_mlx_lm_saves_loads_here(tmp_path: Path, choice: str) -> None:
    name, settings = MLX_LM[choice]
    base = interop.write_base(tmp_path / "base", interop.CASES[name])
    expected = interop.write_mlx_lm(tmp_path / "adapter", base, **settings)
    figures = interop.from_library(base, tmp_path / "adapter", expected)
    assert all(figure <= GATE for figure in figures.values()), figures


def test_the_old_npz_loads_and_says_what_it_cannot_know(tmp_path: Path) -> None:
    base = interop.write_base(tmp_path / "base", interop.CASES["llama-gqa"])
    place = tmp_path / "adapter"
    expected = interop.write_mlx_lm(place, base, keys=["self_attn.q_proj"])
    tensors: dict[str, Any] = model_folder.read_tensors(place / "adapters.safetensors")
    np.savez(place / "adapters.npz", **tensors)
    (place / "adapters.safetensors").unlink()
    values = json.loads((place / "adapter_config.json").read_text())
    values["lora_layers"] = values.pop("num_layers")
    (place / "adapter_config.json").write_text(json.dumps(values))
    assert all(figure <= GATE for figure in interop.from_library(base, place, expected).values())
    values["lora_parameters"]["alpha"] = 16
    (place / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"alpha 16 and scale 3.0 disagree, and adapters.npz may mean 3.0 or 12"):
        adapter_folder.read_adapter(place, base, interop.CASES["llama-gqa"])


def test_the_defaults_of_an_older_mlx_lm(tmp_path: Path) -> None:
    """It adapted q_proj and v_proj where keys said nothing, and had an alpha that did nothing."""
    base = interop.write_base(tmp_path / "base", interop.CASES["llama-gqa"])
    place = tmp_path / "adapter"
    expected = interop.write_mlx_lm(place, base, layers=1, keys=["self_attn.q_proj", "self_attn.v_proj"])
    values = json.loads((place / "adapter_config.json").read_text())
    del values["lora_parameters"]["keys"]
    values["lora_parameters"]["alpha"] = 16
    (place / "adapter_config.json").write_text(json.dumps(values))
    assert all(figure <= GATE for figure in interop.from_library(base, place, expected).values())
    found = adapter_folder.read_adapter(place, base, interop.CASES["llama-gqa"])
    assert sorted(found.targets) == ["h.1.attn.q_proj", "h.1.attn.v_proj"]
    assert "alpha = 16 is not used" in found.notes[0]


def test_an_adapter_goes_around_and_comes_back(tmp_path: Path) -> None:
    """PEFT's, read here, written for both, loaded by both, saved by PEFT again: the same logits all the way."""
    base = interop.write_base(tmp_path / "base", MODELS["gpt2"])
    config = MODELS["gpt2"]
    expected = interop.write_peft(
        tmp_path / "peft", base, target_modules=["c_attn"], rank_pattern={"h.0.attn.c_attn": 2}
    )
    (tmp_path / "ours").mkdir()
    adapter_folder.save(tmp_path / "ours", config, adapter_folder.read_adapter(tmp_path / "peft", base, config))
    assert interop.worst("mlx-lm", interop.mlx_lm_logits(base, tmp_path / "ours"), expected) <= GATE
    model, missing, unexpected = interop.peft_load(base, tmp_path / "ours")
    assert not missing
    assert not unexpected
    model.save_pretrained(tmp_path / "again")
    first, last = (
        model_folder.read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again")
    )
    assert first.keys() == last.keys()
    assert all(np.array_equal(first[name], last[name]) for name in first)


Encode = Callable[..., tuple[dict[str, Any], dict[str, np.ndarray]]]


def _unscaled(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    values |= {"lora_alpha": values.get("r", 1), "alpha_pattern": values.get("rank_pattern", {})}
    values.get("lora_parameters", {})["scale"] = 1.0


def _reordered(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    swapped = {"0": "1", "1": "0"}
    old = dict(tensors)
    for name in old:
        layer = next(part for part in name.split(".") if part.isdigit())
        tensors[name] = old[name.replace(f".{layer}.", f".{swapped[layer]}.")]


def _transposed(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    for name in tensors:
        if ".lora_A" in name or name.endswith("lora_a"):
            tensors[name] = tensors[name].T.reshape(tensors[name].shape)


def _without_magnitude(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    for name in list(tensors):
        if name.endswith((".m", "lora_magnitude_vector")):
            del tensors[name]


@pytest.mark.parametrize("break_it", [_unscaled, _reordered, _transposed, _without_magnitude])
@pytest.mark.parametrize("layout", [peft_adapter, mlx_lm_adapter])
def test_mutations_of_the_writer_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any, break_it: Callable[..., None]
) -> None:
    """Each must show in the library's logits, and reading must find that the two files differ."""
    method = "dora" if break_it is _without_magnitude else "lora"
    intact: Encode = layout.encode

    def encode(*args: Any, **more: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        values, tensors = intact(*args, **more)
        break_it(values, tensors)
        return values, tensors

    monkeypatch.setattr(layout, "encode", encode)
    with pytest.raises(UserError, match=r"differ|missing"):
        written(tmp_path, "llama-gqa", method=method)  # which reads it back to fuse it
    monkeypatch.undo()
    broken, good = tmp_path / "adapter", tmp_path / "good"
    good.mkdir()
    made = written(good, "llama-gqa", method=method)
    made = interop.Written(made.config, made.recipe, made.base, broken, made.fused)
    check = interop.to_peft if layout is peft_adapter else interop.to_mlx_lm
    assert check(made) > 100 * GATE


@pytest.mark.parametrize("what", ["scale", "order", "magnitude"])
def test_mutations_of_the_reader_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    base = interop.write_base(tmp_path / "base", MODELS["llama-gqa"])
    expected = interop.write_peft(tmp_path / "adapter", base, target_modules="all-linear", use_dora=what == "magnitude")
    intact = peft_adapter.decode

    def decode(*args: Any) -> Any:
        made = intact(*args)
        if what == "scale":
            made.targets = {p: adapters.Target(t.n_out, t.n_in, t.rank, 1.0 / t.rank) for p, t in made.targets.items()}
        elif what == "order":
            made.params = {f"h.{1 - int(n[2])}{n[3:]}": array for n, array in made.params.items()}
        else:
            made.params = {n: array for n, array in made.params.items() if not n.endswith("magnitude")}
        return made

    monkeypatch.setattr(peft_adapter, "decode", decode)
    figures = interop.from_library(base, tmp_path / "adapter", expected)
    assert all(figure > 100 * GATE for figure in figures.values()), figures


def test_several_adapters_add_up_as_in_peft(tmp_path: Path) -> None:
    base = interop.write_base(tmp_path / "base", MODELS["gpt2"])
    interop.write_peft(tmp_path / "a", base, target_modules=["c_attn"], lora_alpha=4)
    interop.write_peft(tmp_path / "b", base, target_modules=["c_attn", "c_proj"], r=2)
    model, _, _ = interop.peft_load(base, tmp_path / "a")
    model.load_adapter(tmp_path / "b", "second")
    model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "both", "cat")
    model.set_adapter("both")
    expected = interop._torch_logits(model)
    given = [(tmp_path / "a", 1.0), (tmp_path / "b", 0.5)]
    for package in (interop.mlxgpt, interop.torch_ref):
        assert interop.worst(package.__name__, interop.our_logits(package, base, given), expected) <= GATE
    interop.fuse(base, given, tmp_path / "fused")
    assert interop.worst("fused", interop.transformers_logits(tmp_path / "fused"), expected) <= GATE


def test_a_stale_file_is_named(tmp_path: Path) -> None:
    made = written(tmp_path, "gpt2")
    other = tmp_path / "other"
    other.mkdir()
    again = written(other, "gpt2", alpha=8.0)
    shutil.copy(again.adapter / "adapters.safetensors", made.adapter / "adapters.safetensors")
    assert adapter_folder.read_adapter(made.adapter, made.base, made.config).targets  # the same tensors
    tensors = model_folder.read_tensors(made.adapter / "adapters.safetensors")
    name = next(iter(tensors))
    model_folder.write_tensors(made.adapter / "adapters.safetensors", tensors | {name: tensors[name] * 2})
    with pytest.raises(UserError, match=r"adapters.safetensors and adapter_model.safetensors differ in h\.\d"):
        adapter_folder.read_adapter(made.adapter, made.base, made.config)


def test_peft_is_the_version_whose_layout_is_written() -> None:
    assert peft.LoraConfig().ensure_weight_tying is False
