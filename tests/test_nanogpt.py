"""nanoGPT's ckpt.pt in and out: the same function, the same bits, and a run that resumes where it was."""

import copy
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import agree
from models import NO_BIAS, SIZES, tiny
from torch_peers import NanoGPT, steps

from convert import convert, open_model
from convert.formats.opened import Opened, Options
from convert.formats.torch_files import nanogpt
from mlxgpt import cli
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.data import token_source
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build, read_toml
from mlxgpt.common.runs import metrics
from torch_ref.load import load

CONFIGS = {"bias": tiny(activation="gelu"), "no-bias": tiny(activation="gelu", **NO_BIAS)}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 30)).astype(np.int32)


def content(c: ModelConfig, model: NanoGPT, optimizer: torch.optim.Optimizer | None = None, **more: Any) -> dict:
    """What train.py saves."""
    sizes = {key: getattr(c, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    empty = model.optimizer(1e-3, (0.9, 0.95), 0.1)
    made = {
        "model": model.state_dict(),
        "optimizer": (optimizer or empty).state_dict(),
        "model_args": sizes | {"bias": c.norm_bias, "dropout": 0.0},
        "iter_num": 0,
        "best_val_loss": torch.tensor(3.25),
        "config": {"learning_rate": 1e-3, "min_lr": 1e-3, "grad_clip": 1.0, "dataset": "x", "decay_lr": False},
    }
    return made | more


def same(one: Opened, other: Opened) -> None:
    """Equal models with equal bits, moments included."""
    assert one.config == other.config
    groups: list[tuple[Any, Any]] = [(one.tensors, other.tensors)]
    if one.moments or other.moments:
        assert one.moments and other.moments
        assert (one.moments.t, one.moments.step) == (other.moments.t, other.moments.step)
        groups += [(one.moments.m, other.moments.m), (one.moments.v, other.moments.v)]
    for here, there in groups:
        assert list(here) == list(there) == list(params.table(one.config))
        for name in here:
            found, expected = here[name].read(), there[name].read()
            assert found.dtype == expected.dtype == here[name].dtype
            assert found.shape == here[name].shape
            assert found.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_ckpt_becomes_a_folder_with_the_same_logits(case: str, prefix: str, tmp_path: Path) -> None:
    c = CONFIGS[case]
    peer = NanoGPT(c, bias=c.norm_bias, mask=prefix == "")
    made = content(c, peer)
    made["model"] = {prefix + name: tensor for name, tensor in made["model"].items()}
    torch.save(made, tmp_path / "ckpt.pt")
    opened = open_model(tmp_path / "ckpt.pt")
    assert (opened.format, opened.config, opened.moments) == ("nanogpt", c, None)
    folder = convert(tmp_path / "ckpt.pt", tmp_path / "folder").path
    values = json.loads((folder / "config.json").read_text())
    assert values["activation_function"] == "gelu"
    biases = {} if c.norm_bias else dict.fromkeys(NO_BIAS, False)
    assert {key: value for key, value in values["mlxgpt"].items() if key.endswith("bias")} == biases
    assert values["nanogpt"]["best_val_loss"] == 3.25
    model, _ = load(folder)
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        agree("logits", model(tokens).numpy(), peer(tokens).numpy(), 1e-5)
        if c.norm_bias:
            from transformers import GPT2LMHeadModel

            judge: Any = GPT2LMHeadModel.from_pretrained(folder)
            agree("transformers", judge(tokens.long()).logits.numpy(), peer(tokens).numpy(), 1e-5)


@pytest.mark.parametrize("case", CONFIGS)
def test_there_and_back_is_bit_equal(case: str, tmp_path: Path) -> None:
    c = CONFIGS[case]
    peer = NanoGPT(c, bias=c.norm_bias)
    optimizer = peer.optimizer(1e-3, (0.9, 0.95), 0.1)
    steps(peer, optimizer, [(TOKENS[:, :-1], TOKENS[:, 1:])] * 2)
    torch.save(content(c, peer, optimizer, iter_num=2), tmp_path / "ckpt.pt")
    first = open_model(tmp_path / "ckpt.pt")
    assert first.moments
    assert (first.moments.t, first.moments.step) == (2, 2)
    convert(tmp_path / "ckpt.pt", tmp_path / "folder")
    assert convert(tmp_path / "folder", tmp_path / "back.pt").notes == []
    again = open_model(tmp_path / "back.pt")
    same(first, again)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    there = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for key in ("model_args", "iter_num", "best_val_loss", "config"):
        assert back[key] == there[key], key
    for name, tensor in there["model"].items():
        assert torch.equal(back["model"][name], tensor), name
    assert back["model"]["lm_head.weight"].data_ptr() == back["model"]["transformer.wte.weight"].data_ptr()
    convert(tmp_path / "back.pt", tmp_path / "second")
    same(first, open_model(tmp_path / "second"))


def test_a_checkpoint_of_ours_is_what_nanogpt_loads(tmp_path: Path) -> None:
    """Strict names, tied head, AdamW's state; then both do the same step."""
    c = CONFIGS["bias"]
    peer = NanoGPT(c)
    optimizer = peer.optimizer(1e-3, (0.9, 0.95), 0.1)
    batch = [(TOKENS[:, :-1], TOKENS[:, 1:])]
    steps(peer, optimizer, batch * 3)
    torch.save(content(c, peer, optimizer, iter_num=3), tmp_path / "ckpt.pt")
    convert(tmp_path / "ckpt.pt", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.pt")
    made = torch.load(tmp_path / "back.pt", weights_only=True)
    twin = NanoGPT(c)
    twin.load_state_dict(made["model"])
    own = twin.optimizer(1.0, (0.1, 0.1), 0.7)
    own.load_state_dict(made["optimizer"])
    assert [group["weight_decay"] for group in own.param_groups] == [0.1, 0.0]
    assert own.param_groups[0]["betas"] == (0.9, 0.95)
    assert steps(twin, own, batch * 2) == steps(peer, optimizer, batch * 2)


def test_without_moments_nanogpt_begins_with_fresh_ones(tmp_path: Path) -> None:
    c = CONFIGS["no-bias"]
    torch.save(content(c, NanoGPT(c, bias=False)), tmp_path / "ckpt.pt")
    nanogpt.write(open_model(tmp_path / "ckpt.pt"), tmp_path / "back.pt", Options())
    twin = NanoGPT(c, bias=False).optimizer(1e-3, (0.9, 0.95), 0.1)
    twin.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True)["optimizer"])
    assert not twin.state


RECIPE = """
[data]
source = "text.txt"
tokenizer = "char"
[optim]
lr = 2e-3
schedule = "constant"
warmup = 0
beta2 = 0.95
[train]
batch_size = 4
steps = 6
eval_every = 0
save_every = 0
[sample]
max_tokens = 0
"""


@pytest.fixture(scope="module")
def nanogpt_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """nanoGPT's steps 1 to 6 on the batches of a recipe, their losses, and its ckpt.pt after step 3 as a folder."""
    place = tmp_path_factory.mktemp("nanogpt")
    rows = np.random.default_rng(1).integers(0, 26, (200, 20))
    (place / "text.txt").write_text("\n".join("".join(chr(97 + i) for i in row) for row in rows))
    (place / "recipe.toml").write_text(RECIPE.replace("text.txt", str(place / "text.txt")))
    recipe = build(read_toml(place / "recipe.toml"))
    source, tokenizer = token_source.open_data(recipe.data, 16, recipe.train)
    assert tokenizer
    c = tiny(activation="gelu", block_size=16, vocab_size=tokenizer.n_vocab, **NO_BIAS)
    peer = NanoGPT(c, bias=False)
    optimizer = peer.optimizer(2e-3, (0.9, 0.95), 0.1)
    batches = [(batch.tokens, batch.targets) for batch in map(source.batch, range(1, 7))]
    losses = steps(peer, optimizer, batches[:3])
    saved = copy.deepcopy(content(c, peer, optimizer, iter_num=3))
    torch.save(saved, place / "ckpt.pt")
    losses += steps(peer, optimizer, batches[3:])
    convert(place / "ckpt.pt", place / "folder")
    return place, losses


def continued(place: Path, folder: Path, out: Path, backend: str, *more: str) -> list[float]:
    """The losses of steps 4 to 6 here."""
    argv = ["train", str(place / "recipe.toml"), "--init-from", str(folder), "--out", str(out), "--backend", backend]
    assert cli.main([*argv, "--device", "cpu", *more]) == 0
    lines = metrics.read_lines(out / metrics.FILE)
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_nanogpt_run_goes_on_here(
    backend: str, nanogpt_run: tuple[Path, list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, expected = nanogpt_run
    found = continued(place, place / "folder", tmp_path / "run", backend, "--moments")
    assert len(found) == 3
    assert np.abs(np.array(found) - expected[3:]).max() < 2e-5
    said = capsys.readouterr().out
    assert "starts after step 3 with its optimizer's moments, 3 updates" in said
    assert "where" not in said  # the recipe's settings are nanoGPT's


def test_the_gate_sees_moments_that_are_not_these(nanogpt_run: tuple[Path, list[float]], tmp_path: Path) -> None:
    """Counter-cases: without the moments, and with the two groups in the other order."""
    place, expected = nanogpt_run
    found = continued(place, place / "folder", tmp_path / "without", "torch", "--set", "train.steps=3")
    assert np.abs(np.array(found) - expected[3:]).max() > 1e-3
    made = torch.load(place / "ckpt.pt", weights_only=True)
    first, second = made["optimizer"]["param_groups"]
    first["params"], second["params"] = second["params"], first["params"]
    torch.save(made, tmp_path / "swapped.pt")
    opened = open_model(tmp_path / "swapped.pt")
    assert opened.moments is None
    assert "the moments are left behind" in opened.notes[0]


def broken(tmp_path: Path, change: Any) -> Path:
    c = CONFIGS["bias"]
    made = content(c, NanoGPT(c))
    change(made)
    torch.save(made, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x["model"].pop("transformer.h.1.ln_2.weight"), "transformer.h.1.ln_2.weight is missing"),
        (lambda x: x["model"].update(more=torch.zeros(3)), "unexpected tensor more [3]"),
        (lambda x: x["model_args"].update(n_embd=24), "wte.weight has shape [80, 48], expected [80, 24]"),
        (lambda x: x["model_args"].update(n_layer=10**12), "n_layer = 1000000000000, but the file has"),
        (lambda x: x["model_args"].update(n_head=7), "model_args: model.n_embd = 48: expected a multiple"),
        (lambda x: x["model_args"].update(n_head="4"), "n_head = '4': expected a positive whole number"),
        (lambda x: x["model_args"].update(use_rmsnorm=True), "'use_rmsnorm' = True is not nanoGPT's"),
        (lambda x: x["model"].update({"lm_head.weight": torch.ones(80, 48)}), "differs from transformer.wte.weight"),
        (
            lambda x: x.update(model=["transformer.wte.weight"]),
            "model: list, expected tensors by name",
        ),
        (
            lambda x: x["model"].update({"transformer.ln_f.bias": "x"}),
            "'transformer.ln_f.bias': str, expected a tensor",
        ),
        (
            lambda x: x["model"].update({"transformer.wpe.weight": torch.zeros(1).expand(32, 48)}),
            "transformer.wpe.weight: [32, 48] values that the file does not hold",
        ),
        (
            lambda x: x["model"].update({"transformer.ln_f.bias": torch.zeros(48, dtype=torch.int64)}),
            "transformer.ln_f.bias: torch.int64, expected one of float32",
        ),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(change: Any, expected: str, tmp_path: Path) -> None:
    path = broken(tmp_path, change)
    with pytest.raises(UserError) as caught:
        open_model(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x["optimizer"]["param_groups"].pop(), "1 groups of parameters, expected 10 and 18 in 2"),
        (lambda x: x["optimizer"]["state"][0].update(step="x"), "step: expected one whole number"),
        (lambda x: x["optimizer"]["state"][3].pop("exp_avg"), "parameter 3, h.0.attn.c_proj.weight: expected step"),
        (lambda x: x["optimizer"]["state"][1].update(exp_avg=7), "exp_avg: int, expected a tensor"),
        (lambda x: x["optimizer"]["state"][1].update(exp_avg=torch.zeros(2)), "has shape [2], expected [32, 48]"),
        (lambda x: x.update(iter_num=None), "iter_num = None: expected a whole number"),
        (lambda x: x.update(optimizer=3), "expected an optimizer's state and param_groups"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_left_behind_and_said(change: Any, expected: str, tmp_path: Path) -> None:
    c = CONFIGS["bias"]
    peer = NanoGPT(c)
    optimizer = peer.optimizer(1e-3, (0.9, 0.95), 0.1)
    steps(peer, optimizer, [(TOKENS[:, :-1], TOKENS[:, 1:])])
    made = content(c, peer, optimizer, iter_num=1)
    change(made)
    torch.save(made, tmp_path / "ckpt.pt")
    opened = open_model(tmp_path / "ckpt.pt")
    assert opened.moments is None
    assert expected in opened.notes[-1]
    assert opened.notes[-1].endswith("the moments are left behind")


class Bomb:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple:
        return (print, ("a pickle ran",))


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken(tmp_path, lambda x: x.update(config=Bomb()))
    capsys.readouterr()
    with pytest.raises(UserError, match="ckpt.pt: holds .*print, expected tensors and plain values only"):
        open_model(path)
    assert "a pickle ran" not in capsys.readouterr().out


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    whole = broken(tmp_path, lambda x: None).read_bytes()
    for name, raw in {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"transformer.wte.weight",
        "pickle": pickle.dumps({"model_args": {}, "transformer.wte.weight": 1}),
    }.items():
        (tmp_path / name).write_bytes(raw)
        assert not nanogpt.recognize(tmp_path / name)
        with pytest.raises(UserError, match="truncated, or no file of torch.save"):
            nanogpt.read(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "deflated", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt/data.pkl", b"0" * 10**6)
    with pytest.raises(UserError, match="1000000 bytes, not stored as torch.save does"):
        nanogpt.read(tmp_path / "deflated")
    with zipfile.ZipFile(tmp_path / "other", "w") as archive:
        archive.writestr("word/document.xml", b"<xml/>")
    with pytest.raises(UserError, match="with 0 data.pkl"):
        nanogpt.read(tmp_path / "other")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, "model.activation = 'gelu_tanh': nanoGPT has only 'gelu'; its code computes erf GELU and no other"),
        ({"family": "llama"}, "model.family = 'llama': nanoGPT has only 'gpt2'"),
        ({"activation": "gelu", "tied": False}, "model.tied = False: nanoGPT has only True"),
        ({"activation": "gelu", "n_hidden": 80}, "model.n_hidden = 80: nanoGPT has only 192"),
        ({"activation": "gelu", "norm_eps": 1e-6}, "model.norm_eps = 1e-06: nanoGPT has only 1e-05"),
        ({"activation": "gelu", "qkv_bias": False}, "model.qkv_bias = False: nanoGPT has only True"),
    ],
)
def test_what_nanogpt_cannot_say_is_refused_before_a_byte(model: Mapping, expected: str, tmp_path: Path) -> None:
    opened = Opened(tmp_path, "hf", tiny(**model), {}, ())
    with pytest.raises(UserError) as caught:
        nanogpt.write(opened, tmp_path / "out.pt", Options())
    assert expected in str(caught.value)
    assert not (tmp_path / "out.pt").exists()


def test_nan_is_refused_or_counted(tmp_path: Path) -> None:
    def spoil(x: dict) -> None:
        x["model"]["transformer.ln_f.bias"][3] = float("nan")

    opened = open_model(broken(tmp_path, spoil))
    with pytest.raises(UserError, match=r"ln_f.bias: 1 values are not finite"):
        nanogpt.write(opened, tmp_path / "out.pt", Options())
    options = Options(allow_nan=True)
    nanogpt.write(opened, tmp_path / "out.pt", options)
    assert options.bad == {"ln_f.bias": 1}
    report = convert(tmp_path / "ckpt.pt", tmp_path / "again.pt", allow_nan=True)
    assert [note for note in report.notes if "finite" in note] == ["ln_f.bias: 1 values are not finite (NaN or Inf)"]


def test_bfloat16_goes_through_and_a_dtype_is_cast(tmp_path: Path) -> None:
    c = CONFIGS["bias"]
    torch.save(content(c, NanoGPT(c).bfloat16()), tmp_path / "ckpt.pt")
    first = open_model(tmp_path / "ckpt.pt")
    assert first.tensors["wte.weight"].dtype.name == "bfloat16"
    nanogpt.write(first, tmp_path / "back.pt", Options())
    same(first, open_model(tmp_path / "back.pt"))
    nanogpt.write(first, tmp_path / "wide.pt", Options(dtype="float32"))
    wide = open_model(tmp_path / "wide.pt").tensors["wte.weight"].read()
    assert (wide == first.tensors["wte.weight"].read().astype(np.float32)).all()


def test_what_is_written_is_what_torch_save_writes(tmp_path: Path) -> None:
    """Structure by PyTorch, tensors block by block: every byte but the id that PyTorch derives from the checksums."""
    c = CONFIGS["bias"]
    torch.save(content(c, NanoGPT(c)), tmp_path / "ckpt.pt")
    convert(tmp_path / "ckpt.pt", tmp_path / "back.pt")
    with open(tmp_path / "peer.pt", "wb") as file:
        torch.save(torch.load(tmp_path / "back.pt", weights_only=True), file)
    with zipfile.ZipFile(tmp_path / "back.pt") as ours, zipfile.ZipFile(tmp_path / "peer.pt") as theirs:
        assert ours.testzip() is None and ours.namelist() == theirs.namelist()
        for one, other in zip(ours.infolist(), theirs.infolist(), strict=True):
            if not one.filename.endswith("serialization_id"):
                assert (one.CRC, one.header_offset) == (other.CRC, other.header_offset)
                assert ours.read(one) == theirs.read(other)


def test_tensors_that_lie_otherwise_are_read(tmp_path: Path) -> None:
    """Views into one storage, transposed ones too, are what they are in PyTorch."""
    c = CONFIGS["bias"]
    made = content(c, NanoGPT(c))
    made["model"] = state = {key: tensor.detach() for key, tensor in made["model"].items()}
    name = "transformer.h.0.attn.c_proj.weight"
    state[name] = state[name].t().contiguous().t()
    both = torch.cat([state["transformer.ln_f.weight"], torch.ones(5), state["transformer.ln_f.bias"]])
    state["transformer.ln_f.weight"], state["transformer.ln_f.bias"] = both[:48], both[53:]
    torch.save(made, tmp_path / "ckpt.pt")
    found = open_model(tmp_path / "ckpt.pt").tensors
    for ours in ("h.0.attn.c_proj.weight", "ln_f.weight", "ln_f.bias"):
        assert np.array_equal(found[ours].read(), state["transformer." + ours].numpy()), ours
