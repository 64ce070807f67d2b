"""pytorch_model.bin and bare state dicts, with names of transformers and Meta's: read, or refused by what they lack."""

import dataclasses
import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import CASES, weights

from convert import Opened, open_model
from convert import convert as convert_model
from convert.verify import verify
from mlxgpt import cli
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.folders.resolve import resolve_model

NAMES = ("llama", "llama-untied", "gpt2", "gpt_neox", "phi")


@pytest.fixture(scope="module")
def states(tmp_path_factory: Any) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Folders of ours, and what transformers' model of each has as its state dict."""
    made = {}
    for name in NAMES:
        place = tmp_path_factory.mktemp("states") / name
        model_folder.write_model(place, CASES[name], weights(CASES[name]))
        made[name] = place, transformers.AutoModelForCausalLM.from_pretrained(place).state_dict()
    return made


def check(model: ModelConfig, place: Path, config: Path | None = None) -> Opened:
    """The opened model, which is ``model`` with its weights, bit for bit."""
    opened = open_model(place, config=config)
    assert opened.config == model and opened.format == "pytorch"
    for name, array in weights(model).items():
        assert np.array_equal(opened.tensors[name].read(), array), name
        assert np.array_equal(opened.tensors[name].read(), array), f"{name}, read again"
    return opened


def sized(source: Path, place: Path) -> Path:
    """A new folder with the config.json of another."""
    place.mkdir()
    shutil.copy(source / "config.json", place)
    return place


@pytest.mark.parametrize(
    ("name", "legacy"), [*((name, False) for name in NAMES), ("llama-untied", True), ("gpt2", True)]
)
def test_a_folder_of_one_pickled_file(name: str, legacy: bool, states: Any, tmp_path: Path) -> None:
    source, state = states[name]
    place = sized(source, tmp_path / "a")
    torch.save(state, place / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    torch.save({"lr": 1.0}, place / "training_args.bin")
    opened = check(CASES[name], place)
    assert opened.notes == [f"{place}: left behind: training_args.bin"]
    convert_model(place, tmp_path / "b", hash=False)
    assert model_folder.read_config(tmp_path / "b") == CASES[name]


def test_shards_and_their_index(states: Any, tmp_path: Path) -> None:
    source, state = states["llama-untied"]
    place = sized(source, tmp_path / "a")
    files = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    parts = {file: {name: state[name] for name in list(state)[n::2]} for n, file in enumerate(files)}
    for file, part in parts.items():
        torch.save(part, place / file)
    index = {name: file for file, part in parts.items() for name in part}
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert [file.name for file in check(CASES["llama-untied"], place).files] == files
    for lost in ("lm_head.weight", "model.norm.weight"):
        rest = {name: file for name, file in index.items() if name != lost}
        (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": rest}))
        with pytest.raises(UserError, match=rf"{index[lost]}: {lost} is there, but .*index.json says 'nothing'"):
            open_model(place)


WRAPPED = {
    "alone": lambda state: OrderedDict(state),
    "state_dict of Lightning": lambda state: {
        "epoch": 3,
        "pytorch-lightning_version": "2.0",
        "state_dict": {f"model.{name}": each for name, each in state.items()},
        "optimizer_states": [],
    },
    "model, compiled": lambda state: {"model": {f"_orig_mod.{name}": each for name, each in state.items()}, "step": 7},
    "module of DeepSpeed": lambda state: {"module": state, "dp_world_size": 1},
    "two deep": lambda state: {"model": {"state_dict": state}},
    "parameters": lambda state: {name: torch.nn.Parameter(each) for name, each in state.items()},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_training_programs_checkpoint(kind: str, states: Any, tmp_path: Path) -> None:
    for name in ("llama-untied", "gpt2"):
        source, state = states[name]
        place = sized(source, tmp_path / name) / "last.pth"
        torch.save(WRAPPED[kind](state), place)
        notes = check(CASES[name], place).notes
        left = {"state_dict of Lightning": "epoch, optimizer_states, pytorch-lightning_version"}
        left |= {"model, compiled": "step", "module of DeepSpeed": "dp_world_size"}
        assert notes == ([f"{place}: left behind: {left[kind]}"] if kind in left else [])


def test_a_bare_file_takes_a_given_config(states: Any, tmp_path: Path, capsys: Any) -> None:
    source, state = states["llama"]
    torch.save(state, tmp_path / "w.pth")
    assert cli.main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "b")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "expected its config.json beside it, or --config FILE" in err
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]
    check(CASES["llama"], tmp_path / "w.pth", config=source)
    config = str(source / "config.json")
    assert cli.main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "b"), "--config", config]) == 0
    assert verify(tmp_path / "w.pth", tmp_path / "b", weights_only=True, config=config).agrees
    with pytest.raises(UserError, match="says itself what model it is"):
        open_model(source, config=source)
    shutil.copy(source / model_folder.SINGLE, tmp_path / "w.safetensors")
    check(CASES["llama"], tmp_path / "w.safetensors", config=source)


def test_gpt2_of_transformers_is_not_taken_for_mingpt(states: Any, tmp_path: Path) -> None:
    source, state = states["gpt2"]
    place = sized(source, tmp_path / "a") / "model.pt"
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 32, 32) for n in range(2)}
    torch.save(state | masks, place)
    check(CASES["gpt2"], place)
    shutil.move(place, tmp_path / "model.pt")
    check(CASES["gpt2"], tmp_path / "model.pt", config=source)


# what is refused


class Anything:
    """A class of somebody's training program."""


def bad_values(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return state | {"model.norm.weight": torch.full((48,), torch.nan)}


REFUSED = [
    (
        lambda state: state | {"args": Anything()},
        "holds test_pytorch_files.Anything, expected tensors and plain values",
    ),
    (lambda state: {name: each for name, each in state.items() if "lm_head" not in name}, "expected the head"),
    (lambda state: {f"net2.{name}": each for name, each in state.items()}, "all 21 tensors begin with 'net2.'"),
    (lambda state: state | {"model.norm.weight": torch.ones(1).expand(48)}, "values that the file does not hold"),
    (lambda state: state | {"model.norm.weight": torch.ones(48).to_sparse()}, "values that the file does not hold"),
    (lambda state: state | {"model.norm.weight": torch.ones(48, dtype=torch.int32)}, "has dtype I32, expected one of"),
    (lambda state: state | {"model.norm.weight": torch.ones(48).double()}, "has dtype F64, expected one of"),
    (lambda state: state | {"step": 3}, "'step': int, expected a tensor by its name"),
    (lambda state: {"a": {"embed_tokens.weight": state["lm_head.weight"]}}, "expected tensors by name, alone or under"),
    (lambda state: state | {"module.lm_head.weight": torch.ones(80, 48)}, "lm_head.weight is there twice"),
    (lambda state: state | {"x.SCB": torch.ones(3)}, "weights quantized by bitsandbytes, 8 bits are not supported"),
    (bad_values, "48 values are not finite"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_no_model_is_refused_in_one_line(
    change: Any, message: str, states: Any, tmp_path: Path, capsys: Any
) -> None:
    source, state = states["llama-untied"]
    legacy = "Anything" in message or "finite" in message
    place = sized(source, tmp_path / "a")
    torch.save(change(dict(state)), place / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert cli.main(["convert", str(place), str(tmp_path / "b")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused(legacy: bool, states: Any, tmp_path: Path) -> None:
    source, state = states["llama"]
    place = sized(source, tmp_path / "a") / "pytorch_model.bin"
    torch.save(state, place, _use_new_zipfile_serialization=not legacy)
    whole = place.read_bytes()
    for size in (len(whole) // 2, 200):
        place.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"pytorch_model\.bin: (truncated|damaged)"):
            open_model(place.parent)


def test_other_verbs_say_which_command_makes_a_folder(states: Any, tmp_path: Path, capsys: Any) -> None:
    source, state = states["llama"]
    place = sized(source, tmp_path / "a")
    torch.save(state, place / "pytorch_model.bin")
    cure = f"mlxgpt convert {place} NEW"
    for command in (["generate", "--model", str(place), "-p", "x"], ["plan", "--model", str(place)]):
        assert cli.main(command) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "found pytorch_model.bin, expected" in err and cure in err, err
    assert cli.main([*cure.split()[1:-1], str(tmp_path / "NEW")]) == 0
    assert model_folder.read_config(tmp_path / "NEW") == CASES["llama"]


# Meta's names


def pairs(array: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of halves as rows of pairs, written as the reverse of what transformers does with Meta's files."""
    return array.view(heads, 2, array.shape[0] // heads // 2, array.shape[1]).transpose(1, 2).reshape(array.shape)


META = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
META |= {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv"}
META |= {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2"}
META |= {"mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm"}
META |= {"post_attention_layernorm": "ffn_norm"}


def metas(config: ModelConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {"rope.freqs": torch.ones(6)}
    for name, tensor in state.items():
        module = name.removesuffix(".weight").removeprefix("model.layers.")
        number, _, rest = module.partition(".")
        theirs = f"layers.{number}.{META[rest]}" if number.isdigit() else META[module]
        heads = {"attention.wq": config.n_head, "attention.wk": config.n_kv_head}.get(theirs.partition(".")[2][2:])
        made[f"{theirs}.weight"] = pairs(tensor, heads) if heads else tensor
    return made


PARAMS = {"dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": -1, "multiple_of": 32, "norm_eps": 1e-5}


@pytest.fixture
def meta(states: Any, tmp_path: Path) -> Path:
    """consolidated.00.pth and params.json of an untied llama."""
    config = CASES["llama-untied"]
    place = tmp_path / "meta"
    place.mkdir()
    torch.save(metas(config, states["llama-untied"][1]), place / "consolidated.00.pth")
    params = PARAMS | {"norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "max_seq_len": config.block_size}
    params |= {"n_kv_heads": config.n_kv_head}
    (place / "params.json").write_text(json.dumps(params))
    return place


def test_metas_names_and_rows_are_read(meta: Path, states: Any, tmp_path: Path) -> None:
    config = CASES["llama-untied"]
    check(config, meta)
    check(config, meta / "consolidated.00.pth")
    check(config, meta / "consolidated.00.pth", config=states["llama-untied"][0])
    convert_model(meta, tmp_path / "b")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").state_dict()
    for name, tensor in states["llama-untied"][1].items():
        assert torch.equal(theirs[name], tensor), name
    (meta / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert any("ranks of tiktoken" in note for note in open_model(meta).notes)
    assert "tokenizer.model" not in open_model(meta).companions


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"norm_eps": 1e-6}, {"block_size": 2048, "rope_theta": 10000.0}),
        ({}, {"block_size": 4096}),
        ({"rope_theta": 500000.0}, {"block_size": 8192}),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, {"rope_factor": 8.0, "rope_original": 8192}),
        ({"use_scaled_rope": True, "rope_scaling_factor": 32}, {"rope_factor": 32.0, "block_size": 131072}),
        ({"sliding_window": 16}, {"family": "mistral", "window": 16}),
    ],
)
def test_params_json_means_what_the_published_models_have(params: Any, expected: Any, meta: Path) -> None:
    (meta / "params.json").write_text(json.dumps(PARAMS | params))
    config = open_model(meta).config
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": {"num_experts": 8}}, r"params.json: moe = .* is not supported"),
        ({"dim": "48"}, "params.json: dim = '48': expected a positive whole number"),
        ({"n_heads": 7}, "attention.wq.weight has shape .* which 7 heads do not divide"),
        ({"n_layers": 3}, r"tensor model.layers.2.* is missing"),
    ],
)
def test_params_that_do_not_hold(change: Any, message: str, meta: Path) -> None:
    (meta / "params.json").write_text(json.dumps(PARAMS | change))
    with pytest.raises(UserError, match=message):
        open_model(meta)


def test_a_model_split_over_machines_is_refused_by_name(meta: Path) -> None:
    shutil.copy(meta / "consolidated.00.pth", meta / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"consolidated.00.pth, consolidated.01.pth, a model split over machines"):
        open_model(meta)


# other readers of torch.save's files


@pytest.mark.parametrize("to", ["nanogpt", "mingpt", "gptmodel"])
def test_other_formats_name_a_prefix_too(to: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CASES["gpt2"], activation="gelu" if to == "nanogpt" else "gelu_tanh")
    model_folder.write_model(tmp_path / "a", config, weights(config))
    convert_model(tmp_path / "a", tmp_path / "b.pt", to)
    for prefix in ("module.", "model._orig_mod.", "student."):
        content = torch.load(tmp_path / "b.pt", weights_only=True)
        state = content["model"] if to == "nanogpt" else content
        for name in list(state):
            state[prefix + name] = state.pop(name)
        torch.save(content, tmp_path / "c.pt")
        if prefix != "student.":
            assert open_model(tmp_path / "c.pt", 0 if to == "nanogpt" else config.n_head).format == to
            continue
        with pytest.raises(UserError, match=r"\d+ of \d+ tensors begin with 'student.', which is not known"):
            open_model(tmp_path / "c.pt")


def test_a_file_or_metas_folder_as_a_model_says_the_command(meta: Path) -> None:
    with pytest.raises(UserError, match=rf"consolidated.00.pth and params.json, .*: mlxgpt convert {meta} NEW makes"):
        resolve_model(meta)
    with pytest.raises(UserError, match=r"a file; expected a model folder.*: mlxgpt convert .*00.pth NEW makes"):
        resolve_model(meta / "consolidated.00.pth")
