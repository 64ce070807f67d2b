"""minGPT's state dict in and out: the same function, the same bits, and how many heads there are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import agree
from models import SIZES, tiny
from torch_peers import NanoGPT

from convert import convert, open_model
from convert.formats.opened import Opened, Options
from convert.formats.torch_files import head_count, mingpt
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params
from torch_ref.load import load

CONFIG = tiny(tied=False)
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 30)))


@pytest.fixture
def peer(tmp_path: Path) -> NanoGPT:
    """minGPT, whose model.pt is in the test's folder."""
    model = NanoGPT(CONFIG, mingpt=True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    return model


def test_a_state_dict_becomes_a_folder_with_the_same_logits(peer: NanoGPT, tmp_path: Path) -> None:
    report = convert(tmp_path / "model.pt", tmp_path / "folder", n_head=4)
    assert report.source_format == "mingpt"
    assert json.loads((tmp_path / "folder/config.json").read_text())["activation_function"] == "gelu_new"
    model, _ = load(tmp_path / "folder")
    with torch.no_grad():
        agree("logits", model(TOKENS).numpy(), peer(TOKENS).numpy(), 1e-5)
        convert(tmp_path / "model.pt", tmp_path / "wrong", n_head=2)
        assert np.abs(load(tmp_path / "wrong")[0](TOKENS).numpy() - peer(TOKENS).numpy()).max() > 1e-2


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_bit_equal(tied: bool, tmp_path: Path) -> None:
    """Ours knows its heads without being told; minGPT's ``load_state_dict`` takes it whole."""
    config = tiny(tied=tied)
    weights = params.init_params(config, 5)
    tensors = {name: mingpt.Tensor(w.shape, w.dtype, lambda w=w: w) for name, w in weights.items()}
    opened = Opened(tmp_path / "x", "hf", config, tensors, ())
    notes = mingpt.write(opened, tmp_path / "model.pt", Options())
    assert notes == (["minGPT ties nothing: its head begins as the embedding's copy and trains on its own"] * tied)
    again = open_model(tmp_path / "model.pt")
    assert again.config == config
    assert list(again.tensors) == list(weights)
    for name, tensor in again.tensors.items():
        assert tensor.read().tobytes() == weights[name].tobytes(), name
    twin = NanoGPT(config, mingpt=True)
    twin.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    convert(tmp_path / "model.pt", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.pt", to="mingpt")
    for name, tensor in torch.load(tmp_path / "back.pt", weights_only=True).items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


@pytest.mark.parametrize("values", [{"n_head": 4}, {"n_head": None, "model_type": "gpt-micro"}])
def test_minGPTs_own_config_says_the_heads(values: dict[str, Any], peer: NanoGPT, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": values}))
    opened = open_model(tmp_path / "model.pt")
    assert opened.config.n_head == 4
    assert opened.notes == [f"{tmp_path / 'config.json'}: says 4 heads"]


def test_where_nothing_says_the_heads_it_is_asked(peer: NanoGPT, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.pt: the file does not say how many heads: expected --n-head N"):
        open_model(tmp_path / "model.pt")
    with pytest.raises(UserError, match="model.n_embd = 48: expected a multiple of model.n_head = 5"):
        open_model(tmp_path / "model.pt", n_head=5)
    assert head_count.find_head_count(tmp_path / "x", {}, 0, 24, 1024)[0] == 16
    assert "else: --n-head N" in head_count.find_head_count(tmp_path / "x", {}, 0, 12, 768)[1][0]
    assert head_count.find_head_count(tmp_path / "x", {}, 6, 12, 768) == (6, [])
    convert(tmp_path / "model.pt", tmp_path / "folder", n_head=4)
    convert(tmp_path / "folder", tmp_path / "own.pt", to="mingpt")
    with pytest.raises(UserError, match="--n-head 2, but the file says 4"):
        open_model(tmp_path / "own.pt", n_head=2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.pop("transformer.h.0.attn.bias"), "of nanoGPT the whole ckpt.pt is needed"),
        (lambda x: x.pop("transformer.h.1.mlp.c_fc.bias"), "transformer.h.1.mlp.c_fc.bias is missing"),
        (lambda x: x.update(more=torch.zeros(2)), "unexpected tensor more [2]"),
        (lambda x: x.pop("transformer.wpe.weight"), "transformer.wpe.weight is missing or no matrix"),
        (lambda x: x.update({"lm_head.weight": x["transformer.wte.weight"]}), "the head is the embedding, as in nano"),
        # transformers' pytorch_model.bin has the same names, and matrices the other way round
        (
            lambda x: x.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(48, 144)}),
            "transformer.h.0.attn.c_attn.weight has shape [48, 144], expected [144, 48]",
        ),
    ],
)
def test_a_state_dict_of_something_else_is_refused(change: Any, expected: str, tmp_path: Path) -> None:
    state = NanoGPT(CONFIG, mingpt=True).state_dict()
    change(state)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError) as caught:
        open_model(tmp_path / "model.pt", n_head=4)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"activation": "gelu"}, "model.activation = 'gelu': minGPT has only 'gelu_tanh'; its code computes tanh GELU"),
        ({"family": "qwen3"}, "model.family = 'qwen3': minGPT has only 'gpt2'"),
        ({"out_bias": False}, "model.out_bias = False: minGPT has only True"),
    ],
)
def test_what_mingpt_cannot_say_is_refused_before_a_byte(model: Mapping, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        mingpt.write(Opened(tmp_path, "hf", tiny(**model), {}, ()), tmp_path / "out.pt", Options())
    assert expected in str(caught.value)
    assert not (tmp_path / "out.pt").exists()
