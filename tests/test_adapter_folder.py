"""Reading adapter folders: what is damaged, hostile, unsupported or of another model is one line that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interop
import numpy as np
import pytest
from fuzz_damage import SWAPS
from interop import MODELS, written
from mlx.utils import tree_flatten
from models import CASES, weights

import mlxgpt.load
import torch_ref.load
from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, base_and_adapters, model_folder, peft_adapter
from mlxgpt.common.model import adapters

Tensors = dict[str, np.ndarray]
NAME = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> interop.Written:
    """A base, and an adapter of c_attn for it."""
    return written(tmp_path_factory.mktemp("made"), "gpt2", targets=("c_attn",))


def damaged(place: Path, made: interop.Written, change: Callable[[dict[str, Any], Tensors], Any], layout: str) -> Path:
    """A copy of the adapter in one layout, changed."""
    shutil.copytree(made.adapter, place)
    file = "adapter_model.safetensors" if layout == "peft" else "adapters.safetensors"
    (place / ("adapters.safetensors" if layout == "peft" else "adapter_model.safetensors")).unlink()
    values, tensors = json.loads((place / "adapter_config.json").read_text()), model_folder.read_tensors(place / file)
    change(values, tensors)
    (place / "adapter_config.json").write_text(json.dumps(values))
    model_folder.write_tensors(place / file, tensors)
    return place


def rename(tensors: Tensors, old: str, new: str) -> None:
    for name in list(tensors):
        if old in name:
            tensors[name.replace(old, new)] = tensors.pop(name)


PEFT: list[tuple[str, Callable[[dict[str, Any], Tensors], Any], str]] = [
    ("ia3", lambda v, t: v.update(peft_type="IA3"), "peft_type 'IA3' is not supported: expected 'LORA'"),
    ("prefix", lambda v, t: v.update(peft_type="PREFIX_TUNING"), "peft_type 'PREFIX_TUNING'"),
    ("none", lambda v, t: v.pop("peft_type"), "peft_type None"),
    ("lora_bias", lambda v, t: v.update(lora_bias=True), "lora_bias = True is not supported"),
    ("moe", lambda v, t: v.update(target_parameters=["experts.gate"]), "target_parameters = "),
    ("tokens", lambda v, t: v.update(trainable_token_indices=[1]), "trainable_tokens_delta of wte is missing"),
    ("future", lambda v, t: v.update(use_warp=True), "use_warp = True is not supported"),
    ("pissa", lambda v, t: v.update(init_lora_weights="pissa"), "init_lora_weights 'pissa' changes the base model"),
    ("rank", lambda v, t: v.update(r=3), r"lora_a of h.0.attn.c_attn has shape \[4, 48\], expected \[3, 48\]"),
    ("rank-0", lambda v, t: v.update(r=0), "r = 0: expected a positive number"),
    ("rank-true", lambda v, t: v.update(r=True), "r = True"),
    ("rank-huge", lambda v, t: v.update(r=2**40), "r = 1099511627776"),
    ("alpha", lambda v, t: v.update(lora_alpha="16"), "lora_alpha = '16'"),
    ("alpha-nan", lambda v, t: v.update(lora_alpha=float("nan")), "lora_alpha = nan"),
    ("pattern", lambda v, t: v.update(rank_pattern={"c_attn": -1}), "rank_pattern: expected positive numbers"),
    ("pattern-list", lambda v, t: v.update(alpha_pattern=[1]), "alpha_pattern: expected positive numbers by name"),
    ("pattern-regex", lambda v, t: v.update(rank_pattern={"(": 4}), "'.*' is not a regular expression"),
    ("regex", lambda v, t: v.update(target_modules="("), "'\\(' is not a regular expression"),
    ("targets", lambda v, t: v.update(target_modules=7), "target_modules: expected names"),
    ("more", lambda v, t: v.update(target_modules=["c_attn", "c_fc"]), "lora_a of transformer.h.0.mlp.c_fc is missing"),
    ("fewer", lambda v, t: v.update(target_modules=["c_fc"]), "unexpected tensor transformer.h.0.attn.c_attn.lora_a"),
    ("layers", lambda v, t: v.update(layers_to_transform="all"), "layers_to_transform: expected numbers"),
    ("norm", lambda v, t: v.update(target_modules=["c_attn", "ln_1"]), "lora_a of transformer.h.0.ln_1 is missing"),
    ("bias", lambda v, t: v.update(bias="some"), "bias = 'some': expected none, all or lora_only"),
    ("missing", lambda v, t: t.pop(NAME), "lora_a of transformer.h.0.attn.c_attn is missing"),
    ("unknown", lambda v, t: t.update({"x.lora_A.weight": np.zeros((4, 48), "f4")}), "unexpected tensor x.lora_A"),
    ("layer-9", lambda v, t: rename(t, ".h.1.", ".h.9."), "no module of this model has it"),
    ("whole", lambda v, t: t.update({"base_model.model.transformer.ln_f.weight": np.ones(48, np.float32)}),
     "modules_to_save does not name it"),
    ("whole-missing", lambda v, t: v.update(modules_to_save=["ln_f"]), "transformer.ln_f.weight is missing"),
    ("a-bias", lambda v, t: t.update({NAME.replace("lora_A.weight", "base_layer.bias"): np.ones(144, np.float32)}),
     "bias is none"),
    ("nan", lambda v, t: t.update({NAME: np.full_like(t[NAME], np.nan)}), "lora_a has values that are not finite"),
    ("whole-numbers", lambda v, t: t.update({NAME: np.zeros((4, 48), np.int32)}), "has dtype int32"),
    ("magnitude", lambda v, t: t.update({NAME.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(144, "f4")}),
     "unexpected magnitude"),
    ("dora", lambda v, t: v.update(use_dora=True), "magnitude of transformer.h.0.attn.c_attn is missing"),
    ("own", lambda v, t: v.update(mlxgpt=3), "mlxgpt: expected a table with format_version 1"),
    ("own-newer", lambda v, t: v["mlxgpt"].update(format_version=9), "expected a table with format_version 1"),
    ("own-vocab", lambda v, t: v["mlxgpt"].update(vocab_size="80"), "mlxgpt.vocab_size: expected int"),
    ("own-vocab-huge", lambda v, t: v["mlxgpt"].update(vocab_size=10**15), "mlxgpt.vocab_size"),
    ("own-adapter", lambda v, t: v["mlxgpt"]["adapter"].update(warp=1), "mlxgpt.adapter.warp = 1 is not understood"),
    ("own-rank", lambda v, t: v["mlxgpt"]["adapter"].update(rank=0), "adapter.rank = 0"),
    ("own-pissa", lambda v, t: v["mlxgpt"].update(pissa=1), "mlxgpt.pissa: expected bool"),
    ("own-hash", lambda v, t: v["mlxgpt"].update(base_sha256="0" * 64), "was trained on a model with sha256 0000"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), [case[1:] for case in PEFT], ids=[case[0] for case in PEFT])
def test_pefts_layout(tmp_path: Path, made: interop.Written, change: Any, said: str) -> None:
    place = damaged(tmp_path / "adapter", made, change, "peft")
    with pytest.raises(UserError, match=said):
        adapter_folder.read_adapter(place, made.base, made.config)


def lora(**change: Any) -> Callable[[dict[str, Any], Tensors], Any]:
    return lambda v, t: v["lora_parameters"].update(change)


A = "model.h.0.attn.c_attn.lora_a"
MLX_LM: list[tuple[str, Callable[[dict[str, Any], Tensors], Any], str]] = [
    ("full", lambda v, t: v.update(fine_tune_type="full"), "fine_tune_type 'full' is not supported"),
    ("no-parameters", lambda v, t: v.pop("lora_parameters"), "lora_parameters is missing"),
    ("no-scale", lambda v, t: v["lora_parameters"].pop("scale"), "lora_parameters.scale = None"),
    ("scale", lora(scale=float("inf")), "lora_parameters.scale = inf"),
    ("scale-0", lora(scale=0), "lora_parameters.scale = 0"),
    ("rank", lora(rank=3), r"lora_a of model.h.0.attn.c_attn has shape \[48, 4\], expected \[48, 3\]"),
    ("rank-text", lora(rank="4"), "lora_parameters.rank = '4'"),
    ("layers", lambda v, t: v.update(num_layers=9), "num_layers = 9, but the model has 2 blocks"),
    ("last", lambda v, t: v.update(num_layers=1), "is not in the last num_layers blocks"),
    ("layers-text", lambda v, t: v.update(num_layers="all"), "num_layers = 'all'"),
    ("keys", lora(keys="attn"), "lora_parameters.keys: expected names"),
    ("more-keys", lora(keys=["attn.c_attn", "mlp.c_fc"]), "lora_a of model.h.0.mlp.c_fc is missing"),
    ("other-keys", lora(keys=["mlp.c_fc"]), "unexpected tensors of model.h.0.attn.c_attn: keys does not name it"),
    ("no-keys", lora(keys=[]), "keys does not name it"),
    ("missing", lambda v, t: t.pop(A), "lora_a of model.h.0.attn.c_attn is missing"),
    ("unknown", lambda v, t: t.update({"model.h.0.x.lora_a": t[A]}), "unexpected tensor model.h.0.x.lora_a"),
    ("weight", lambda v, t: t.update({"model.ln_f.weight": np.ones(48, "f4")}), "unexpected tensor model.ln_f.weight"),
    ("m", lambda v, t: t.update({A.replace("lora_a", "m"): np.ones(144, "f4")}), "unexpected tensor .*.m"),
    ("dora", lambda v, t: v.update(fine_tune_type="dora"), "magnitude of model.h.0.attn.c_attn is missing"),
    ("transposed", lambda v, t: t.update({A: t[A].T}), r"has shape \[4, 48\], expected \[48, 4\]"),
    ("nan", lambda v, t: t.update({A: np.full_like(t[A], np.inf)}), "not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), [case[1:] for case in MLX_LM], ids=[case[0] for case in MLX_LM])
def test_mlx_lms_layout(tmp_path: Path, made: interop.Written, change: Any, said: str) -> None:
    place = damaged(tmp_path / "adapter", made, change, "mlx-lm")
    with pytest.raises(UserError, match=said):
        adapter_folder.read_adapter(place, made.base, made.config)


def test_an_adapter_of_other_weights_is_refused_by_their_hash(tmp_path: Path, made: interop.Written) -> None:
    model_folder.write_model(tmp_path / "other", made.config, weights(made.config, seed=2))
    with pytest.raises(UserError, match=r"was trained on a model with sha256 \w{12}, but .*other has \w{12}.*--force"):
        adapter_folder.read_adapter(made.adapter, tmp_path / "other", made.config)
    assert adapter_folder.read_adapter(made.adapter, tmp_path / "other", made.config, force=True).targets


def test_an_adapter_of_another_shape_is_refused_with_force_too(tmp_path: Path, made: interop.Written) -> None:
    for name in ("llama", "gpt2-untied"):
        config = CASES[name]
        model_folder.write_model(tmp_path / name, config, weights(config))
        flags = ["--adapter", str(made.adapter), "-o", str(tmp_path / "out")]
        assert cli.main(["fuse", "-m", str(tmp_path / name), *flags]) == 2
    with pytest.raises(UserError, match="no module of this model has it"):
        adapter_folder.read_adapter(made.adapter, tmp_path / "llama", CASES["llama"], force=True)


def test_the_hash_is_of_the_weights_and_not_of_their_files(tmp_path: Path, made: interop.Written) -> None:
    made_of = weights(made.config)
    model_folder.write_model(tmp_path / "shards", made.config, made_of, max_shard=20_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert adapter_folder.base_sha256(tmp_path / "shards") == adapter_folder.base_sha256(made.base)
    model_folder.write_model(tmp_path / "half", made.config, made_of, dtype="bfloat16")
    assert adapter_folder.base_sha256(tmp_path / "half") != adapter_folder.base_sha256(made.base)
    shutil.copytree(made.base, tmp_path / "one")
    tensors = model_folder.read_tensors(tmp_path / "one" / "model.safetensors")
    tensors["h.1.ln_2.bias"][7] += 1e-6
    model_folder.write_tensors(tmp_path / "one" / "model.safetensors", tensors)
    assert adapter_folder.base_sha256(tmp_path / "one") != adapter_folder.base_sha256(made.base)


def test_a_base_that_is_gone_is_named_and_another_may_be_given(tmp_path: Path, made: interop.Written) -> None:
    shutil.copytree(made.adapter, tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"its base is gone: .*gone: no such folder; --model BASE --adapter"):
        base_and_adapters.find_base(tmp_path / "adapter")
    assert base_and_adapters.find_base(made.base, tmp_path / "adapter") == (made.base, [(tmp_path / "adapter", 1.0)])


def test_weights_of_adapters_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "a:0.5").mkdir()
    assert base_and_adapters.parse_adapters([f"{tmp_path}/a:0.5", "b:0.25", "c:-1", "d"]) == [
        (f"{tmp_path}/a:0.5", 1.0), ("b", 0.25), ("c", -1.0), ("d", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox"])
def test_settings_made_of_a_foreign_adapter_give_its_targets_again(tmp_path: Path, name: str) -> None:
    config = MODELS[name]
    base = interop.write_base(tmp_path / "base", config)
    odd = next(name for name, path in peft_adapter.modules(config).items() if path == "h.1.mlp.c_proj")
    settings: dict[str, Any] = {"rank_pattern": {odd: 2}, "alpha_pattern": {odd: 3}}
    interop.write_peft(tmp_path / "a", base, target_modules="all-linear", **settings)
    found = adapter_folder.read_adapter(tmp_path / "a", base, config)
    again = adapter_folder.to_config(found, config)
    assert adapters.targets(config, again) == found.targets
    assert len(again.ranks) == len(again.alphas) == 1


FILES = ("adapter_model.safetensors", "adapters.safetensors", "adapter_config.json")


def test_damaged_bytes_are_errors_and_nothing_else(tmp_path: Path, made: interop.Written) -> None:
    """Truncated anywhere, bytes flipped, headers that lie: a line or, where nothing that counts changed, an adapter."""
    drawn = np.random.default_rng(0)
    place = tmp_path / "adapter"
    refused = 0
    for turn in range(240):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(made.adapter, place)
        file = place / FILES[turn % 3]
        data = bytearray(file.read_bytes())
        header = min(len(data), 8 + int.from_bytes(data[:8], "little")) if file.suffix == ".safetensors" else len(data)
        kind = turn // 3 % 4
        if kind == 0:
            del data[int(drawn.integers(len(data))) :]
        elif kind == 1:
            data[int(drawn.integers(header))] ^= 1 << int(drawn.integers(8))
        elif kind == 2:
            at = int(drawn.integers(header))
            data[at:at] = bytes(drawn.integers(32, 127, size=4, dtype=np.uint8))
        else:
            number = [m for m in range(header) if chr(data[m]).isdigit()]
            data[number[int(drawn.integers(len(number)))]] = ord(str(drawn.integers(10)))
        file.write_bytes(data)
        try:
            adapter_folder.read_adapter(place, made.base, made.config)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150


def test_hostile_settings_are_errors_and_nothing_else(tmp_path: Path, made: interop.Written) -> None:
    """Every value of adapter_config.json, one after the other, is anything at all."""
    place = tmp_path / "adapter"
    shutil.copytree(made.adapter, place)
    intact = json.loads((place / "adapter_config.json").read_text())
    tables = [(), ("mlxgpt",), ("mlxgpt", "adapter"), ("lora_parameters",)]
    refused = 0
    for path in tables:
        for key in dict(_at(intact, path)):
            for value in SWAPS:
                values = json.loads(json.dumps(intact))
                _at(values, path)[key] = value
                (place / "adapter_config.json").write_text(json.dumps(values))
                try:
                    adapter_folder.read_adapter(place, made.base, made.config)
                except UserError:
                    refused += 1
    assert refused > 500


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def test_of_a_loaded_adapter_its_own_tensors_train_in_both(tmp_path: Path) -> None:
    made = written(tmp_path, "gpt2", targets=("c_attn",), train=("ln_f",))
    one, other = mlxgpt.load.load(made.adapter)[0], torch_ref.load.load(made.adapter)[0]
    trained = {name for name, _ in tree_flatten(one.trainable_parameters())}
    assert trained == {name for name, each in other.named_parameters() if each.requires_grad}
    kinds = {name.rpartition(".")[2] for name in trained if not name.startswith("ln_f.")}
    assert kinds == {"lora_a", "lora_b"} and {"ln_f.weight", "ln_f.bias"} < trained
    assert str(one) == str(other) and "of which" in str(one)
