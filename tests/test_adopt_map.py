"""Their tensors as ours and back: exact inverses for every way in which tensors lie; a map that is wrong says where."""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.adopt import apply, map_file
from convert.adopt.maps import buffers
from convert.adopt.maps.complete import complete
from convert.adopt.rules import ROPES, Buffer, Choice, Map, Optimizer, Option, Proposal, Rule, chosen, named
from convert.adopt.source import State
from convert.formats.opened import Tensor
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params

MODEL: dict[str, Any] = dict(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=12, head_dim=6, n_hidden=20, vocab_size=10, block_size=7, norm="layer",
    position="learned", qkv_bias=True, tied=False,
)  # fmt: skip
Q, K, V = (f"h.{{n}}.attn.{each}_proj" for each in "qkv")


def lazy(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {
        name: Tensor(array.shape, array.dtype, functools.partial(np.asarray, array)) for name, array in arrays.items()
    }


def ours_of(model: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    table = params.table(apply.config_of(model))
    return {name: draw.standard_normal(param.shape).astype(np.float32) for name, param in table.items()}


def pattern_of(name: str) -> str:
    words = name.split(".")
    return ".".join(["h", "{n}", *words[2:]]) if words[0] == "h" else name


def plain_map(model: dict[str, Any], **changes: Any) -> Map:
    """Every tensor under our own name."""
    names = dict.fromkeys(pattern_of(name) for name in params.table(apply.config_of(model)))
    return Map(tuple(Rule(name, (name,)) for name in names), model, **changes)


def with_rules(base: Map, *rules: Rule) -> Map:
    """``base`` with ``rules`` in the place of those that give the same of ours."""
    taken = {name for rule in rules for name in rule.to}
    return dataclasses.replace(
        base, rules=(*(rule for rule in base.rules if not taken & set(rule.to)), *rules)
    )  # fmt: skip


def there_and_back(made: Map, seed: int = 0) -> dict[str, np.ndarray]:
    """Their tensors of random ours, which are the same ones again once read."""
    ours = ours_of(dict(made.model), seed)
    theirs = apply.scatter(made, ours)
    again = apply.gather(made, lazy(theirs))
    assert list(again) == list(ours)
    for name, array in ours.items():
        assert again[name].dtype == array.dtype and np.array_equal(again[name], array), name
    back = apply.scatter(made, again)
    for name, array in theirs.items():
        assert np.array_equal(back[name], array), name
    return theirs


def test_a_fused_matrix_of_grouped_heads_is_q_then_k_then_v() -> None:
    made = with_rules(
        plain_map(MODEL), Rule("qkv.{n}.w", tuple(f"{each}.weight" for each in (Q, K, V)), "(p o) i")
    )  # fmt: skip
    ours, theirs = ours_of(MODEL), there_and_back(made)
    parts = [ours[f"h.1.attn.{each}_proj.weight"] for each in "qkv"]
    assert np.array_equal(theirs["qkv.1.w"], np.concatenate(parts))


def test_groups_hold_their_queries_their_key_and_their_value() -> None:
    made = with_rules(plain_map(MODEL), Rule("w.{n}", tuple(f"{each}.weight" for each in (Q, K, V)), "(g p d) i"))
    ours, theirs = ours_of(MODEL), there_and_back(made)
    q, k, v = (ours[f"h.0.attn.{each}_proj.weight"] for each in "qkv")
    groups = [np.concatenate([q[g * 12 : g * 12 + 12], k[g * 6 : g * 6 + 6], v[g * 6 : g * 6 + 6]]) for g in range(2)]
    assert np.array_equal(theirs["w.0"], np.concatenate(groups))
    by_head = change(made, "w.{n}", axes="(g p h d) i")
    assert np.array_equal(there_and_back(by_head)["w.0"], theirs["w.0"])


def test_kernels_of_einsum_have_an_axis_of_heads() -> None:
    made = with_rules(
        plain_map(MODEL),
        Rule("q.{n}", (f"{Q}.weight",), "i h d"),
        Rule("k.{n}", (f"{K}.weight",), "h i d"),
        Rule("k_bias.{n}", (f"{K}.bias",), "h d"),
        Rule("o.{n}", ("h.{n}.attn.c_proj.weight",), "h d o"),
    )
    ours, theirs = ours_of(MODEL), there_and_back(made)
    assert theirs["q.0"].shape == (12, 4, 6) and theirs["k.0"].shape == (2, 12, 6) and theirs["o.0"].shape == (4, 6, 12)
    assert theirs["q.1"][3, 2, 1] == ours["h.1.attn.q_proj.weight"][2 * 6 + 1, 3]
    assert theirs["o.1"][3, 2, 1] == ours["h.1.attn.c_proj.weight"][1, 3 * 6 + 2]
    assert theirs["k_bias.1"][1, 4] == ours["h.1.attn.k_proj.bias"][6 + 4]


def test_a_tensor_a_head_has_its_rows() -> None:
    made = with_rules(
        plain_map(MODEL),
        Rule("heads.{n}.{h}.q", (f"{Q}.weight",)),
        Rule("heads.{n}.{h}.kv", (f"{K}.weight", f"{V}.weight"), "i (p d)"),
    )
    ours, theirs = ours_of(MODEL), there_and_back(made)
    assert sum(name.startswith("heads.0") for name in theirs) == 4 + 2
    assert np.array_equal(theirs["heads.1.3.q"], ours["h.1.attn.q_proj.weight"][18:])
    assert np.array_equal(theirs["heads.0.1.kv"][:, 6:], ours["h.0.attn.v_proj.weight"][6:].T)


def test_stacked_blocks_are_one_tensor() -> None:
    made = with_rules(
        plain_map(MODEL),
        Rule("blocks.qkv", tuple(f"{each}.weight" for each in (Q, K, V)), "n i (p h d)"),
        Rule("blocks.norm", ("h.{n}.ln_1.weight",), "n o"),
    )
    ours, theirs = ours_of(MODEL), there_and_back(made)
    assert theirs["blocks.qkv"].shape == (2, 12, 48)
    assert np.array_equal(theirs["blocks.qkv"][1, :, 24:36], ours["h.1.attn.k_proj.weight"].T)
    assert np.array_equal(theirs["blocks.norm"][1], ours["h.1.ln_1.weight"])


def test_axes_of_one_come_and_go() -> None:
    made = with_rules(
        plain_map(MODEL),
        Rule("pos", ("wpe.weight",), "1 o i"),
        Rule("fc.{n}", ("h.{n}.mlp.c_fc.weight",), "o i 1"),
        Rule("norm", ("ln_f.weight",), "1 1 o"),
    )
    theirs = there_and_back(made)
    assert [theirs[name].shape for name in ("pos", "fc.0", "norm")] == [(1, 7, 12), (20, 12, 1), (1, 1, 12)]


@pytest.mark.parametrize("rotary", [0, 4])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_of_any_pairing_gives_the_same_scores(rope: str, rotary: int) -> None:
    model = MODEL | dict(position="rope", rotary_dim=rotary)
    made = plain_map(model, rope=rope)
    theirs, ours = there_and_back(made), ours_of(model)
    size = rotary or 6
    x = np.random.default_rng(1).standard_normal((5, 12))

    def scores(arrays: Mapping[str, np.ndarray], turn: Any) -> np.ndarray:
        q = x @ arrays["h.0.attn.q_proj.weight"].T + arrays["h.0.attn.q_proj.bias"]
        k = x @ arrays["h.0.attn.k_proj.weight"].T + arrays["h.0.attn.k_proj.bias"]
        return turn(q[:, 6:12]) @ turn(k[:, :6]).T

    def turned(x: np.ndarray, pairing: str) -> np.ndarray:
        first, second = (
            (np.arange(0, size, 2), np.arange(1, size, 2))
            if pairing.startswith("pairs")
            else (np.arange(size // 2), np.arange(size // 2, size))
        )
        angle = np.arange(5)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        sign = -1 if pairing.endswith("reversed") else 1
        made = x.copy()
        made[:, first] = x[:, first] * np.cos(angle) - sign * x[:, second] * np.sin(angle)
        made[:, second] = x[:, second] * np.cos(angle) + sign * x[:, first] * np.sin(angle)
        return made

    expected = scores(theirs, lambda x: turned(x, rope))
    assert np.allclose(scores(ours, lambda x: turned(x, "halves")), expected, rtol=1e-12, atol=1e-12)
    other = next(each for each in ROPES if each != rope)
    assert not np.allclose(scores(theirs, lambda x: turned(x, other)), expected)


MATRIX = ("", "o i", "i o", "1 o i", "o i 1")
AXES: dict[tuple[str, ...], tuple[str, ...]] = {
    (f"{Q}.weight",): (*MATRIX, "h d i", "i h d", "h i d", "(h d) i", "i (h d)"),
    (f"{K}.weight", f"{V}.weight"): ("(p o) i", "p o i", "i p h d", "(h p d) i", "i (h p d)", "p h i d", "i (h d p)"),
    (f"{Q}.weight", f"{K}.weight", f"{V}.weight"): ("(p o) i", "(p h d) i", "i (p o)", "(g p d) i", "(g p h d) i", ""),
    (f"{Q}.bias", f"{K}.bias", f"{V}.bias"): ("", "(p o)", "(p h d)", "(g p d)", "1 (p o)"),
    ("h.{n}.attn.c_proj.weight",): (*MATRIX, "h d o", "o h d", "h o d", "(h d) o"),
    ("h.{n}.mlp.c_gate.weight", "h.{n}.mlp.c_fc.weight"): ("(p o) i", "(o p) i", "p o i", "i (p o)", "i p o", "i o p"),
    ("h.{n}.ln_1.weight",): ("", "o", "1 o", "1 1 o"),
    ("wte.weight",): MATRIX,
}  # fmt: skip
HEADS = ("d i", "i d", "")


@st.composite
def maps(draw: st.DrawFn) -> Map:
    kv = draw(st.sampled_from([1, 2, 4]))
    rope = draw(st.sampled_from(ROPES))
    model = MODEL | dict(n_kv_head=kv, gated=True, qk_norm=draw(st.sampled_from(["none", "head", "full"])))
    model |= dict(position="rope", rotary_dim=draw(st.sampled_from([0, 2, 4]))) if rope != "halves" else {}
    made, i = plain_map(model, rope=rope), 0
    for to, axes in AXES.items():
        stacked, lies = draw(st.booleans()) and to != ("wte.weight",), draw(st.sampled_from(axes))
        if to[0].startswith(Q) and "(h p" in lies and kv != 4:
            continue
        if len(to) == 1 and to[0].startswith(Q) and draw(st.booleans()):
            rule = Rule(f"x{i}.{{n}}.{{h}}", to, draw(st.sampled_from(HEADS)))
        elif stacked and lies:
            rule = Rule(f"x{i}", to, f"n {lies}")
        else:
            rule = Rule(f"x{i}.{{n+1}}" if to != ("wte.weight",) else f"x{i}", to, lies)
        if any(set(rule.to) & set(other.to) and len(other.to) > 1 for other in made.rules):
            continue
        made, i = with_rules(made, rule), i + 1
    return made


@settings(max_examples=60, deadline=None)
@given(maps())
def test_any_map_is_inverted_bit_for_bit(made: Map) -> None:
    there_and_back(made)


def test_a_head_that_is_the_embedding_is_written_twice_and_must_be_equal() -> None:
    base = plain_map(MODEL | dict(tied=True))
    made = dataclasses.replace(base, rules=(*base.rules, Rule("head.weight", ("wte.weight",))))
    theirs = there_and_back(made)
    assert np.array_equal(theirs["head.weight"], theirs["wte.weight"])
    theirs["head.weight"] = theirs["head.weight"].copy()
    theirs["head.weight"][3, 2] += 1e-6
    with pytest.raises(UserError, match=r"head\.weight: differs from wte\.weight, and both are wte\.weight here"):
        apply.gather(made, lazy(theirs))


def test_narrow_floats_stay_and_wide_ones_are_rounded() -> None:
    made = plain_map(MODEL)
    theirs: dict[str, np.ndarray] = dict(apply.scatter(made, ours_of(MODEL)))
    theirs["wte.weight"] = theirs["wte.weight"].astype(ml_dtypes.bfloat16)
    theirs["wpe.weight"] = theirs["wpe.weight"].astype(np.float64) * (1 + 1e-12)
    ours = apply.gather(made, lazy(theirs))
    assert ours["wte.weight"].dtype == ml_dtypes.bfloat16 and ours["wpe.weight"].dtype == np.float32
    assert np.array_equal(ours["wpe.weight"], theirs["wpe.weight"].astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_counted(value: float) -> None:
    made = plain_map(MODEL)
    theirs = apply.scatter(made, ours_of(MODEL))
    theirs["h.1.mlp.c_fc.weight"] = theirs["h.1.mlp.c_fc.weight"].copy()
    theirs["h.1.mlp.c_fc.weight"][0, :2] = value
    with pytest.raises(UserError, match=r"^h\.1\.mlp\.c_fc\.weight: 2 of 240 values are not finite"):
        apply.gather(made, lazy(theirs))


def change(made: Map, name: str, **to: Any) -> Map:
    return dataclasses.replace(
        made, rules=tuple(dataclasses.replace(rule, **to) if rule.theirs == name else rule for rule in made.rules)
    )  # fmt: skip


FUSED = with_rules(plain_map(MODEL), Rule("qkv.{n}", tuple(f"{each}.weight" for each in (Q, K, V)), "(p o) i"))
WRONG = {
    "letter": (change(FUSED, "qkv.{n}", axes="(p o) z"), r"qkv\.\{n\}: axes '\(p o\) z': unknown letter 'z'"),
    "parenthesis": (change(FUSED, "qkv.{n}", axes="(p o i"), r"qkv\.\{n\}: axes '\(p o i': not letters"),
    "twice a letter": (change(FUSED, "qkv.{n}", axes="(p o) o"), "o is there twice"),
    "no inputs": (change(FUSED, "qkv.{n}", axes="(p o)"), "i is missing"),
    "no pieces": (change(FUSED, "qkv.{n}", axes="o i"), "o differs between pieces|for 3 pieces: expected p once"),
    "unequal": (change(FUSED, "qkv.{n}", axes="(o p) i"), "o differs between pieces"),
    "shape": (change(FUSED, "qkv.{n}", axes="i (p o)"), r"qkv\.0: has shape \[48, 12\], expected \[12, 48\] for"),
    "our name": (change(FUSED, "wpe.weight", to=("wqe.weight",)), r"wpe\.weight: wqe\.weight is no tensor"),
    "no tensor": (change(FUSED, "wpe.weight", theirs="pos.weight"), r"pos\.weight: no tensor pos\.weight"),
    "twice": (change(FUSED, "ln_f.bias", theirs="ln_f.weight"), r"ln_f\.weight: maps twice"),
    "no rule": (
        dataclasses.replace(FUSED, rules=tuple(rule for rule in FUSED.rules if rule.theirs != "ln_f.bias")),
        r"ln_f\.bias \[12\]: no rule takes it",
    ),
    "left and taken": (dataclasses.replace(FUSED, left={"ln_f.bias": "?"}), r"ln_f\.bias: maps twice, by .* left out"),
    "not given": (dataclasses.replace(FUSED, model=MODEL | dict(norm_bias=False)), r"ln_1\.bias is no tensor"),
    "missing": (dataclasses.replace(FUSED, model=MODEL | dict(head_bias=True)), r"lm_head\.bias \[10\]: no tensor of"),
    "unknown field": (dataclasses.replace(FUSED, model=MODEL | dict(n_heads=4)), "model.n_heads: unknown.*n_head"),
    "heads": (change(FUSED, "qkv.{n}", axes="(h p d) i"), "h differs between pieces"),
    "rope": (dataclasses.replace(FUSED, rope="thirds"), "rope = 'thirds': expected one of halves"),
    "block": (change(FUSED, "h.{n}.ln_1.bias", theirs="h.0.ln_1.bias"), r"expected either \{n\} in its name"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_map_says_where(case: str) -> None:
    made, expected = WRONG[case]
    theirs = apply.scatter(FUSED, ours_of(MODEL))
    with pytest.raises(UserError, match=expected) as error:
        apply.gather(made, lazy(theirs))
    assert "\n" not in str(error.value)


def test_options_replace_rules_fields_and_pairing() -> None:
    other = Rule("qkv.{n}", FUSED.rules[-1].to, "(g p d) i")
    options = (
        Option("4 heads", {"n_head": 4}),
        Option("groups", rules={other.theirs: other}),
        Option("", rope="pairs"),
    )
    proposal = Proposal(FUSED, tuple(Choice(str(at), (each,)) for at, each in enumerate(options)))
    made = chosen(proposal.map, options)
    assert made.rules[-1].axes == "(g p d) i" and made.rope == "pairs" and made.model["n_head"] == 4
    assert chosen(FUSED, ()) == FUSED


def states(made: Map, buffers: Mapping[str, np.ndarray] | None = None, **changes: Any) -> State:
    tensors = lazy(apply.scatter(made, ours_of(dict(made.model))) | dict(buffers or {}))
    return State(Path("x.pt"), "pt", tensors, (), **changes)


WHOLE = Map(
    FUSED.rules,
    MODEL | dict(no_rope=(0, 1), rope_theta=5e5, attn_scale=0.25),
    {"m.{n}": 'causal "mask"', "t": "rope"},
    "pairs reversed",
    ("a", "model"),
    "_orig_mod.",
    "npz",
    "/",
    {"": "float32", "ln_f.bias": "bfloat16"},
    {"m.{n}": Buffer("tril", "bool", (1, 1, 7, 7)), "t": Buffer("kept", "complex64", (3, 2))},
    ("ln_f.bias", "wpe.weight"),
    True,
    {
        "iter_num": 3,
        "args": {"n_head": 4, "x": None, "at": [1.5, "b"]},
        "itos": {0: "\n", 1: "\x7f"},
        "odd": {"pairs": 1},
    },
    Optimizer(("opt", "0"), "linear", ({"lr": 1e-3}, {"lr": 1e-3, "eps": 1e-8}), True, ("iter_num",)),
)


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = np.exp(1j * np.arange(6).reshape(3, 2)).astype(np.complex64)
    for made in (FUSED, WHOLE):
        map_file.write(tmp_path / "map.toml", made, {"t": table})
        assert map_file.read(tmp_path / "map.toml") == made
    assert np.array_equal(map_file.read_kept(tmp_path / "map.toml", WHOLE)["t"], table)


@settings(max_examples=20, deadline=None)
@given(maps())
def test_any_map_is_read_as_it_was_written(made: Map) -> None:
    assert map_file.from_toml(tomllib.loads(map_file.to_toml(made))) == made


EDITS = {
    ("[model]", "[models]"): "unknown key models (did you mean 'model'?)",
    ("n_head = ", "n_heads = "): "unknown key model.n_heads (did you mean 'n_head'?)",
    ("n_head = 4", 'n_head = "4"'): "model.n_head = '4': expected int",
    ("kind = ", "knid = "): "unknown key source.knid (did you mean 'kind'?)",
    ('"pt"', '"onnx"'): "source.kind = 'onnx': expected one of pt, safetensors, npz",
    ('"halves"', '"quarters"'): "source.rope = 'quarters': expected one of halves, pairs",
    ("under = []", "under = 3"): "source.under = 3: expected names",
    ("axes = ", "axis = "): "unknown key tensors.qkv.{n}.axis: expected to and axes",
    ("(p o) i", "(p o) j"): "unknown letter 'j'",
    ('"wpe.weight" = "wpe.weight"', '"wpe.weight" = 3'): "tensors.wpe.weight = 3: expected our name",
    (
        '= "wpe.weight"',
        '= "wpq.weight"',
    ): "wpe.weight: wpq.weight is no tensor of this model (did you mean 'wpe.weight'?)",
    ('"wpe.weight" = "wpe.weight"\n', ""): "wpe.weight [7, 12]: no rule takes it",
    ('"ln_f.bias" = ', '"ln_f.weight" = '): "not a TOML file: ",
    ("n_layer = 2", "n_layer = 3"): "h.{n}.ln_1.weight: no tensor h.2.ln_1.weight",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_is_wrong_is_one_line_that_names_the_key(edit: tuple[str, str], tmp_path: Path) -> None:
    text = map_file.to_toml(FUSED)
    assert edit[0] in text
    (tmp_path / "map.toml").write_text(text.replace(*edit))
    shapes = {name: tensor.shape for name, tensor in states(FUSED).tensors.items()}
    with pytest.raises(UserError) as error:
        map_file.read(tmp_path / "map.toml", shapes)
    assert str(error.value).startswith(f"{tmp_path / 'map.toml'}: ")
    assert EDITS[edit] in str(error.value) and "\n" not in str(error.value)


def test_buffers_are_made_again_or_kept_once(tmp_path: Path) -> None:
    square = np.ones((7, 7), bool)
    table = np.cos(np.arange(12, dtype=np.float32)).reshape(6, 2)
    own = {
        "mask.{n}": np.tril(square)[None, None].astype(np.float32),
        "above.{n}": np.triu(square, 1),
        "inf": np.where(np.triu(square, 1), np.float32(-np.inf), np.float32(0)),
        "ids": np.arange(7)[None],
        "low.{n}": np.where(np.triu(square, 1), np.float32(-1e9), np.float32(0)),
        "table": table.astype(ml_dtypes.bfloat16),
        "odd.{n}": np.float32(3),
    }  # fmt: skip
    theirs = {named(name, n): array for name, array in own.items() for n in range(2)}
    theirs["odd.1"] = np.float32(4)
    state = states(FUSED, theirs)
    whole = complete(dataclasses.replace(FUSED, left={**dict.fromkeys(own, "buffer"), "nothing": "?"}), state)
    made, kept = whole.map, whole.kept
    assert [buffer.make for buffer in made.buffers.values()] == [
        "tril", "triu", "-inf", "arange", "kept", "kept", "kept", "kept"
    ]  # fmt: skip
    assert set(kept) == {"low.{n}", "table", "odd.0", "odd.1"}
    map_file.write(tmp_path / "map.toml", made, kept)
    read = map_file.read(tmp_path / "map.toml", {name: tensor.shape for name, tensor in state.tensors.items()})
    again = buffers.again(read, map_file.read_kept(tmp_path / "map.toml", read))
    assert again.keys() == theirs.keys()
    for name, array in theirs.items():
        assert again[name].dtype == array.dtype and again[name].tobytes() == np.asarray(array).tobytes(), name
    (tmp_path / "map.npz").unlink()
    with pytest.raises(UserError, match=r"map\.npz: No such file or directory: expected the buffers"):
        map_file.read_kept(tmp_path / "map.toml", read)


def test_the_order_of_their_file_is_found_again() -> None:
    made = with_rules(
        plain_map(MODEL), Rule("heads.{n}.{h}.k", (f"{K}.weight",)), Rule("heads.{n}.{h}.v", (f"{V}.weight",))
    )
    for seed in range(3):
        state = states(made)
        names = list(state.tensors)
        shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))] if seed else names
        state = dataclasses.replace(state, tensors={name: state.tensors[name] for name in shuffled})
        whole = complete(made, state).map
        assert bool(whole.order) == bool(seed)
        assert list(apply.in_order(whole, dict.fromkeys(names))) == shuffled
        assert list(apply.scatter(whole, ours_of(MODEL))) == shuffled
