"""Quantized bases: mlx-lm's folders give mlx-lm's logits, and adapters train on them alike in both frameworks."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import PACKAGES, engine, moved, probe, recipe
from compare import agree, worst_gradient
from models import CASES, tiny, weights

from convert import conversion  # noqa: F401
from mlxgpt.common.folders import model_folder

# isort: split
import mlx.core as mx


def quantized_by_mlx_lm(case: str, place: Path, bits: int, overrides: bool = False) -> Any:
    """Writes a model's folder, and has mlx-lm quantize it; returns mlx-lm's model."""

    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model_folder.write_model(place / "plain", CASES[case], weights(CASES[case]))
    model, read = load_model(place / "plain")

    def choose(path: str, module: Any) -> bool | dict[str, Any]:
        if not overrides:
            return True
        if path.endswith("v_proj"):
            return {"group_size": 32, "bits": 8, "mode": "affine"}
        return not path.endswith("o_proj")

    model, read = quantize_model(model, read, 32, bits, quant_predicate=choose)
    (place / "quantized").mkdir()
    save_model(place / "quantized", model)
    save_config(read, place / "quantized" / "config.json")
    return model


WIDE = {
    "llama": tiny(family="llama", n_embd=64, n_hidden=96),
    "qwen3": tiny(family="qwen3", n_embd=64, n_hidden=96, n_kv_head=2, head_dim=16, tied=False),
    "gpt2": tiny(family="gpt2", n_embd=64),
}


@pytest.fixture(autouse=True)
def wide_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose matrices groups of 32 divide."""
    for name, config in WIDE.items():
        monkeypatch.setitem(CASES, name, config)


@pytest.mark.parametrize(
    ("case", "bits", "overrides"), [("llama", 4, False), ("qwen3", 8, True), ("llama", 4, True), ("gpt2", 4, False)]
)
def test_a_folder_of_mlx_lm_gives_its_logits(case: str, bits: int, overrides: bool, tmp_path: Path) -> None:
    theirs = quantized_by_mlx_lm(case, tmp_path, bits, overrides)
    tokens = np.arange(40).reshape(2, 20) % 80
    expected = np.array(theirs(mx.array(tokens)))
    for package in PACKAGES:
        for dequantize in ("auto", "never"):
            load = importlib.import_module(f"{package}.load").load
            model, _ = load(tmp_path / "quantized", device="cpu", dequantize=dequantize)
            given = mx.array(tokens) if package == "mlxgpt" else importlib.import_module("torch").from_numpy(tokens)
            found = model(given)
            found = np.array(found) if package == "mlxgpt" else found.detach().numpy()
            agree(f"{package}, {dequantize}", found, expected, 1e-5)


@pytest.mark.parametrize(
    "choice", [{}, {"method": "dora"}, {"init": "pissa"}, {"targets": ("all-linear", "wte"), "method": "dora"}]
)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_quantized_path_is_the_dequantized_one(case: str, choice: dict[str, Any]) -> None:
    config = recipe(case, bits=4, group_size=32, dequantize="never", **choice)
    assert config.adapter is not None
    once = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, dequantize="auto"))
    params = moved(config)
    judge = probe("torch_ref", once, params)
    for package in PACKAGES:
        for each in (config, once):
            trained = engine(package, each, params)
            assert ("stay quantized" in trained.note) == (each is config)
            found = probe(package, each, params)
            agree("logits", found.logits, judge.logits, 1e-5)
            assert worst_gradient("gradient", found.gradients, judge.gradients) <= 1e-5
