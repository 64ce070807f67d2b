"""Gemma 3's text model out of a folder with vision, and models that are refused by what they are."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import templates
import torch
import transformers
from arriving import TOKENS
from compare import agree
from models import tiny, weights
from safetensors.numpy import load_file, save_file

import mlxgpt.load
import torch_ref.load
from convert.conversion import convert
from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import families, text_part
from mlxgpt.common.sft import template as sft_template
from mlxgpt.common.tokenizers.load import train_tokenizer

TEXT: dict[str, Any] = dict(
    vocab_size=330, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=256, sliding_window=12, query_pre_attn_scalar=20,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    rope_parameters={"full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                     "sliding_attention": dict(rope_type="default", rope_theta=5e3)},
)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of Gemma 3 with vision, tokenizer and chat template, and the model that transformers wrote it from."""
    place = tmp_path_factory.mktemp("vision") / "whole"
    torch.manual_seed(0)
    config: Any = transformers.Gemma3Config
    config = config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=329, boi_token_index=327,
        eoi_token_index=328, eos_token_id=[1, 106],
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(place)
    sft_template.with_chatml(train_tokenizer("bpe", [templates.TEXT], 320)).save(place)
    (place / "preprocessor_config.json").write_text("{}")
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106], "top_k": 64}))
    return place, model


def renamed(place: Path, out: Path) -> Path:
    """The same with the names of transformers 5's modules, as some tools write them, and a config as on the hub."""
    out.mkdir()
    tensors = {
        name.replace("language_model.model.", "model.language_model.")
        if name.startswith("language_model")
        else f"model.{name}": array
        for name, array in load_file(place / "model.safetensors").items()
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    values = json.loads((place / "config.json").read_text())
    kept = {key: values["text_config"][key] for key in TEXT if key not in ("num_attention_heads", "layer_types")}
    kept |= dict(num_attention_heads=4, layer_types=TEXT["layer_types"], model_type="gemma3_text")
    (out / "config.json").write_text(json.dumps(values | {"text_config": kept}))
    return out


@pytest.mark.parametrize("names", ["written", "modules"])
def test_a_folder_with_vision_is_read_as_its_text_model(
    whole: tuple[Path, Any], names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, model = whole
    place = place if names == "written" else renamed(place, tmp_path / "renamed")
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS).long()).logits.numpy()
    config = model_folder.read_config(place)
    assert (config.family, config.window, config.window_layers) == ("gemma3_text", 12, (0, 1))
    assert (config.rope_scaling, config.rope_theta, config.rope_local_theta) == ("linear", 1e6, 5e3)
    agree("MLX", np.array(mlxgpt.load.load(place, device="cpu")[0](mx.array(TOKENS))), expected, 1e-5)
    assert "its vision tower and projector are left out" in capsys.readouterr().err
    found = torch_ref.load.load(place, device="cpu")[0](torch.from_numpy(TOKENS)).detach().numpy()
    agree("torch", found, expected, 1e-5)


def test_what_is_converted_is_a_text_model_with_all_that_belongs_to_it(
    whole: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, model = whole
    assert cli.main(["convert", str(place), str(tmp_path / "text")]) == 0
    said = capsys.readouterr()
    notes = said.out + said.err
    assert "the text model was taken out of Gemma3ForConditionalGeneration" in notes
    assert "left behind: preprocessor_config.json" in notes
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    back, info = load(tmp_path / "text", output_loading_info=True)
    assert type(back).__name__ == "Gemma3ForCausalLM" and not any(info.values())
    ids = torch.from_numpy(TOKENS).long()
    assert torch.equal(back.eval()(ids).logits, model(ids).logits)
    values = json.loads((tmp_path / "text/config.json").read_text())
    assert values["eos_token_id"] == [1, 106] and not {"vision_config", "text_config"} & set(values)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "text" / name).read_bytes() == (place / name).read_bytes(), name
    assert cli.main(["verify", str(place), str(tmp_path / "text"), "--weights-only"]) == 0


def test_it_generates_and_is_fine_tuned_as_it_is(
    whole: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, rows = whole[0], tmp_path / "rows.jsonl"
    assert cli.main(["generate", "-m", str(place), "--prompt", "a park", "--max-tokens", "3", "--device", "cpu"]) == 0
    rows.write_text("".join(json.dumps({"text": f"a park it goes {n}"}) + "\n" for n in range(12)))
    words = [
        "finetune",
        "-m",
        str(place),
        "-d",
        str(rows),
        "-o",
        str(tmp_path / "run"),
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    assert cli.main([*words, "--backend", "torch", "--set", "train.batch_size=2"]) == 0
    assert "the text model was taken out of" in capsys.readouterr().out
    model, _ = mlxgpt.load.load(tmp_path / "run", device="cpu")
    assert model.config.family == "gemma3_text"


MIXTURES = [
    ("mixtral", {"num_local_experts": 8}, "num_local_experts = 8"),
    ("qwen2_moe", {"num_experts": 60}, "num_experts = 60"),
    ("qwen3_moe", {"num_experts_per_tok": 8}, "num_experts_per_tok = 8"),
    ("phimoe", {}, "phimoe"),
    ("deepseek_v3", {"n_routed_experts": 256}, "n_routed_experts = 256"),
    ("gpt_oss", {}, "gpt_oss"),
    ("olmoe", {}, "olmoe"),
    ("granitemoe", {}, "granitemoe"),
    ("llama4", {"text_config": {"model_type": "llama4_text"}}, "llama4_text"),
]


@pytest.mark.parametrize(("kind", "keys", "found"), MIXTURES)
def test_a_mixture_of_experts_is_refused_by_name(kind: str, keys: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError) as caught:
        families.config_from_hf(families.config_to_hf(tiny(family="llama")) | {"model_type": kind} | keys, "c.json")
    said = str(caught.value)
    assert said.startswith(f"c.json: model_type {kind!r} is not supported: {found}")
    assert "mixture of experts, and experts are not read" in said and "\n" not in said


def test_experts_in_a_familys_own_config_are_refused() -> None:
    values = families.config_to_hf(tiny(family="llama"))
    assert families.config_from_hf(values | {"num_local_experts": 0, "num_experts": None}) == tiny(family="llama")
    message = "c.json: num_local_experts = 4 is of a mixture of experts, and experts are not read: expected a llama"
    with pytest.raises(UserError, match=message):
        families.config_from_hf(values | {"num_local_experts": 4}, "c.json")


@pytest.mark.parametrize(
    ("kind", "keys", "found"),
    [
        ("llava", {"vision_config": {}, "text_config": {"model_type": "llama"}}, "beside a text model 'llama'"),
        ("qwen2_vl", {"vision_config": {"depth": 2}}, "vision_config: a model of several parts"),
        ("gemma3n", {"vision_config": {}, "audio_config": {}, "text_config": {"model_type": "gemma3n_text"}},
         "audio_config, vision_config: a model of several parts, beside a text model 'gemma3n_text'"),
        ("mistral3", {"vision_config": {}, "text_config": {"model_type": "mistral"}}, "a text model 'mistral'"),
    ],
)  # fmt: skip
def test_other_models_of_several_parts_are_refused_by_what_they_have(
    kind: str, keys: dict[str, Any], found: str
) -> None:
    with pytest.raises(UserError) as caught:
        families.config_from_hf(text_part.of({"model_type": kind} | keys), "c.json")
    said = str(caught.value)
    assert said.startswith(f"c.json: model_type {kind!r} is not supported: ") and found in said and "\n" not in said


def test_experts_among_the_tensors_are_named(tmp_path: Path) -> None:
    config = tiny(family="llama")
    model_folder.write_model(tmp_path / "m", config, weights(config))
    tensors = load_file(tmp_path / "m/model.safetensors")
    moved = {name.replace(".mlp.", ".block_sparse_moe.experts.0."): array for name, array in tensors.items()}
    save_file(moved, tmp_path / "m/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"block_sparse_moe\.experts\.0\..* is of a mixture of experts"):
        model_folder.read_params(tmp_path / "m", config)
    torch.save({name: torch.from_numpy(array) for name, array in moved.items()}, tmp_path / "alone.pt")
    with pytest.raises(UserError, match=r"alone\.pt: .*experts\.0\..* is of a mixture of experts"):
        convert(tmp_path / "alone.pt", tmp_path / "out")


def test_sizes_that_a_text_config_leaves_out_are_transformers_own() -> None:
    """As google/gemma-3-4b-it says it, but smaller."""
    part = dict(hidden_size=64, intermediate_size=96, model_type="gemma3_text", num_hidden_layers=7,
                rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=12)  # fmt: skip
    values = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": part}
    config: Any = transformers.Gemma3Config(text_config=dict(part))
    theirs = config.text_config.to_dict()
    expected = families.config_from_hf(theirs | {"architectures": ["Gemma3ForCausalLM"]})
    assert families.config_from_hf(text_part.of(values)) == expected
    assert expected.head_dim == 256 and expected.window_layers == (0, 1, 2, 3, 4, 6)
