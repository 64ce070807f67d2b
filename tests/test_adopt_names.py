"""What propose makes of the names and shapes of home-made GPTs: naming styles as public projects have them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.adopt import apply, roles
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
    for line in text.strip().splitlines():
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


def test_a_network_with_convolutions_is_named() -> None:
    with pytest.raises(UserError, match="a convolutional network"):
        roles.propose(state("conv1 weight 16,3,3,3 -\nfc weight 10,16 -"))
