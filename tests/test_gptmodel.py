"""GPTModel's .pth in and out: the same function, the same bits, moments included."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import agree
from models import SIZES, tiny
from torch_peers import GPTModel, scramble, steps

from convert import convert, open_model
from convert.formats.opened import Opened, Options
from convert.formats.torch_files import gptmodel
from mlxgpt.common.errors import UserError
from torch_ref.load import load

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 30))
BATCHES = [(TOKENS[:, :-1], TOKENS[:, 1:])]


def trained(bias: bool, tied: bool = False, count: int = 2) -> tuple[GPTModel, torch.optim.AdamW]:
    """GPTModel after some updates, and its optimizer, which has one group."""
    model = GPTModel(tiny(tied=tied), bias)
    if tied:
        model.out_head.weight = model.tok_emb.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    steps(model, optimizer, BATCHES * count)
    return model, optimizer


def save(model: GPTModel, optimizer: torch.optim.AdamW, path: Path) -> None:
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, path)


@pytest.mark.parametrize("bias", [False, True])
def test_a_state_dict_becomes_a_folder_with_the_same_logits(bias: bool, tmp_path: Path) -> None:
    peer = GPTModel(tiny(), bias)
    torch.save(peer.state_dict(), tmp_path / "model.pth")
    report = convert(tmp_path / "model.pth", tmp_path / "folder", n_head=4)
    assert report.source_format == "gptmodel"
    model, _ = load(tmp_path / "folder")
    assert (model.config.qkv_bias, model.config.tied, model.config.activation) == (bias, False, "gelu_tanh")
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        agree("logits", model(tokens).numpy(), peer(tokens).numpy(), 1e-5)
        state = peer.state_dict()
        for n in range(2):  # the counter-case: q and k in each other's place
            q, k = (f"trf_blocks.{n}.att.W_{one}.weight" for one in ("query", "key"))
            state[q], state[k] = state[k].T.contiguous(), state[q]
        torch.save(state, tmp_path / "swapped.pth")
        convert(tmp_path / "swapped.pth", tmp_path / "swapped", n_head=4)
        assert np.abs(load(tmp_path / "swapped")[0](tokens).numpy() - peer(tokens).numpy()).max() > 1e-3


@pytest.mark.parametrize(("bias", "tied"), [(False, False), (True, False), (True, True)])
def test_there_and_back_is_bit_equal_with_the_moments(bias: bool, tied: bool, tmp_path: Path) -> None:
    model, optimizer = trained(bias, tied)
    save(model, optimizer, tmp_path / "model.pth")
    first = open_model(tmp_path / "model.pth", n_head=4)
    assert first.moments
    assert (first.moments.t, first.config.tied) == (2, tied)
    convert(tmp_path / "model.pth", tmp_path / "folder", n_head=4)
    convert(tmp_path / "folder", tmp_path / "back.pth")
    again = open_model(tmp_path / "back.pth")
    assert again.config == first.config
    assert again.moments
    assert again.moments.t == 2
    for here, there in ((first.tensors, again.tensors), (first.moments.m, again.moments.m),
                        (first.moments.v, again.moments.v)):  # fmt: skip
        assert list(here) == list(there)
        for name in here:
            assert here[name].read().tobytes() == there[name].read().tobytes(), name
    twin = GPTModel(tiny(), bias)
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    twin.load_state_dict(content["model_state_dict"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name
    if not tied:  # and both do the same steps
        own = torch.optim.AdamW(twin.parameters(), lr=1.0)
        own.load_state_dict(content["optimizer_state_dict"])
        for group in own.param_groups:
            group["lr"] = 4e-4
        assert steps(twin, own, BATCHES * 2) == steps(model, optimizer, BATCHES * 2)


def test_moments_are_those_of_their_tensors(tmp_path: Path) -> None:
    """Positions count by the order of parameters(), in which biases stand between q, k and v."""
    model, optimizer = trained(bias=True)
    save(model, optimizer, tmp_path / "model.pth")
    opened = open_model(tmp_path / "model.pth", n_head=4)
    assert opened.moments
    by_name: dict[str, Any] = {name: optimizer.state[p]["exp_avg"].numpy() for name, p in model.named_parameters()}
    parts = [by_name[f"trf_blocks.1.att.W_{one}.bias"] for one in ("query", "key", "value")]
    assert (opened.moments.m["h.1.attn.c_attn.bias"].read() == np.concatenate(parts)).all()
    assert (opened.moments.m["h.0.ln_2.weight"].read() == by_name["trf_blocks.0.norm2.scale"]).all()
    assert (opened.moments.m["lm_head.weight"].read() == by_name["out_head.weight"]).all()


def test_an_equal_head_of_its_own_stays_one(tmp_path: Path) -> None:
    """As where GPT-2's weights were copied in: it would train on its own."""
    model = GPTModel(tiny())
    with torch.no_grad():
        model.out_head.weight.copy_(model.tok_emb.weight)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert not open_model(tmp_path / "model.pth", n_head=4).config.tied


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.pop("trf_blocks.1.norm1.shift"), "trf_blocks.1.norm1.shift is missing"),
        (lambda x: x.pop("out_head.weight"), "out_head.weight is missing"),
        (lambda x: x.pop("trf_blocks.1.att.W_key.bias"), "trf_blocks.1.att.W_key.bias is missing"),
        (lambda x: x.update({"trf_blocks.9.x": torch.zeros(2)}), "trf_blocks.2.norm1.scale is missing"),
        (lambda x: x.update({"trf_blocks.0.att.W_key.weight": torch.zeros(3)}), "has shape [3], expected [48, 48]"),
        (lambda x: x.update(more=torch.zeros(2)), "unexpected tensor more [2]"),
        (lambda x: x.update({"pos_emb.weight": torch.zeros(2)}), "pos_emb.weight is missing or no matrix"),
    ],
)
def test_a_state_dict_of_something_else_is_refused(change: Any, expected: str, tmp_path: Path) -> None:
    state = GPTModel(tiny(), bias=True).state_dict()
    change(state)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(UserError) as caught:
        open_model(tmp_path / "model.pth", n_head=4)
    assert expected in str(caught.value)


def test_another_optimizer_is_left_behind_and_said(tmp_path: Path) -> None:
    model = GPTModel(tiny())
    scramble(model)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer, BATCHES)
    torch.save(
        {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 3},
        tmp_path / "model.pth",
    )
    opened = open_model(tmp_path / "model.pth", n_head=4)
    assert opened.moments is None
    assert opened.notes[0].endswith("left behind: epoch")
    assert "expected step, exp_avg and exp_avg_sq, as AdamW has; the moments are left behind" in opened.notes[1]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"activation": "gelu"}, "model.activation = 'gelu': GPTModel has only 'gelu_tanh'"),
        ({"family": "gpt_neox"}, "model.family = 'gpt_neox': GPTModel has only 'gpt2'"),
        ({"norm_bias": False}, "model.norm_bias = False: GPTModel has only True"),
        ({"n_hidden": 80}, "model.n_hidden = 80: GPTModel has only 192"),
    ],
)
def test_what_gptmodel_cannot_say_is_refused_before_a_byte(model: Mapping, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        gptmodel.write(Opened(tmp_path, "hf", tiny(**model), {}, ()), tmp_path / "out.pth", Options())
    assert expected in str(caught.value)
    assert not (tmp_path / "out.pth").exists()
