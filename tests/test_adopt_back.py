"""Ready maps, and the way back: a model here as the very file that it came from, with what lay beside its tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_adopt_map import FUSED, MODEL, lazy, ours_of, plain_map

from convert import convert
from convert.adopt import apply, map_file, source
from convert.adopt.maps import moments, opening, ready
from convert.adopt.maps.back import Writer
from convert.adopt.maps.complete import complete
from convert.adopt.rules import Map, Rule
from convert.adopt.source import State
from convert.formats.opened import Opened
from convert.formats.torch_files import adamw
from mlxgpt import cli
from mlxgpt.common.errors import RunError
from mlxgpt.common.recipes import read_toml

SIZES: dict[str, Any] = dict(n_layer=2, n_head=4, n_embd=16, n_hidden=24, vocab_size=20, block_size=12)


def ready_map(name: str) -> Map:
    """A ready map of a small model, with every tensor that may be there."""
    values = read_toml(ready.files()[name])
    rules = [ready.rule_of(theirs, value) for theirs, value in values["tensors"].items()]
    model: dict[str, Any] = {"family": "mlxgpt", "tied": False, **values["model"], **SIZES}
    for choice in values.get("choices", {}).values():
        model |= {key: value for key, value in choice[0].items() if key != "label"}
    model = {key: ready.derived(value, model) for key, value in model.items()}
    model |= ready.flags(rules)
    if model["tied"]:
        rules = [Rule(rule.theirs, ("wte.weight",)) if rule.to == ("lm_head.weight",) else rule for rule in rules]
    return Map(tuple(rules), model, rope=values.get("source", {}).get("rope", "halves"))


@pytest.mark.parametrize("name", ready.files())
def test_a_ready_map_is_recognized_by_its_names(name: str, tmp_path: Path) -> None:
    made = ready_map(name)
    ours = ours_of(dict(made.model))
    theirs = apply.scatter(made, ours)
    torch.save({"model": {key: torch.from_numpy(array) for key, array in theirs.items()}}, tmp_path / "x.pt")
    state = source.read(tmp_path / "x.pt")
    found = ready.propose(state)
    assert found is not None and found.notes[0] == f"recognized as {read_toml(ready.files()[name])['ready']['of']}"
    sizes = {key: found.map.model[key] for key in SIZES if key != "block_size" or "wpe.weight" in ours}
    assert sizes == {key: SIZES[key] for key in sizes}
    again = apply.gather(found.map, state.tensors)
    assert all(np.array_equal(again[key], array) for key, array in ours.items())


def test_names_that_are_almost_a_ready_map_s_are_none(tmp_path: Path) -> None:
    made = ready_map("mingpt_2020")
    theirs = apply.scatter(made, ours_of(dict(made.model)))
    for change in (
        lambda x: x.pop("blocks.1.ln2.bias"),
        lambda x: x.update({"blocks.0.extra.weight": np.zeros((3, 3), np.float32)}),
        lambda x: x.update({"pos_emb": np.zeros((1, 12, 15), np.float32)}),
        lambda x: x.update({"pos_emb": np.zeros((12, 16), np.float32)}),
    ):
        broken = dict(theirs)
        change(broken)
        assert ready.propose(State(tmp_path, "pt", lazy(broken), ())) is None


def same(one: Any, other: Any, where: str = "") -> None:
    """Equal in every tensor's bits and dtype, and in every plain value."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, Mapping):
        assert set(one) == set(other), (where, set(one) ^ set(other))
        for key, value in one.items():
            same(value, other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for at, (left, right) in enumerate(zip(one, other, strict=True)):
            same(left, right, f"{where}.{at}")
    else:
        assert one == other, where


def optimizer_of(names: list[list[str]], theirs: Mapping[str, np.ndarray], t: int = 3) -> dict[str, Any]:
    """The state of an AdamW of these groups, with numbers that name and position decide."""
    draw = np.random.default_rng(1)
    kept = {}
    for key in "mv":
        values = {
            name: np.abs(draw.standard_normal(theirs[name].shape)).astype(np.float32) for each in names for name in each
        }
        kept[key] = {name: torch.from_numpy(array) for name, array in values.items()}
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    return adamw.write_moments(
        [(each, 0.1 / (at + 1)) for at, each in enumerate(names)], kept["m"], kept["v"], t, settings
    )


@pytest.fixture(scope="module")
def llama2c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as llama2.c's train.py saves it, and out/, what convert makes of it."""
    place = tmp_path_factory.mktemp("llama2c")
    made = ready_map("llama2c")
    made = dataclasses.replace(made, model={**made.model, "tied": True, "n_kv_head": 2})
    made = dataclasses.replace(
        made, rules=tuple(Rule(r.theirs, ("wte.weight",)) if r.theirs == "output.weight" else r for r in made.rules)
    )
    theirs = apply.scatter(made, ours_of(dict(made.model)))
    names = [name for name in theirs if name != "output.weight"]
    state = {name: torch.from_numpy(array) for name, array in theirs.items()}
    state["output.weight"] = state["tok_embeddings.weight"]
    groups = [[name for name in names if theirs[name].ndim > 1], [name for name in names if theirs[name].ndim < 2]]
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "optimizer": optimizer_of(groups, theirs),
        "model_args": {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 12, "dropout": None},
        "iter_num": 7,
        "best_val_loss": 2.5,
        "config": {"out_dir": "out", "itos": {0: "a"}},
    }
    torch.save(content, place / "ckpt.pt")
    convert(place / "ckpt.pt", place / "out")
    return place


def test_a_file_that_a_ready_map_determines_converts_and_comes_back_whole(llama2c: Path) -> None:
    report = convert(llama2c / "out", llama2c / "back.pt", by_map=llama2c / "out" / "map.toml", verify=True)
    assert report.verified and report.notes == []
    original, back = (torch.load(llama2c / name, weights_only=True) for name in ("ckpt.pt", "back.pt"))
    same(original, back)
    assert (
        back["model"]["_orig_mod.output.weight"].data_ptr()
        == back["model"]["_orig_mod.tok_embeddings.weight"].data_ptr()
    )
    assert map_file.read(llama2c / "out" / "map.toml").rope == "pairs"


def test_the_moments_are_those_of_our_tensors(llama2c: Path) -> None:
    opened, whole = opening.known(llama2c / "ckpt.pt") or (None, None)
    assert opened and whole and opened.moments and opened.moments.t == 3 and opened.moments.step == 7
    theirs = torch.load(llama2c / "ckpt.pt", weights_only=True)["optimizer"]["state"]
    first = theirs[1]["exp_avg"].numpy()  # layers.0.attention.wq, whose rows rope pairs
    expected = first.reshape(4, 2, 2, 16).transpose(0, 2, 1, 3).reshape(16, 16)
    assert np.array_equal(opened.moments.m["h.0.attn.q_proj.weight"].read(), expected)


def test_other_containers_have_the_tensors_alone(llama2c: Path) -> None:
    for end in ("safetensors", "npz"):
        report = convert(llama2c / "out", llama2c / f"back.{end}", by_map=llama2c / "out" / "map.toml", verify=True)
        assert "AdamW's moments are left behind" in report.notes[0]
        one, other = (source.read(llama2c / name).tensors for name in ("ckpt.pt", f"back.{end}"))
        assert set(one) == set(other) and all(source.equal(one[name], other[name]) for name in one)


def test_a_model_that_is_not_the_map_s_is_refused(llama2c: Path, tmp_path: Path, capsys: Any) -> None:
    path = str(llama2c / "out" / "map.toml")
    text = Path(path).read_text()
    (tmp_path / "map.toml").write_text(text.replace("vocab_size = 20", "vocab_size = 21"))
    for args, expected in (
        (["--map", str(tmp_path / "map.toml")], r"wte.weight: [20, 16] here, [21, 16] by"),
        (["--map", path, "--to", "nanogpt"], "--to and --map: expected one of them"),
        (["--map", str(tmp_path / "none.toml")], "No such file"),
    ):
        assert cli.main(["convert", str(llama2c / "out"), str(tmp_path / "b.pt"), *args]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and expected in err
    assert cli.main(["convert", str(llama2c / "out"), str(tmp_path / "b.gguf"), "--map", path]) == 2
    assert "expected a name that ends in .pt, .pth" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["map.toml"]


GROUPINGS: dict[str, Callable[[dict[str, np.ndarray]], list[list[str]]]] = {
    "one": lambda x: [list(x)],
    "matrices": lambda x: [[name for name in x if x[name].ndim > 1], [name for name in x if x[name].ndim < 2]],
    "linear": lambda x: [
        sorted(name for name in x if x[name].ndim > 1 and name not in ("wte.weight", "wpe.weight")),
        sorted(name for name in x if x[name].ndim < 2 or name in ("wte.weight", "wpe.weight")),
    ],
}


@pytest.mark.parametrize("kind", GROUPINGS)
def test_an_optimizer_s_positions_are_found_and_written_again(kind: str) -> None:
    theirs = apply.scatter(FUSED, ours_of(MODEL))
    optimizer = optimizer_of(GROUPINGS[kind](theirs), theirs)
    state = State(
        Path("x.pt"), "pt", lazy(theirs), (), optimizer=optimizer, optimizer_at=("optimizer",), beside={"iter": 4}
    )
    whole = complete(FUSED, state)
    assert whole.map.optimizer and whole.map.optimizer.groups == kind and whole.moments and whole.moments.step == 4
    expected = [name for each in GROUPINGS[kind](theirs) for name in each]
    for at, name in enumerate(expected):
        if name in whole.moments.v:
            assert np.array_equal(whole.moments.v[name].read(), optimizer["state"][at]["exp_avg_sq"].numpy()), name
    config = apply.config_of(MODEL)
    again = moments.write(whole.map, whole.moments, config, lambda _, each: torch.from_numpy(each.read()))
    same(optimizer, again)


def test_an_optimizer_of_other_parameters_is_left_behind_with_a_note() -> None:
    theirs = apply.scatter(FUSED, ours_of(MODEL))
    names = list(theirs)
    names[0], names[2] = names[2], names[0]
    for optimizer in (
        optimizer_of([names], theirs),
        optimizer_of([names[1:]], theirs),
        {"state": {0: {}}, "param_groups": []},
    ):
        state = State(Path("x.pt"), "pt", lazy(theirs), (), optimizer=optimizer, optimizer_at=("optimizer",))
        whole = complete(FUSED, state)
        assert whole.moments is None and whole.map.optimizer is None
        assert whole.notes[0].startswith("x.pt: optimizer") and whole.notes[0].endswith("the moments are left behind")


def written(state: Mapping[str, Any], made: Map, place: Path, end: str = "pt") -> Opened:
    """The model of a file by a map, and its folder's map beside."""
    if end == "safetensors":
        save_file(dict(state), place / "x.safetensors")
    else:
        torch.save(state, place / f"x.{end}")
    read = source.read(place / f"x.{end}")
    whole = complete(made, read)
    map_file.write(place / "map.toml", whole.map, whole.kept)
    config = dataclasses.replace(apply.config_of(made.model), family="mlxgpt")
    return Opened(read.path, "map", config, opening.tensors(whole.map, read, config), read.files)


def test_dtypes_come_back_where_no_value_changes_by_it(tmp_path: Path, monkeypatch: Any) -> None:
    import convert.conversion as conversion

    theirs = {name: torch.from_numpy(array) for name, array in apply.scatter(FUSED, ours_of(MODEL)).items()}
    theirs["wpe.weight"] = theirs["wpe.weight"].double()
    theirs["qkv.1"] = theirs["qkv.1"].bfloat16()
    opened = written(theirs, FUSED, tmp_path)
    monkeypatch.setattr(conversion, "open_model", lambda *_: opened)
    convert("x", tmp_path / "back.pt", by_map=tmp_path / "map.toml")
    same(theirs, torch.load(tmp_path / "back.pt", weights_only=True))
    name = "h.1.attn.q_proj.weight"
    trained = lazy({name: np.full(opened.tensors[name].shape, 1 / 3, np.float32)})
    moved = dataclasses.replace(opened, tensors={**opened.tensors, **trained})
    monkeypatch.setattr(conversion, "open_model", lambda *_: moved)
    report = convert("x", tmp_path / "moved.pt", by_map=tmp_path / "map.toml")
    assert any("1 tensors are float32, where the file had bfloat16" in note for note in report.notes)
    assert torch.load(tmp_path / "moved.pt", weights_only=True)["qkv.1"].dtype == torch.float32


def test_nested_dicts_and_masks_come_back(tmp_path: Path, monkeypatch: Any) -> None:
    import convert.conversion as conversion

    theirs = apply.scatter(plain_map(MODEL), ours_of(MODEL))
    tree: dict[str, Any] = {"h": [{}, {}]}
    for name, array in theirs.items():
        *words, last = name.split(".")
        here: Any = tree
        for word in words:
            here = here[int(word)] if word.isdigit() else here.setdefault(word, {})
        here[last] = torch.from_numpy(array)
    for block in tree["h"]:
        block["mask"] = torch.full((7, 7), -torch.inf).triu(1)
    content = {"params": tree, "step": 3}
    made = dataclasses.replace(plain_map(MODEL), left={"h.{n}.mask": "causal mask"})
    opened = written(content, made, tmp_path)
    monkeypatch.setattr(conversion, "open_model", lambda *_: opened)
    convert("x", tmp_path / "back.pt", by_map=tmp_path / "map.toml", verify=True)
    same(content, torch.load(tmp_path / "back.pt", weights_only=True))


def test_a_difference_that_verify_must_see(llama2c: Path, tmp_path: Path) -> None:
    writer = Writer(llama2c / "out" / "map.toml", tmp_path / "x.pt")
    opened, _ = opening.known(llama2c / "ckpt.pt") or (None, None)
    assert opened
    content = torch.load(llama2c / "ckpt.pt", weights_only=True)
    content["model"]["_orig_mod.norm.weight"][3] += 1e-6
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(RunError, match="ln_f.weight: read back, it differs"):
        writer.verify(opened, tmp_path / "x.pt")
