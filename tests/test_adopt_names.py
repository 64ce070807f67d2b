"""What propose makes of the names and shapes of home-made GPTs: naming styles as public projects have them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from convert.adopt import roles
from convert.adopt.rules import Proposal
from convert.formats.opened import Tensor
from mlxgpt.common import rng
from mlxgpt.common.errors import UserError

C, F, V, T, L, H = 8, 32, 23, 12, 2, 2
D = C // H


@dataclass(frozen=True)
class State:
    """A state dict in memory."""

    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    under: tuple[str, ...] = ()
    prefix: str = ""


def state(lines: str, n_layer: int = L, heads: int = H, extras: Mapping[str, Any] | None = None,
          values: Mapping[str, np.ndarray] | None = None) -> State:  # fmt: skip
    """A state dict of lines ``name shape``: {n} is the block, {m} the block from 1, {e} and {o} its even and odd number."""
    block = [line.split() for line in lines.strip().splitlines() if line.strip()]
    tensors: dict[str, Tensor] = {}

    def add(name: str, size: str) -> None:
        shape = tuple(eval(part, {}, globals()) for part in size.strip("()").split(",") if part)
        array = (values or {}).get(name, rng.normal(1, "names", name, shape=shape, std=1.0) + 1)
        tensors[name] = Tensor(array.shape, array.dtype, lambda array=array: array)

    def is_block(name: str) -> bool:
        return any(mark in name for mark in ("{n}", "{m}", "{e}", "{o}"))

    done = False
    for name, size in block:
        if not is_block(name):
            add(name, size)
            continue
        if done:
            continue
        done = True
        for n in range(n_layer):
            for pattern, within in block:
                if is_block(pattern):
                    name = pattern.replace("{n}", str(n)).replace("{m}", str(n + 1))
                    name = name.replace("{e}", str(2 * n)).replace("{o}", str(2 * n + 1))
                    for h in range(heads if "{h}" in name else 1):
                        add(name.replace("{h}", str(h)), within)
    return State(tensors, extras or {})


def show(proposal: Proposal) -> dict[str, str]:
    """theirs -> what it is, in one line: q_proj.weight | i o."""
    made = {}
    for rule in proposal.map.rules:
        ours = " ".join(name.removeprefix("h.{n}.").removeprefix("attn.").removeprefix("mlp.") for name in rule.to)
        made[rule.theirs] = ours + (f" | {rule.axes}" if rule.axes else "")
    return made


NANO = """
wte.weight (V,C)
wpe.weight (T,C)
h.{n}.ln_1.weight (C,)
h.{n}.ln_1.bias (C,)
h.{n}.attn.bias (1,1,T,T)
h.{n}.attn.c_attn.weight (3*C,C)
h.{n}.attn.c_attn.bias (3*C,)
h.{n}.attn.c_proj.weight (C,C)
h.{n}.attn.c_proj.bias (C,)
h.{n}.ln_2.weight (C,)
h.{n}.ln_2.bias (C,)
h.{n}.mlp.c_fc.weight (F,C)
h.{n}.mlp.c_fc.bias (F,)
h.{n}.mlp.c_proj.weight (C,F)
h.{n}.mlp.c_proj.bias (C,)
ln_f.weight (C,)
ln_f.bias (C,)
lm_head.weight (V,C)
"""


def test_nanogpt() -> None:
    made = roles.propose(state(NANO, extras={"model_args": {"n_head": H}}))
    assert show(made)["h.{n}.attn.c_attn.weight"] == "q_proj.weight k_proj.weight v_proj.weight | (p o) i"
    assert made.map.model["n_head"] == H
    assert made.map.left == {"h.{n}.attn.bias": "causal mask"}


def test_a_network_with_convolutions_is_named() -> None:
    with pytest.raises(UserError, match="a convolutional network"):
        roles.propose(state("conv1.weight (16,3,3,3)\nfc.weight (10,16)"))
