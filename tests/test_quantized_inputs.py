"""Weights that others quantized: fp8 and mlx-lm's small floats are read exactly, all else is refused by its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.utils
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from models import tiny, weights
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from convert import convert as convert_model
from convert import open_model
from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.folders.mlx_lm_names import names
from mlxgpt.common.model import families, float_blocks
from mlxgpt.load import load as mlx_load
from torch_ref.load import load as torch_load

CONFIG = tiny(family="llama", n_embd=64, n_hidden=160, tied=False)
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Path:
    """The model before it is quantized; not to be changed."""
    place = tmp_path_factory.mktemp("plain") / "m"
    model_folder.write_model(place, CONFIG, weights(CONFIG))
    return place


def changed(plain: Path, place: Path, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A copy with other keys in config.json, and other tensors or more."""
    shutil.copytree(plain, place)
    read = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(read | values))
    held = load_file(place / model_folder.SINGLE) | tensors
    save_file(held, place / model_folder.SINGLE, metadata={"format": "pt"})
    return place


def holds(place: Path, expected: dict[str, np.ndarray]) -> None:
    """Both readers give these values by the names of the family's files, bit for bit, and the folder converts."""
    config = model_folder.read_config(place)
    found, opened = model_folder.read_params(place, config), open_model(place)
    for name, array in found.items():
        foreign = families.to_foreign(config, name)[0]
        assert np.array_equal(array, expected[foreign]) and np.array_equal(opened.tensors[name].read(), array), name
    assert any("are read as float32" in note and "exactly" in note for note in opened.notes)
    convert_model(place, place.with_name("plain"), hash=False)
    back = model_folder.read_params(place.with_name("plain"), config)
    assert all(np.array_equal(back[name], array) for name, array in found.items())


# what is read


def fp8(state: dict[str, torch.Tensor], block: tuple[int, int] | None, kind: torch.dtype) -> Any:
    """The matrices of the blocks as codes with scales of ``kind``, and what transformers makes of each."""
    stored: dict[str, torch.Tensor] = {}
    expected = {name: tensor.numpy() for name, tensor in state.items()}
    for name in (name for name in state if name.endswith("_proj.weight")):
        w = state[name]
        high, wide = block or (1, w.shape[1]) if block != (0, 0) else w.shape
        grid = -(-w.shape[0] // high), -(-w.shape[1] // wide)
        whole = torch.zeros(grid[0] * high, grid[1] * wide)
        whole[: w.shape[0], : w.shape[1]] = w
        tiles = whole.view(grid[0], high, grid[1], wide)
        scales = tiles.abs().amax((1, 3)) / 448
        if kind == torch.float8_e8m0fnu:
            scales = torch.exp2(torch.ceil(torch.log2(scales)))
        scales = scales.to(kind)
        codes = (tiles / scales.float()[:, None, :, None]).clamp(-448, 448).reshape(whole.shape).to(torch.float8_e4m3fn)
        expected[name] = Fp8Dequantize(None)._dequantize_one(codes, scales.float())[: w.shape[0], : w.shape[1]].numpy()
        stored[name], stored[f"{name}_scale"] = codes[: w.shape[0], : w.shape[1]].contiguous(), scales
    return stored, expected


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
FLOAT8 = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}, "targets": ["Linear"]}
FP8 = {
    "blocks": ((32, 32), torch.float32, "_scale_inv", BLOCKS),
    "blocks cut short": ((48, 48), torch.float32, "_scale_inv", BLOCKS | {"weight_block_size": [48, 48]}),
    "one block": ((128, 128), torch.float32, "_scale_inv", BLOCKS | {"weight_block_size": [128, 128]}),
    "blocks of bfloat16 scales": ((32, 32), torch.bfloat16, "_scale_inv", BLOCKS),
    "blocks of powers of two": ((32, 32), torch.float8_e8m0fnu, "_scale_inv", BLOCKS | {"scale_fmt": "ue8m0"}),
    "blocks that nothing says": ((32, 32), torch.float32, "_scale_inv", None),
    "a scale a row": (None, torch.float32, "_scale", {"quant_method": "fbgemm_fp8"}),
    "compressed-tensors": (
        None, torch.bfloat16, "_scale",
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": FLOAT8}},
    ),
    "one scale": ((0, 0), torch.float32, "_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FP8)
def test_fp8_with_scales_is_what_transformers_makes_of_it(kind: str, plain: Path, tmp_path: Path) -> None:
    block, dtype, end, scheme = FP8[kind]
    stored, expected = fp8(load_file(plain / model_folder.SINGLE), block, dtype)
    stored = {name.replace("weight_scale", f"weight{end}"): tensor for name, tensor in stored.items()}
    if kind == "one scale":
        stored = {name: t.reshape(()) if name.endswith("_scale") else t for name, t in stored.items()}
    stored |= {f"{LAYER}.input_scale": torch.ones(()), "model.layers.1.self_attn.k_scale": torch.ones(())}
    holds(changed(plain, tmp_path / "q", {"quantization_config": scheme}, stored), expected)


def test_fp8_in_a_pickled_file(plain: Path, tmp_path: Path) -> None:
    stored, expected = fp8(load_file(plain / model_folder.SINGLE), (32, 32), torch.float32)
    stored = {name.replace("weight_scale", "weight_scale_inv"): tensor for name, tensor in stored.items()}
    place = changed(plain, tmp_path / "q", {"quantization_config": BLOCKS}, stored)
    torch.save(load_file(place / model_folder.SINGLE), place / "pytorch_model.bin")
    (place / model_folder.SINGLE).unlink()
    opened = open_model(place)
    for name, tensor in opened.tensors.items():
        assert np.array_equal(tensor.read(), expected[families.to_foreign(CONFIG, name)[0]]), name


def test_codes_of_five_exponent_bits(plain: Path, tmp_path: Path) -> None:
    codes = load_file(plain / model_folder.SINGLE)[f"{LAYER}.weight"].to(torch.float8_e5m2)
    stored = {f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": torch.tensor([0.3])}
    place = changed(plain, tmp_path / "q", {"quantization_config": {"quant_method": "fp8"}}, stored)
    found = model_folder.read_params(place, model_folder.read_config(place))["h.0.mlp.c_fc.weight"]
    assert np.array_equal(found, (codes.float() * 0.3).numpy())


@pytest.mark.parametrize("mode", float_blocks.MODES)
def test_small_floats_of_mlx_lm_are_what_mlx_makes_of_them(mode: str, plain: Path, tmp_path: Path) -> None:
    bits, group = float_blocks.MODES[mode]
    model, config = load_model(plain)
    model, config = quantize_model(model, config, group, bits, mode=mode)
    save_model(tmp_path / "q", model)
    save_config(config, config_path=tmp_path / "q" / "config.json")
    held = dict(mlx.utils.tree_flatten(model.parameters()))
    expected = {}
    for name in names(CONFIG):
        scales = held.get(f"{name.removesuffix('weight')}scales")
        options: Any = dict(group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        expected[name] = np.array(held[name] if scales is None else mx.dequantize(held[name], scales, **options))
    assert sum(f"{name.removesuffix('weight')}scales" in held for name in expected) == 16
    holds(tmp_path / "q", expected)
    if mode == "mxfp4":
        tokens = [[1, 5, 79, 3]]
        theirs = np.array(model(mx.array(tokens)))
        scale = np.abs(theirs).max()
        assert (
            np.abs(np.array(mlx_load(tmp_path / "q", device="cpu")[0](mx.array(tokens))) - theirs).max() < 1e-4 * scale
        )
        ours = torch_load(tmp_path / "q", device="cpu")[0](torch.tensor(tokens)).detach().numpy()
        assert np.abs(ours - theirs).max() < 1e-4 * scale


# what is refused

NAMED = {
    "GPTQ, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "AWQ, 4 bits": {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"},
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "bitsandbytes, 8 bits": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "compressed-tensors, pack-quantized": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "compressed-tensors, nvfp4-pack-quantized": {"format": "nvfp4-pack-quantized", "config_groups": {}},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": []},
    "nvfp4": {"quant_method": "nvfp4"},
    "modelopt, NVFP4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "HQQ": {"quant_method": "hqq", "quant_config": {}},
    "Quark": {"quant_method": "quark"},
    "EETQ": {"quant_method": "eetq", "weights": "int8"},
    "AQLM": {"quant_method": "aqlm"},
    "torchao": {"quant_method": "torchao", "quant_type": {}},
    "something-new": {"quant_method": "something-new"},
    "a method that is not named": {"foo": 1},
}
MATRIX = torch.zeros(160, 8, dtype=torch.int32)
TENSORS: dict[str, dict[str, torch.Tensor]] = {
    "GPTQ": {"qweight": torch.zeros(8, 160, dtype=torch.int32), "scales": torch.ones(1, 160)},
    "AWQ": {"qweight": torch.zeros(64, 20, dtype=torch.int32), "scales": torch.ones(1, 160)},
    "bitsandbytes, 4 bits": {"weight": torch.zeros(5120, 1, dtype=torch.uint8), "weight.absmax": torch.ones(80)},
    "bitsandbytes, 8 bits": {"weight": torch.zeros(160, 64, dtype=torch.int8), "SCB": torch.ones(160)},
    "compressed-tensors": {"weight_packed": MATRIX, "weight_scale": torch.ones(160, 1)},
    "compressed-tensors, nvfp4": {"weight_packed": MATRIX, "weight_global_scale": torch.ones(1)},
    "modelopt, nvfp4": {"weight": MATRIX, "weight_scale_2": torch.ones(1)},
    "mxfp4": {"weight_blocks": MATRIX, "weight_scales": MATRIX + 0},
    "HQQ": {"W_q": MATRIX},
    "EETQ": {"weight": torch.zeros(160, 64, dtype=torch.int8), "weight_scales": torch.ones(160)},
    "AQLM": {"codes": MATRIX, "codebooks": MATRIX + 0},
    "torchao or quanto": {"weight._data": MATRIX},
    "fp8 without scales": {"weight": torch.zeros(160, 64).to(torch.float8_e4m3fn)},
}
GPTQ = NAMED["GPTQ, 4 bits"]


def refused(place: Path, message: str, tmp_path: Path, capsys: Any, *verbs: list[str]) -> None:
    """The verbs say so in one line, exit with 2 and make nothing; so does the reader that both frameworks use."""
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        model_folder.read_config(place)
    before = sorted(tmp_path.rglob("*"))
    for command in (["convert", str(place), str(tmp_path / "b")], *verbs):
        capsys.readouterr()
        assert cli.main(command) == 2, command
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and message in err, (command, err)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", NAMED)
def test_a_method_of_config_json_is_named(method: str, plain: Path, tmp_path: Path, capsys: Any) -> None:
    place = changed(plain, tmp_path / "q", {"quantization_config": NAMED[method]}, {})
    message = f"quantization_config: weights quantized by {method} are not supported: expected float32"
    refused(place, message, tmp_path, capsys)


def test_every_verb_names_the_method(plain: Path, tmp_path: Path, capsys: Any) -> None:
    place, rows = changed(plain, tmp_path / "q", {"quantization_config": GPTQ}, {}), tmp_path / "rows.jsonl"
    rows.write_text('{"text": "abc"}\n')
    verbs = [["verify", str(plain), str(place)], ["plan", "--model", str(place)]]
    verbs += [["generate", "--model", str(place), "-p", "x"], ["eval", "--model", str(place), "-d", str(rows)]]
    verbs += [["finetune", "--model", str(place), "--data", str(rows), "--out", str(tmp_path / "run")]]
    refused(place, "weights quantized by GPTQ, 4 bits are not supported", tmp_path, capsys, *verbs)


@pytest.mark.parametrize("method", TENSORS)
def test_tensors_tell_the_method_where_config_json_does_not(
    method: str, plain: Path, tmp_path: Path, capsys: Any
) -> None:
    stored = {f"{LAYER}.{leaf}": tensor for leaf, tensor in TENSORS[method].items()}
    refused(
        changed(plain, tmp_path / "q", {}, stored), f"weights quantized by {method} are not supported", tmp_path, capsys
    )


def test_a_file_beside_config_json_tells_it_too(plain: Path, tmp_path: Path, capsys: Any) -> None:
    place = changed(plain, tmp_path / "q", {}, {})
    scheme = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (place / "hf_quant_config.json").write_text(json.dumps(scheme))
    refused(place, "hf_quant_config.json: quantization: weights quantized by modelopt, NVFP4", tmp_path, capsys)


CODES = torch.zeros(160, 64).to(torch.float8_e4m3fn)
WRONG: list[tuple[dict[str, torch.Tensor], str]] = [
    ({}, "config.json says that weights are quantized, but no tensor is"),
    ({"weight": CODES, "weight_scale_inv": torch.ones(3, 2)}, "found F32 [3, 2] for [160, 64]"),
    ({"weight": CODES, "weight_scale_inv": torch.ones(5, 4)}, "expected floats that divide it in blocks of 32 x 32"),
    ({"weight": CODES, "weight_scale": torch.ones(5, 2, dtype=torch.int32)}, "found I32 [5, 2]"),
    ({"weight": CODES, "weight_scale": torch.ones(1), "weight_zero_point": torch.ones(1)}, "weight_zero_point"),
    ({"weight": torch.full((160, 64), torch.nan).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}, "not finite"),
]


@pytest.mark.parametrize(("tensors", "message"), WRONG)
def test_fp8_that_does_not_hold_is_refused(
    tensors: dict[str, torch.Tensor], message: str, plain: Path, tmp_path: Path, capsys: Any
) -> None:
    stored = {f"{LAYER}.{leaf}": tensor for leaf, tensor in tensors.items()}
    place = changed(plain, tmp_path / "q", {"quantization_config": BLOCKS}, stored)
    assert cli.main(["convert", str(place), str(tmp_path / "b")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err and [path.name for path in tmp_path.iterdir()] == ["q"]
