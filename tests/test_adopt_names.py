"""What propose makes of the names and shapes of home-made GPTs: naming styles as public projects have them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.adopt import apply, roles
from convert.adopt.reading import words
from convert.adopt.rules import Proposal, chosen
from convert.formats.opened import Tensor
from mlxgpt.common import rng
from mlxgpt.common.errors import UserError

SIZES = {"C": 16, "F": 40, "V": 23, "T": 12, "L": 2, "H": 4, "D": 4, "K": 8}
OURS = {
    "wte": "wte", "wpe": "wpe", "head": "lm_head", "ln_f": "ln_f", "ln_e": "ln_e", "q": "attn.q_proj",
    "k": "attn.k_proj",
    "v": "attn.v_proj", "o": "attn.c_proj", "gate": "mlp.c_gate", "fc": "mlp.c_fc", "proj": "mlp.c_proj",
    "q_norm": "attn.q_norm", "k_norm": "attn.k_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A tensor of every block, or one outside: its name, shape, and what it should be found to be; "" a buffer."""

    name: str
    shape: tuple[int, ...]
    role: str
    axes: str


@dataclass(frozen=True)
class State:
    """A state dict in memory."""

    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    under: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def rows(text: str) -> Iterator[Row]:
    """Lines ``module leaf/leaf shape;shape role axes;axes``: a weight and its bias; @ before a name without module."""
    for line in filter(str.strip, text.splitlines()):
        module, leaves, shapes, role, *axes = line.split(maxsplit=4)
        lies = axes[0].split(";") if axes else [""]
        leaves = [""] if module.startswith("@") else leaves.split("/")
        for i, leaf in enumerate(leaves):
            size = shapes.split(";")[i] if shapes != "-" else ""
            shape = tuple(int(eval(part, {}, SIZES)) for part in size.split(",") if part)
            name = module.removeprefix("@") + (f".{leaf}" if leaf else "")
            kind = ".bias" if i else "" if "." in role else ".weight"
            yield Row(name, shape, "" if role == "-" else role + kind, lies[i] if i < len(lies) else "")


def state(text: str, n_layer: int = 2, extras: Mapping[str, Any] | None = None,
          values: Mapping[str, np.ndarray] | None = None) -> State:  # fmt: skip
    """A state dict of rows; {n} counts blocks from 0, {m} from 1, {e} and {o} by even and odd numbers, {h} heads."""
    tensors: dict[str, Tensor] = {}
    given = list(rows(text))

    def add(name: str, shape: tuple[int, ...]) -> None:
        array = (values or {}).get(name)
        array = rng.normal(1, "names", name, shape=shape, std=0.1) + (len(shape) == 1) if array is None else array
        tensors[name] = Tensor(array.shape, array.dtype, lambda: array)

    blocks = [row for row in given if any(mark in row.name for mark in ("{n}", "{m}", "{e}", "{o}"))]
    for row in given:
        if row not in blocks:
            add(row.name, row.shape)
        elif row is blocks[0]:
            for n in range(n_layer):
                for each in blocks:
                    numbers = {"{n}": n, "{m}": n + 1, "{e}": 2 * n, "{o}": 2 * n + 1}
                    name = each.name
                    for mark, number in numbers.items():
                        name = name.replace(mark, str(number))
                    for h in range(SIZES["H"] if "{h}" in name else 1):
                        add(name.replace("{h}", str(h)), each.shape)
    return State(tensors, extras or {})


def ours(role: str, numbered: bool) -> tuple[str, ...]:
    """Our names of a role of the table."""
    what, _, kind = role.rpartition(".")
    top = what in ("wte", "wpe", "head", "ln_f", "ln_e")
    block = "" if top else "h.{n}." if numbered else "h.0."
    return tuple(f"{block}{OURS.get(each, each)}.{kind}" for each in what.split(","))


STYLES = {
    text.partition("\n")[0].strip(): text.partition("\n")[2]
    for text in (Path(__file__).parent / "adopt_styles.txt").read_text().split("== ")[1:]
}


def found(proposal: Proposal) -> dict[str, tuple[tuple[str, ...], str]]:
    """their name -> ours and the axes; left out ones are ()."""
    made = {rule.theirs: (rule.to, rule.axes) for rule in proposal.map.rules}
    return made | dict.fromkeys(proposal.map.left, ((), ""))


@pytest.mark.parametrize("style", STYLES)
def test_every_tensor_of_a_style_is_found(style: str) -> None:
    text = STYLES[style]
    proposal = roles.propose(state(text))
    numbered = "{" in text or "L," in text
    marks = {"{m}": "{n+1}", "{e}": "{2n}", "{o}": "{2n+1}"}
    expected = {}
    for row in rows(text):
        name = row.name
        for mark, ours_is in marks.items():
            name = name.replace(mark, ours_is)
        expected[name] = (ours(row.role, numbered) if row.role else (), row.axes)
    assert found(proposal) == expected


@pytest.mark.parametrize("style", STYLES)
def test_every_layout_of_a_style_fits_its_shapes(style: str) -> None:
    made = state(STYLES[style])
    proposal = roles.propose(made)
    apply.Plan(proposal.map, made.shapes)
    for choice in proposal.choices:
        seen = {(repr(option.model), repr(option.rules), option.rope) for option in choice.options}
        assert len(seen) == len(choice.options), f"{choice.name}: two options are one"
        for option in choice.options:
            if option.rules or choice.name == "n_head":
                apply.Plan(chosen(proposal.map, (option,)), made.shapes)


NANO, LLAMA, LECTURE = STYLES["nanoGPT"], STYLES["llama2.c"], STYLES["Karpathy's lecture: a list of heads"]
OPAQUE = STYLES["names that say nothing"]


def labels(proposal: Proposal, name: str) -> list[str]:
    """The options of a choice; [] where it is settled."""
    return [option.label for choice in proposal.choices if choice.name == name for option in choice.options]


def test_settings_beside_the_weights_narrow_the_choices() -> None:
    made = roles.propose(
        state(LLAMA, extras={"model_args": {"dim": 16, "n_heads": 2, "max_seq_len": 99, "norm_eps": 1e-6}})
    )
    assert (made.map.model["n_head"], made.map.model["block_size"], made.map.model["norm_eps"]) == (2, 99, 1e-6)
    assert not labels(made, "n_head") and not labels(made, "norm_eps") and not made.notes


def test_words_of_a_vocabulary_are_no_settings() -> None:
    words = {word: i for i, word in enumerate(["a", "of", "heads", "tied", "n_layer", "dim"])}
    plain, made = (roles.propose(state(LLAMA, extras=extras)) for extras in ({}, {"stoi": words}))
    assert (made.map, made.choices, made.notes) == (plain.map, plain.choices, plain.notes)


def test_settings_that_shapes_contradict_are_said() -> None:
    made = roles.propose(state(LLAMA, extras={"config": {"n_head": 5, "n_embd": 64}}))
    assert len(labels(made, "n_head")) > 1
    assert "n_embd = 64; shapes say 16" in made.notes[1] and "n_head = 5, which no shape allows" in made.notes[2]


def test_fewer_blocks_than_settings_say_are_refused() -> None:
    with pytest.raises(UserError, match="n_layer = 3, and 2 blocks"):
        roles.propose(state(NANO, extras={"n_layer": 3}))


@pytest.mark.parametrize(("missing", "message"), [(1, "h.1 is missing: found h.0, h.2, h.3"), (0, "h.0 is missing")])
def test_a_missing_block_is_named(missing: int, message: str) -> None:
    whole = state(NANO, n_layer=4)
    kept = {name: tensor for name, tensor in whole.tensors.items() if not name.startswith(f"h.{missing}.")}
    with pytest.raises(UserError, match=message):
        roles.propose(State(kept))


def test_blocks_that_differ_are_refused() -> None:
    whole = state(NANO)
    less = {name: tensor for name, tensor in whole.tensors.items() if name != "h.1.mlp.c_proj.weight"}
    with pytest.raises(UserError, match="c_proj.weight: block 1 has none"):
        roles.propose(State(less))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("h.{n}.ls1 gamma C -", r"h.\{n\}.ls1.gamma \[16\]: no part of a decoder"),
        ("h.{n}.moe.experts.0.up weight F,C -", "a mixture of experts"),
        ("h.{n}.cross_attn.q_proj weight C,C -", "cross-attention"),
        ("h.{n}.attn.relative_attention_bias weight 32,H -", "relative_attention_bias"),
        ("h.{n}.attn.c_attn.lora_A weight 4,C -", "a LoRA adapter"),
        ("h.{n}.mixer.A_log - C,4 -", "state-space"),
        ("h.{n}.att.time_decay - C -", "RWKV"),
        ("value_embeds.0 weight V,C -", "value_embeds.0.weight"),
        ("bn running_mean C -", "BatchNorm"),
        ("rnn weight_ih_l0 4*C,C -", "a recurrent network"),
        ("resid_lambdas - L -", "resid_lambdas"),
        ("conv weight C,C,3,3 -", "a convolutional network"),
    ],
)
def test_what_is_no_part_of_a_decoder_is_named(extra: str, message: str) -> None:
    extra = "@" + extra.replace(" - ", "  - ", 1) if extra.startswith("resid") else extra
    extra = extra.replace("h.{n}.mixer.A_log -", "@h.{n}.mixer.A_log -").replace(
        "h.{n}.att.time_decay -", "@h.{n}.att.time_decay -"
    )
    with pytest.raises(UserError, match=message):
        roles.propose(state(NANO + extra))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UserError, match="do not make attention and an MLP"):
        roles.propose(
            state("emb weight V,C -\nlayers.{n}.fc1 weight F,C -\nlayers.{n}.fc2 weight C,F -\nout weight V,C -")
        )


def angles(length: int, width: int, theta: float = 10000.0, span: bool = False) -> np.ndarray:
    """(length, width / 2)."""
    half = width // 2
    return np.outer(np.arange(length), theta ** (-np.arange(half) / (half - span)))


@pytest.mark.parametrize("kind", ["pairs", "halves", "span"])
@pytest.mark.parametrize(("shape", "times"), [((12, 16), 1.0), ((1, 12, 16), 1.0), ((12, 1, 16), 8**-0.5)])
def test_a_table_of_sinusoids_is_known_by_its_values(kind: str, shape: tuple[int, ...], times: float) -> None:
    turned = angles(12, 16, span=kind == "span")
    parts = np.stack([np.sin(turned), np.cos(turned)], axis=-1 if kind == "pairs" else 1).reshape(12, 16)
    text = NANO.replace("wpe weight T,C wpe", f"@pos_encoder.pe - {','.join(map(str, shape))} -")
    made = roles.propose(state(text, values={"pos_encoder.pe": (times * parts).reshape(shape).astype(np.float32)}))
    model = made.map.model
    assert made.map.left["pos_encoder.pe"] == "table of sinusoids"
    assert (model["position"], model["sinusoid"], model["block_size"]) == ("sinusoidal", kind, 12)
    assert model.get("position_multiplier", 1.0) == pytest.approx(times, rel=1e-6)


@pytest.mark.parametrize(("name", "pairing"), [("freqs_cis", "pairs"), ("cos", "halves"), ("cos_pairs", "pairs")])
def test_a_table_of_rope_tells_theta_and_pairing(name: str, pairing: str) -> None:
    turned = angles(9, 4, 500000.0)
    table = {"freqs_cis": np.exp(1j * turned).astype(np.complex64), "cos": np.tile(np.cos(turned), 2),
             "cos_pairs": np.repeat(np.cos(turned), 2, axis=1)}[name]  # fmt: skip
    made = roles.propose(state(LLAMA + f"@rope.{name} - 1 -", values={f"rope.{name}": table}))
    assert made.map.left == {f"rope.{name}": "table of rope"}
    assert made.map.model["rope_theta"] == 500000.0 and made.map.model["rotary_dim"] == 4 and made.map.rope == pairing
    assert made.map.model["head_dim"] == 4 and made.map.model["block_size"] == 9 and not labels(made, "position")


def test_frequencies_of_rope_tell_theta_and_width() -> None:
    rates = {f"layers.{n}.attention.rotary.inv_freq": angles(2, 8, 100000.0)[1] for n in range(2)}
    made = roles.propose(state(LLAMA + "layers.{n}.attention.rotary inv_freq 4 -", values=rates))
    assert made.map.left == {"layers.{n}.attention.rotary.inv_freq": "table of rope"}
    assert (made.map.model["rope_theta"], made.map.model["head_dim"]) == (100000.0, 8)


def test_slopes_of_alibi_are_known_by_their_values() -> None:
    slopes = 2.0 ** (-8 * np.arange(1, 5) / 4)
    text = NANO.replace("wpe weight T,C wpe\n", "") + "@m - 4,1,1 -"
    made = roles.propose(state(text, values={"m": slopes.reshape(4, 1, 1)}))
    assert made.map.left["m"] == "slopes of ALiBi"
    assert (made.map.model["position"], made.map.model["n_head"]) == ("alibi", 4)


def test_learned_positions_whose_context_is_the_width_are_no_mask() -> None:
    text = NANO.replace("wpe weight T,C wpe\n", "") + "@lageEinbettung - 1,C,C -"
    made = roles.propose(state(text))
    assert "lageEinbettung" not in made.map.left
    assert [rule.theirs for rule in made.map.rules if rule.to[0].startswith("wpe")] == ["lageEinbettung"]


@pytest.mark.parametrize("kind", ["tril", "triu", "-inf", "bool"])
def test_a_mask_is_known_by_its_values(kind: str) -> None:
    square = np.tril(np.ones((12, 12), np.float32))
    mask = {"tril": square, "triu": 1 - square, "-inf": np.where(square > 0, 0, -np.inf), "bool": square > 0}[kind]
    made = roles.propose(state(LLAMA + "layers.{n}.attention future 12,12 -", values={
        f"layers.{n}.attention.future": mask for n in range(2)}))  # fmt: skip
    assert made.map.left == {"layers.{n}.attention.future": "causal mask"} and made.map.model["block_size"] == 12


def test_a_head_of_the_embeddings_values_is_tied() -> None:
    whole = state(NANO)
    assert not roles.propose(whole).map.model["tied"]
    tied = {**whole.tensors, "lm_head.weight": whole.tensors["wte.weight"]}
    made = roles.propose(State(tied))
    assert made.map.model["tied"] and found(made)["lm_head.weight"][0] == ("wte.weight",)


def test_tensors_of_one_storage_are_tied_without_reading_them() -> None:
    made = roles.propose(State(state(NANO).tensors, tied=(("wte.weight", "lm_head.weight"),)))
    assert made.map.model["tied"]


def test_a_list_of_heads_says_how_many() -> None:
    model = roles.propose(state(LECTURE)).map.model
    assert (model["n_head"], model["head_dim"], model["block_size"]) == (4, 4, 12)


def test_the_likeliest_number_of_heads_is_first() -> None:
    wide = {"C": 384, "F": 1536}
    SIZES_BEFORE = {name: SIZES[name] for name in wide}
    SIZES.update(wide)
    try:
        made = roles.propose(state(NANO))
    finally:
        SIZES.update(SIZES_BEFORE)
    assert labels(made, "n_head")[:3] == ["6 heads of 64", "8 heads of 48", "4 heads of 96"]


def test_norms_with_a_bias_are_layer_norms_and_others_a_choice() -> None:
    assert not labels(roles.propose(state(NANO)), "norm")
    assert labels(roles.propose(state(LLAMA)), "norm")[0] == "rms"
    near = {name: np.zeros(16, np.float32) for name in ("norm.weight",)}
    assert labels(roles.propose(state(LLAMA, values=near)), "norm")[0] == "rms1"


def test_a_bias_that_only_some_have_is_named() -> None:
    text = NANO.replace("h.{n}.mlp.c_proj weight/bias C,F;C", "h.{n}.mlp.c_proj weight C,F")
    made = roles.propose(state(text.replace("ln_f weight/bias C;C", "ln_f weight C")))
    assert made.map.model["mlp_bias"] and set(made.map.model["no_bias"]) == {"mlp.c_proj", "ln_f"}


def test_names_that_say_nothing_leave_the_orders_open() -> None:
    made = roles.propose(state(OPAQUE))
    four = labels(made, "layout of b.{n}.c.weight and its like")
    assert four[:2] == ["q, k, v, o", "k, q, v, o"] and len(four) == 24
    assert labels(made, "place of b.{n}.a.weight") == ["b.{n}.a.weight is ln_1", "b.{n}.a.weight is ln_2"]
    untied = roles.propose(state(OPAQUE.replace("y weight V,C head", "")))
    assert labels(untied, "place of j.weight") == [
        "j.weight is wte, l.weight is wpe",
        "l.weight is wte, j.weight is wpe",
    ]


def test_square_matrices_may_lie_either_way() -> None:
    made = roles.propose(state(STYLES["a list for each kind of matrix"].replace("F", "C")))
    assert [choice for choice in made.choices if [o.label for o in choice.options] == ["x @ W", "W @ x"]]


def test_square_kernels_of_flax_are_inputs_first() -> None:
    text = STYLES["a list for each kind of matrix"].replace("F", "C")
    text = text.replace("{n} C,C", "{n}.kernel C,C").replace("{n} C ", "{n}.bias C ")
    made = roles.propose(state(text.replace("b1 ", "w1 ").replace("b2 ", "w2 ")))
    assert {rule.axes for rule in made.map.rules if rule.theirs.endswith("kernel")} == {"i o"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Wg1", "weight"), ("bg1", "bias"), ("b_2", "bias"), ("a_2", "weight"), ("bias_a", "bias"), ("ln_b", "bias"),
     ("in_proj_bias", "bias"), ("rms_att_weight", "weight"), ("to_q", "weight"), ("LayerNorm_0.offset", "bias")],
)  # fmt: skip
def test_words_say_what_is_a_bias(name: str, kind: str) -> None:
    assert words.kind(name)[0] == kind


def test_a_matrix_whose_bias_tells_its_outputs_lies_one_way() -> None:
    text = STYLES["everything flat in the block"].replace("up_proj", "m1").replace("down_proj", "m2")
    assert not [choice for choice in roles.propose(state(text)).choices if choice.name.endswith("and its like")]
    bare = roles.propose(
        state(text.replace("weight/bias F,C;F", "weight F,C").replace("weight/bias C,F;C", "weight C,F"))
    )
    assert [choice for choice in bare.choices if choice.name.endswith("and its like")]


def test_numbers_that_begin_with_none_are_understood() -> None:
    text = STYLES["Flax, everything in one module"]
    given = state(text).tensors
    names = {name: name.replace("_0.", ".") for name in given}
    made = roles.propose(State({names[name]: tensor for name, tensor in given.items()}))
    expected = {rule.theirs for rule in made.map.rules}
    assert {
        "Dense.kernel",
        "SelfAttention.query.kernel",
        "LayerNorm_{2n+1}.scale",
        "SelfAttention_1.out.bias",
    } <= expected
    apply.Plan(made.map, {names[name]: tensor.shape for name, tensor in given.items()})
