"""Model folders: what we write loads in transformers and mlx-lm, what they wrote reads back, damage is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from compare import agree
from mlx_lm.utils import load_model
from models import CASES, tiny, weights

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders import model_folder, tensors
from mlxgpt.common.model import families, params

PAIRS = [pytest.param(config, id=name) for name, config in CASES.items()]
TOKENS = [[1, 5, 79, 3, 3, 0, 44, 12]]
SHARD = 60_000


class Ending:
    """A tokenizer that has an end of text and one file."""

    eos_id, ends = 7, frozenset()

    def save(self, place: Path) -> None:
        (place / "tokenizer.json").write_text("{}")


def hf_load(place: Path, **kwargs: Any) -> transformers.PreTrainedModel:
    """transformers' model; every key of the files has been used and none was made up."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(place, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


def edit(place: Path, **change: Any) -> None:
    """Changes keys of config.json; None removes one."""
    values = json.loads((place / "config.json").read_text()) | change
    kept = {key: value for key, value in values.items() if value is not None or key not in change}
    (place / "config.json").write_text(json.dumps(kept))


def edit_weights(place: Path, **change: np.ndarray | None) -> None:
    """Changes tensors of model.safetensors; None removes one."""
    arrays = tensors.read_tensors(place / model_folder.SINGLE)
    for name, array in change.items():
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array
    tensors.write_tensors(place / model_folder.SINGLE, arrays)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A tied gpt2."""
    model_folder.write_model(tmp_path / "m", CASES["gpt2"], weights(CASES["gpt2"]))
    return tmp_path / "m"


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what we write


@pytest.mark.parametrize("config", PAIRS)
@pytest.mark.parametrize("max_shard", [5 * 10**9, SHARD])
def test_transformers_loads_every_bit(config: ModelConfig, max_shard: int, tmp_path: Path) -> None:
    ours = weights(config)
    model_folder.write_model(tmp_path, config, ours, max_shard=max_shard)
    assert (tmp_path / model_folder.INDEX).exists() == (max_shard == SHARD)
    theirs = {str(families.strip(config, name)): value for name, value in hf_load(tmp_path).state_dict().items()}
    for name, value in ours.items():
        foreign, transposed = families.to_foreign(config, name)
        found = theirs.pop(foreign).numpy()
        assert np.array_equal(found.T if transposed else found, value), name
    for name, value in theirs.items():
        assert name == "lm_head.weight" or (name.endswith("bias") and not value.any()), name
    assert model_folder.read_config(tmp_path) == config
    back = model_folder.read_params(tmp_path, config)
    assert list(back) == list(params.table(config))
    assert all(np.array_equal(back[name], value) for name, value in ours.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_files_hold_what_torch_would_round_to(dtype: str, tmp_path: Path) -> None:
    config = CASES["gpt2"]
    ours = weights(config)
    model_folder.write_model(tmp_path, config, ours, dtype=dtype)
    model = hf_load(tmp_path, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    narrow, back = model_folder.read_params(tmp_path, config, dtype=None), model_folder.read_params(tmp_path, config)
    for name, value in ours.items():
        rounded = torch.from_numpy(value).to(getattr(torch, dtype)).float().numpy()
        assert back[name].dtype == np.float32 and np.array_equal(back[name], rounded), name
        assert narrow[name].dtype == model_folder.DTYPES[dtype] and np.array_equal(
            narrow[name].astype(np.float32), rounded
        )


# mlx-lm's gpt2 ties always and knows neither another width of the MLP nor erf; its qwen3 has no attention bias
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-untied", "llama-gqa", "qwen3", "qwen3-untied"])
@pytest.mark.parametrize("max_shard", [5 * 10**9, SHARD])
def test_mlx_lm_loads_the_same_model(name: str, max_shard: int, tmp_path: Path) -> None:
    model_folder.write_model(tmp_path, CASES[name], weights(CASES[name]), max_shard=max_shard)
    model, _ = load_model(tmp_path)
    expected = hf_load(tmp_path)(torch.tensor(TOKENS)).logits.detach().numpy()
    agree(name, np.array(model(mx.array(TOKENS))), expected, 1e-5)


def test_nothing_in_the_config_changes_what_transformers_trains(tmp_path: Path) -> None:
    for name in ("gpt2", "llama", "qwen3"):
        model_folder.write_model(tmp_path / name, CASES[name], weights(CASES[name]))
        model = hf_load(tmp_path / name)
        idle = model(torch.tensor(TOKENS)).logits
        assert torch.equal(model.train()(torch.tensor(TOKENS)).logits, idle), "dropout is on"


def test_the_index_counts_every_shard(tmp_path: Path) -> None:
    config = CASES["llama-gqa"]
    model_folder.write_model(tmp_path, config, weights(config), dtype="bfloat16", max_shard=SHARD)
    index = json.loads((tmp_path / model_folder.INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = [array for file in files for array in tensors.read_tensors(tmp_path / file).values()]
    total = {"total_parameters": params.count(config), "total_size": sum(array.nbytes for array in held)}
    assert index["metadata"] == total and total["total_size"] == 2 * total["total_parameters"]
    for file in files:
        assert tensors.read_header(tmp_path / file)[1] == {"format": "pt"}
        assert sum(array.nbytes for array in tensors.read_tensors(tmp_path / file).values()) <= SHARD


def test_token_ids_come_from_the_tokenizer_and_extra_keys_pass(tmp_path: Path) -> None:
    config = CASES["llama"]
    model_folder.write_model(
        tmp_path / "a", config, weights(config), extra={"note": "x"}, tokenizer=cast(Any, Ending())
    )
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (values["eos_token_id"], values["note"], values["dtype"], values["torch_dtype"]) == (
        7,
        "x",
        "float32",
        "float32",
    )
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "a").eos_token_id == 7
    assert (tmp_path / "a" / "tokenizer.json").exists()
    model_folder.write_model(tmp_path / "b", config, weights(config))
    assert hf_load(tmp_path / "b").generation_config.eos_token_id is None, "llama's own default would stop at id 2"


# what others wrote


@pytest.mark.parametrize("config", PAIRS)
@pytest.mark.parametrize(("dtype", "shard"), [("float32", "5GB"), ("bfloat16", "40KB"), ("float16", "5GB")])
def test_what_transformers_saved_reads_bit_equal(config: ModelConfig, dtype: str, shard: str, tmp_path: Path) -> None:
    config = families.on_disk(config)
    values = families.config_to_hf(config) | {"pad_token_id": None}
    hf = transformers.AutoConfig.for_model(**{key: values[key] for key in values if key != "architectures"})  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(hf).to(getattr(torch, dtype))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert model_folder.read_config(tmp_path) == config
    found = model_folder.read_params(tmp_path, config)
    theirs = {families.strip(config, name): value for name, value in model.state_dict().items()}
    for name, value in found.items():
        foreign, transposed = families.to_foreign(config, name)
        expected = theirs[foreign].float().numpy()
        assert np.array_equal(value, expected.T if transposed else expected), name


def test_old_gpt2_files_read_with_prefix_and_buffers(written: Path) -> None:
    arrays = tensors.read_tensors(written / model_folder.SINGLE)
    old = {f"transformer.{name}": array for name, array in arrays.items()}
    buffers = {"h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32), "h.1.attn.masked_bias": np.array(-1e4, np.float32)}
    for made in (arrays | buffers, old, old | {f"transformer.{name}": array for name, array in buffers.items()}):
        tensors.write_tensors(written / model_folder.SINGLE, made)
        config = model_folder.read_config(written)
        assert config == CASES["gpt2"]
        found = model_folder.read_params(written, config)
        assert all(np.array_equal(found[name], value) for name, value in weights(config).items())
    twice = old | {"ln_f.bias": arrays["ln_f.bias"]}
    tensors.write_tensors(written / model_folder.SINGLE, twice)
    assert (
        refusal(model_folder.read_config, written) == f"{written}: ln_f.bias is there twice, with and without a prefix"
    )


def test_old_llama_buffers_are_ignored(tmp_path: Path) -> None:
    config = CASES["llama"]
    model_folder.write_model(tmp_path, config, weights(config))
    edit_weights(tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)})
    assert model_folder.read_params(tmp_path, model_folder.read_config(tmp_path)).keys() == params.table(config).keys()


def test_the_heads_tensor_decides_whether_it_is_tied(written: Path) -> None:
    table = weights(CASES["gpt2"])["wte.weight"]
    edit(written, tie_word_embeddings=False)
    missing = "expected the head, or tie_word_embeddings = true in config.json for one that is the embedding"
    expected = f"tensor lm_head.weight is missing, and config.json has tie_word_embeddings = false: {missing}"
    assert refusal(model_folder.read_config, written) == f"{written}: {expected}"
    edit(written, tie_word_embeddings=None)
    assert model_folder.read_config(written) == CASES["gpt2"], "gpt2 ties where nothing is said"
    edit(written, tie_word_embeddings=True)
    edit_weights(written, **{"lm_head.weight": table})
    assert model_folder.read_config(written) == CASES["gpt2"]
    assert "lm_head.weight" not in model_folder.read_params(written, CASES["gpt2"])
    edit(written, tie_word_embeddings=False)
    assert not model_folder.read_config(written).tied, "a copy that trains apart"
    edit(written, tie_word_embeddings=True)
    edit_weights(written, **{"lm_head.weight": table + 1})
    config = model_folder.read_config(written)
    assert not config.tied and np.array_equal(model_folder.read_params(written, config)["lm_head.weight"], table + 1)
    tied = dataclasses.replace(config, tied=True)
    expected = f"{written}: lm_head.weight differs from the embedding, expected an equal or no head for a tied model"
    assert refusal(model_folder.read_params, written, tied) == expected


def test_an_index_of_one_file_must_be_true_of_it(written: Path) -> None:
    names = list(tensors.read_tensors(written / model_folder.SINGLE))

    def read(*held: str) -> str:
        weight_map = dict.fromkeys(held, model_folder.SINGLE)
        (written / model_folder.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return refusal(model_folder.read_config, written)

    place = written / model_folder.SINGLE
    assert read(*names[1:]) == f"{place}: {names[0]} is there, but {model_folder.INDEX} says 'nothing'"
    assert read(*names, "head") == f"{place}: head is missing, which {model_folder.INDEX} says is there"


def test_zero_biases_do_not_survive_and_others_are_not_lost(tmp_path: Path) -> None:
    config = CASES["gpt2-nobias-erf"]
    model_folder.write_model(tmp_path, config, weights(config))
    biases = [name for name in tensors.read_tensors(tmp_path / model_folder.SINGLE) if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1
    assert not [name for name in model_folder.read_params(tmp_path, config) if name.endswith("bias")]
    edit_weights(tmp_path, **{"h.1.mlp.c_fc.bias": np.eye(1, 192, 5, dtype=np.float32)[0]})
    expected = "h.1.mlp.c_fc.bias is not zero, but config.json says so under mlxgpt"
    assert refusal(model_folder.read_params, tmp_path, config) == f"{tmp_path / model_folder.SINGLE}: {expected}"
    edit(tmp_path, mlxgpt=None)
    trained = model_folder.read_config(tmp_path)
    assert trained.mlp_bias and model_folder.read_params(tmp_path, trained)["h.1.mlp.c_fc.bias"][5] == 1


# what is refused


def test_writing_refuses_before_a_file_is_there(tmp_path: Path, written: Path) -> None:
    config = CASES["gpt2"]
    made = weights(config)
    place = tmp_path / "new"
    assert refusal(model_folder.write_model, written, config, made) == (
        f"{written}: holds a model already (model.safetensors), expected a new or empty folder"
    )
    wrong = tiny(family="llama", qk_norm="head")
    assert refusal(model_folder.write_model, place, wrong, weights(wrong)).startswith(
        "model.qk_norm = 'head': family llama "
    )
    assert (
        refusal(model_folder.write_model, place, config, made, "int8")
        == "dtype 'int8': expected one of float32, float16, bfloat16"
    )
    made["h.0.ln_1.weight"][3] = np.nan
    with pytest.raises(
        RunError, match=r"^h.0.ln_1.weight has values that are not finite \(NaN or Inf\); nothing was written$"
    ):
        model_folder.write_model(place, config, made)
    made["h.0.ln_1.weight"][3] = 1e5
    expected = "h.0.ln_1.weight: 1e+05 does not fit float16: expected bfloat16 or float32"
    assert refusal(model_folder.write_model, place, config, made, "float16") == expected
    assert not place.exists()


REFUSED = [
    ({"h.0.ln_1.weight": None}, "{m}: tensor h.0.ln_1.weight is missing, which config.json asks for"),
    (
        {"h.2.ln_1.weight": np.ones(48, np.float32)},
        "{m}: unexpected tensor h.2.ln_1.weight [48], for which config.json has no place",
    ),
    (
        {"h.0.attn.c_attn.weight": np.ones((144, 48), np.float32)},
        "{f}: h.0.attn.c_attn.weight has shape [144, 48], expected [48, 144] by config.json",
    ),
    (
        {"wte.weight": np.ones((81, 48), np.float32)},
        "{f}: wte.weight has shape [81, 48], expected [80, 48] by config.json",
    ),
    ({"ln_f.bias": np.ones(48, np.float64)}, "{f}: ln_f.bias has dtype F64, expected one of F32, F16, BF16"),
    ({"ln_f.bias": np.ones(48, np.int32)}, "{f}: ln_f.bias has dtype I32, expected one of F32, F16, BF16"),
    ({"ln_f.bias": np.full(48, np.inf, np.float32)}, "{f}: ln_f.bias has 48 values that are not finite (NaN or Inf)"),
    (
        {"ln_f.bias": np.full(48, np.nan, ml_dtypes.bfloat16)},
        "{f}: ln_f.bias has 48 values that are not finite (NaN or Inf)",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_weights_that_the_config_does_not_describe_are_refused(change: Any, message: str, written: Path) -> None:
    edit_weights(written, **change)
    expected = message.format(m=written, f=written / model_folder.SINGLE)
    assert refusal(model_folder.read_params, written, CASES["gpt2"]) == expected


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path, written: Path) -> None:
    assert (
        refusal(model_folder.read_config, tmp_path / "no")
        == f"{tmp_path / 'no'}: no such folder, expected a model folder"
    )
    file = written / "config.json"
    assert refusal(model_folder.read_config, file) == f"{file}: not a folder, expected a model folder"
    assert refusal(model_folder.read_config, tmp_path) == f"{tmp_path / 'config.json'}: No such file or directory"
    (written / model_folder.SINGLE).rename(written / "pytorch_model.bin")
    expected = f"expected {model_folder.SINGLE} or {model_folder.INDEX}"
    cure = f"mlxgpt convert {written} NEW makes them"
    assert refusal(model_folder.read_config, written) == f"{written}: found pytorch_model.bin, {expected}: {cure}"
    (written / "pytorch_model.bin").unlink()
    assert refusal(model_folder.read_config, written) == f"{written}: {expected}"
    file.write_text("[1]")
    assert refusal(model_folder.read_config, written) == f"{file}: found list, expected a JSON object"
    file.write_bytes(b"\xff{")
    assert refusal(model_folder.read_config, written).startswith(f"{file}: not JSON: ")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tied gpt2 in shards."""
    model_folder.write_model(tmp_path / "s", CASES["gpt2"], weights(CASES["gpt2"]), max_shard=SHARD)
    return tmp_path / "s"


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "..", "", "a\\b", "sub/a.safetensors"])
def test_an_index_may_not_leave_the_folder(file: str, sharded: Path) -> None:
    index = json.loads((sharded / model_folder.INDEX).read_text())
    index["weight_map"]["wte.weight"] = file
    (sharded / model_folder.INDEX).write_text(json.dumps(index))
    expected = f"{sharded / model_folder.INDEX}: weight_map names {file!r}: expected a file in the same folder"
    assert refusal(model_folder.read_config, sharded) == expected


def test_an_index_that_is_not_true_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / model_folder.INDEX).read_text())
    first, last = (f"model-{number:05d}-of-00006.safetensors" for number in (1, 6))
    assert last in index["weight_map"].values()

    def read(weight_map: Any) -> str:
        (sharded / model_folder.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return refusal(model_folder.find_tensors, sharded)

    true = index["weight_map"]
    assert read(None) == f"{sharded / model_folder.INDEX}: weight_map: expected file names by tensor name"
    assert (
        read(true | {"wte.weight": 3})
        == f"{sharded / model_folder.INDEX}: weight_map: expected file names by tensor name"
    )
    assert (
        read(true | {"more": first}) == f"{sharded / first}: more is missing, which {model_folder.INDEX} says is there"
    )
    assert read({name: true[name] for name in true if name != "wte.weight"}) == (
        f"{sharded / true['wte.weight']}: wte.weight is there, but {model_folder.INDEX} says 'nothing'"
    )
    without = {name: file for name, file in true.items() if file != last}
    head = min(set(true) - set(without))
    assert read(without) == f"{sharded / last}: {head} is there, but {model_folder.INDEX} says 'nothing'"
    (sharded / last).unlink()
    assert read(true) == f"{sharded / last}: No such file or directory"
