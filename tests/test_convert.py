"""Conversion: what goes in comes out, whole, with all that travels; mlx-lm and transformers read what is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from compare import agree
from mlx.utils import tree_map
from mlx_lm.utils import load_model
from models import CASES, tiny, weights

from convert import Opened, convert, open_model
from convert.conversion import SIDECAR
from mlxgpt import cli
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder, tensors
from mlxgpt.common.model import affine, families, params
from mlxgpt.common.runs import checkpoint

FAMILIES = {config.family: name for name, config in reversed(CASES.items())}
TOKENS = [[1, 5, 79, 3, 3, 0, 44, 12]]
WIDE: dict[str, Any] = dict(n_embd=64, n_hidden=256)  # groups of 32 divide every matrix


def write(place: Path, config: ModelConfig, dtype: str = "float32", **more: Any) -> dict[str, np.ndarray]:
    made = weights(config)
    model_folder.write_model(place, config, made, dtype=dtype, **more)
    return made


def values(opened: Opened) -> dict[str, np.ndarray]:
    return {name: tensor.read().astype(np.float32) for name, tensor in opened.tensors.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


def files(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


# round trips


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in CASES), ("gpt2", "float32"), ("llama", "float16")]
)
def test_there_and_back_is_every_byte(name: str, dtype: str, tmp_path: Path) -> None:
    config = CASES[name]
    write(tmp_path / "a", config, dtype)
    expected = open_model(tmp_path / "a")
    for to in ("mlx-lm", "npz"):
        convert(tmp_path / "a", tmp_path / to, to)
        made = open_model(tmp_path / to)
        assert made.format == to and made.config == config
        assert {n: (t.dtype, t.shape) for n, t in made.tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in expected.tensors.items()
        }
        convert(tmp_path / to, tmp_path / f"{to}-back")
        back = open_model(tmp_path / f"{to}-back")
        assert (back.format, back.config) == ("hf", config)
        for file in (model_folder.SINGLE, "generation_config.json"):
            assert (tmp_path / f"{to}-back" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
        ours, theirs = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("a", f"{to}-back"))
        theirs["mlxgpt"].pop("provenance")
        assert theirs | {"mlxgpt": None} == ours | {"mlxgpt": None}
        assert theirs["mlxgpt"] == ours.get("mlxgpt", {"format_version": 1})


@pytest.mark.parametrize("to", ["hf", "mlx-lm"])
def test_shards_are_split_and_joined(to: str, tmp_path: Path) -> None:
    config = CASES["gpt2"]
    made = write(tmp_path / "a", config, max_shard=60_000)
    convert(tmp_path / "a", tmp_path / "one", to)
    assert (tmp_path / "one" / model_folder.SINGLE).exists()
    assert (tmp_path / "one" / model_folder.INDEX).exists() == (to == "mlx-lm")
    report = convert(tmp_path / "one", tmp_path / "many", to, max_shard=40_000)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and sorted(report.sha256) == shards
    assert same(values(open_model(tmp_path / "many")), made)
    assert tensors.read_header(tmp_path / "many" / shards[0])[1] == {"format": "pt" if to == "hf" else "mlx"}


def test_dtypes_are_cast_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = CASES["llama"]
    made = write(tmp_path / "a", config)
    for dtype, kind in model_folder.DTYPES.items():
        for to in ("hf", "mlx-lm", "npz"):
            convert(tmp_path / "a", tmp_path / f"{to}-{dtype}", to, dtype=dtype)
            opened = open_model(tmp_path / f"{to}-{dtype}")
            assert all(np.array_equal(t.read(), made[n].astype(kind)) for n, t in opened.tensors.items())
            assert json.loads((opened.path / "config.json").read_text())["torch_dtype"] == dtype
    made["h.0.mlp.c_fc.weight"][3, 3] = 1e5
    model_folder.write_model(tmp_path / "b", config, made)
    with pytest.raises(UserError, match=r"^model.layers.0.mlp.up_proj.weight: 1e\+05 does not fit float16"):
        convert(tmp_path / "b", tmp_path / "c", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir() if "c" in path.name or path.name.startswith(".")) == []


def test_npz_is_what_mlx_loads_and_saves(tmp_path: Path) -> None:
    config = CASES["gpt_neox"]
    made = write(tmp_path / "a", config)
    convert(tmp_path / "a", tmp_path / "n", "npz")
    model, _ = load_model(tmp_path / "a")
    expected = np.array(model(mx.array(TOKENS)))
    model.update(tree_map(mx.zeros_like, model.parameters()))
    model.load_weights(str(tmp_path / "n" / "weights.npz"))
    assert np.array_equal(np.array(model(mx.array(TOKENS))), expected)
    arrays: Any = mx.load(str(tmp_path / "n" / "weights.npz"))
    mx.eval(arrays)
    mx.savez(str(tmp_path / "n" / "weights.npz"), **arrays)
    assert same(values(open_model(tmp_path / "n")), made)
    turned: Any = {name: np.asfortranarray(array) for name, array in arrays.items()}
    np.savez_compressed(tmp_path / "n" / "weights.npz", **turned)
    assert same(values(open_model(tmp_path / "n" / "weights.npz")), made)


# quantized


@pytest.mark.parametrize(("family", "bits"), [*((family, 4) for family in FAMILIES), ("gpt2", 8), ("llama", 8)])
def test_a_quantized_folder_is_mx_quantize_and_stays_so(family: str, bits: int, tmp_path: Path) -> None:
    kv = {"n_kv_head": 2} if CASES[FAMILIES[family]].n_kv_head != 4 else {}
    config = tiny(family=family, tied=CASES[FAMILIES[family]].tied, **WIDE, **kv)
    made = write(tmp_path / "a", config)
    convert(tmp_path / "a", tmp_path / "q", "mlx-lm", bits=bits, group_size=32)
    opened = open_model(tmp_path / "q")
    assert opened.config == config and opened.format == "mlx-lm"
    for name, tensor in opened.tensors.items():
        if len(tensor.shape) == 2:
            parts = mx.quantize(mx.array(made[name]), group_size=32, bits=bits)
            assert np.array_equal(tensor.read(), np.array(mx.dequantize(*parts, group_size=32, bits=bits))), name
        else:
            assert np.array_equal(tensor.read(), made[name]), name
    convert(tmp_path / "q", tmp_path / "f")
    convert(tmp_path / "f", tmp_path / "q2", "mlx-lm", bits=bits, group_size=32)
    assert same(values(open_model(tmp_path / "q2")), values(opened))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox", "phi", "olmo2"])
def test_mlx_lm_loads_a_quantized_folder(family: str, tmp_path: Path) -> None:
    tied = family not in ("gpt_neox", "phi", "olmo2")
    config = tiny(family=family, tied=tied, **WIDE, **({"activation": "gelu_tanh"} if family == "gpt_neox" else {}))
    write(tmp_path / "a", config)
    convert(tmp_path / "a", tmp_path / "q", "mlx-lm", bits=4, group_size=32)
    convert(tmp_path / "q", tmp_path / "f")
    model, read = load_model(tmp_path / "q")
    assert read["quantization"] == read["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    expected = load(tmp_path / "f")(torch.tensor(TOKENS)).logits.detach().numpy()
    agree(family, np.array(model(mx.array(TOKENS))), expected, 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_what_mlx_lm_quantized_is_read(family: str, tmp_path: Path) -> None:
    from mlx_lm.utils import quantize_model, save_config, save_model

    config = tiny(family=family, tied=family != "gpt_neox", **WIDE)
    made = write(tmp_path / "a", config, "bfloat16")
    model, read = load_model(tmp_path / "a")

    def choose(path: str, module: Any) -> Any:
        return {"group_size": 64, "bits": 8, "mode": "affine"} if "mlp" in path else "h.0.att" not in path

    model, read = quantize_model(model, read, 32, 4, quant_predicate=choose)
    (tmp_path / "q").mkdir()
    save_model(tmp_path / "q", model)
    save_config(read, tmp_path / "q" / "config.json")
    opened = open_model(tmp_path / "q")
    assert opened.config == config
    for name, tensor in opened.tensors.items():
        if len(tensor.shape) == 1 or (family != "llama" and "h.0.attn" in name):
            assert np.array_equal(tensor.read(), made[name].astype(model_folder.DTYPES["bfloat16"])), name
            continue
        bits, group = (8, 64) if "mlp" in name else (4, 32)
        expected = affine.dequantize(
            *affine.quantize(made[name].astype(model_folder.DTYPES["bfloat16"]), bits, group), bits, group
        )
        assert np.array_equal(tensor.read(), expected), name


def load(place: Path) -> transformers.PreTrainedModel:
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = read(place, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma", "phi"])
@pytest.mark.parametrize("to", ["hf", "mlx-lm"])
def test_transformers_and_mlx_lm_load_what_was_written(name: str, to: str, tmp_path: Path) -> None:
    write(tmp_path / "a", CASES[name])
    convert(tmp_path / "a", tmp_path / "b", to)
    for place in ("a", "b"):
        shutil.copytree(tmp_path / place, tmp_path / f"{place}2")
    expected, found = (load(tmp_path / place)(torch.tensor(TOKENS)).logits.detach().numpy() for place in ("a", "b"))
    assert np.array_equal(found, expected)
    expected, found = (np.array(load_model(tmp_path / place)[0](mx.array(TOKENS))) for place in ("a", "b"))
    assert np.array_equal(found, expected)


# what travels


@pytest.fixture
def dressed(tmp_path: Path) -> Path:
    """A folder as the hub has them."""
    place = tmp_path / "dressed"
    write(place, CASES["llama"], extra={"eos_token_id": 7, "initializer_range": 0.5, "auto_map": {"AutoModel": "x.Y"}})
    (place / "tokenizer.json").write_text('{"a": 1}')
    (place / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (place / "chat_template.jinja").write_text("{{ messages }}")
    (place / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Card\n")
    (place / "pytorch_model.bin").write_bytes(b"x")
    return place


@pytest.mark.parametrize("to", ["hf", "mlx-lm", "npz"])
def test_companions_travel_and_the_rest_is_named(to: str, dressed: Path, tmp_path: Path) -> None:
    before = files(dressed)
    report = convert(dressed, tmp_path / "b", to)
    after = files(tmp_path / "b")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "generation_config.json",
    ):
        assert after[name] == before[name]
    read = json.loads(after["config.json"])
    assert (read["eos_token_id"], read["initializer_range"]) == (7, 0.5) and "auto_map" not in read
    assert any("auto_map is left out" in note for note in report.notes)
    assert any("left behind: pytorch_model.bin" in note for note in report.notes)
    assert files(dressed) == before


def test_the_provenance_says_from_what(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path / "a", CASES["gpt2-nobias-erf"], max_shard=60_000)
    report = convert(tmp_path / "a", tmp_path / "b", "mlx-lm", dtype="bfloat16")
    own = json.loads((tmp_path / "b" / "config.json").read_text())["mlxgpt"]
    assert own["qkv_bias"] is False and own["format_version"] == 1
    came = own["provenance"]
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "a").glob("*.safetensors")
    }
    assert came["from"] == {"path": "a", "format": "hf", "sha256": digests}
    made = hashlib.sha256((tmp_path / "b" / model_folder.SINGLE).read_bytes()).hexdigest()
    assert came["to"] == {"format": "mlx-lm", "sha256": {model_folder.SINGLE: made}} and report.sha256 == {
        model_folder.SINGLE: made
    }
    assert came["options"] == {"dtype": "bfloat16"} and came["mlxgpt"] and came["date"]
    convert(tmp_path / "a", tmp_path / "c", hash=False)
    came = json.loads((tmp_path / "c" / "config.json").read_text())["mlxgpt"]["provenance"]
    assert set(came["from"]["sha256"].values()) == {None} and came["to"]["sha256"] is None
    assert came["options"] == {"hash": False}
    assert model_folder.read_config(tmp_path / "c") == CASES["gpt2-nobias-erf"]


def test_a_file_has_its_provenance_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "a", CASES["llama"])
    convert(tmp_path / "a", tmp_path / "m.gguf")
    came = json.loads((tmp_path / f"m.gguf{SIDECAR}").read_text())["provenance"]
    assert came["from"]["format"] == "hf" and list(came["to"]["sha256"]) == ["m.gguf"]


def test_another_tokenizer_takes_the_place(dressed: Path, tmp_path: Path) -> None:
    from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer

    train_tokenizer("char", ["abcd"], 0).save(tmp_path)
    report = convert(dressed, tmp_path / "b", tokenizer=tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "b").encode("dcba") == load_tokenizer(tmp_path).encode("dcba")
    assert any("in place of the source's tokenizer.json, tokenizer_config.json" in note for note in report.notes)
    train_tokenizer("char", ["".join(map(chr, range(300, 400)))], 0).save(tmp_path)
    with pytest.raises(UserError, match="but the model has a vocabulary of 80"):
        convert(dressed, tmp_path / "c", tokenizer=tmp_path / "tokenizer.json")
    assert not (tmp_path / "c").exists()


def test_mlx_lms_deviations_are_said(tmp_path: Path) -> None:
    write(tmp_path / "a", CASES["gemma"])
    expected = families.mlx_lm_deviations(CASES["gemma"])
    assert len(expected) == 1
    for to in ("hf", "mlx-lm", "npz"):
        assert convert(tmp_path / "a", tmp_path / to, to).notes == expected


# moments


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a gpt2, whose file has matrices as [in, out]."""
    config = CASES["gpt2"]
    moment = {name: np.full(param.shape, i, np.float32) for i, (name, param) in enumerate(params.table(config).items())}
    snapshot: Any = {"params": weights(config), "m": moment, "v": moment, "t": 5}
    (tmp_path / "run").mkdir()
    state = checkpoint.RunState(1, {"train": "x"}, {"model": {}}, "mlx", {}, step=6, t=5)
    return checkpoint.write(tmp_path / "run", snapshot, config, None, state, 0)[0], snapshot


def test_moments_convert_with_the_weights(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    place, snapshot = saved
    moments = open_model(place).moments
    assert moments and (moments.t, moments.step) == (5, 6)
    convert(place, tmp_path / "b", max_shard=60_000)
    assert dataclass_of(checkpoint.verify(tmp_path / "b")) == dataclass_of(checkpoint.verify(place))
    back = checkpoint.read_snapshot(tmp_path / "b", CASES["gpt2"])
    assert same(back["m"], snapshot["m"]) and same(back["v"], snapshot["v"]) and back["t"] == 5
    assert same(back["params"], snapshot["params"])
    assert any("moments are left behind" in note for note in convert(place, tmp_path / "c", "mlx-lm").notes)
    assert not (tmp_path / "c" / "training").exists()


def dataclass_of(state: checkpoint.RunState) -> dict[str, Any]:
    return vars(state)


def test_a_run_is_its_checkpoint(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "run" / "recipe.toml").write_text("")
    assert open_model(tmp_path / "run").path == saved[0]


# the verb


def test_the_verb_says_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "a", CASES["gemma"])
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "mlx-lm"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("note: mlx-lm computes gelu in gemma")
    assert out[-1].startswith(f"{tmp_path / 'b'}: mlx-lm, from hf {tmp_path / 'a'}: ") and " parameters, " in out[-1]
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--max-shard", "60KB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "hf" and len(report["sha256"]) > 1 and report["notes"]
