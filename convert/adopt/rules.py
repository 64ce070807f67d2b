"""What an adoption is made of: rules from their tensors to ours, and the choices that no rule can say.

Ours are the names and shapes of params.table for a model whose matrices are not fused (fused_qkv and fused_mlp off): q,
k, v, gate and up are pieces of their own. ``landing`` fuses them again where the architecture that is written does.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROPES = ("halves", "pairs", "halves reversed", "pairs reversed")
"""How their rope pairs the dimensions of a head (halves: i with i + d / 2; pairs: 2 i with 2 i + 1), and which way."""


_COUNTED = re.compile(r"\{(\d*)([nh])(?:\+(\d+))?\}")


def named(pattern: str, n: int = 0, h: int = 0) -> str:
    """The name that ``pattern`` stands for: {n}, {n+1}, {2n} and {2n+1} of block n, {h} of head h, both from 0."""

    def number(found: re.Match[str]) -> str:
        times, letter, more = found.groups()
        return str(int(times or 1) * (n if letter == "n" else h) + int(more or 0))

    return _COUNTED.sub(number, pattern)


def has_number(pattern: str, letter: str) -> bool:
    """Whether ``pattern`` stands for a name a block (n), or a head (h)."""
    return named(pattern, letter == "n", letter == "h") != named(pattern)


def matching(pattern: str) -> re.Pattern[str]:
    """What the names match that ``pattern`` stands for, of any block and head."""
    parts, at = "", 0
    for found in _COUNTED.finditer(pattern):
        parts += re.escape(pattern[at : found.start()]) + r"\d+"
        at = found.end()
    return re.compile(parts + re.escape(pattern[at:]))


BUFFERS = ("tril", "triu", "-inf", "arange", "zeros", "ones", "kept")
"""How a buffer is made: 1 on and below the diagonal, 1 above it, -inf above it, 0 1 2 ... along the last axis; kept: it
lies in the .npz beside the map."""


@dataclass(frozen=True)
class Rule:
    """One tensor of theirs, or one a block or head, as pieces of ours.

    ``axes`` says how it lies, outermost first, as einops writes it: o out, i in, h heads, d head_dim, n blocks, p the
    pieces of ``to`` (equal, or sized as ours are), g groups of grouped heads, 1 an axis of one. "" is as ours lie.
    Ours are ``o i``, where o of q, k and v is ``(h d)`` with the piece's own heads, and i of attn.c_proj is ``(h d)``:

        i o          transposed               (p o) i      fused, q then k then v       o, (p o), h d   their biases
        h i d        a kernel of einsum       (h p d) i    fused, head by head          p i h d         q, k, v stacked
        h d o        the same of c_proj       (g p d) i    for each key head: its query heads, k, v     1 o i
        n o i        all blocks in one        d i          one head's, where ``theirs`` has {h}
    """

    theirs: str  # {n} is the block, {h} the head; {n+1} counts from one, {2n} and {2n+1} take turns: see ``named``
    to: tuple[str, ...]  # our names, {n} the block, in the order in which the pieces lie
    axes: str = ""
    sure: str = field(default="sure", compare=False)  # sure, likely or guess
    why: str = field(default="", compare=False)


@dataclass(frozen=True)
class Buffer:
    """A tensor of theirs that is no weight, to be made again: ``make`` of BUFFERS, or kept in a file beside the map."""

    make: str
    dtype: str
    shape: tuple[int, ...]


GROUPS = ("one", "matrices", "linear")
"""How an optimizer groups parameters: all in one; those of two axes or more, then the rest (nanoGPT); the weights of
linear layers, then the rest, each sorted by name (minGPT)."""


@dataclass(frozen=True)
class Optimizer:
    """Where the state of a torch.optim.AdamW lies in their file, and of which parameters it is."""

    at: tuple[str, ...]  # keys
    groups: str  # of GROUPS
    settings: tuple[Mapping[str, float], ...]  # of each group: lr, beta1, beta2, eps, weight_decay
    copies: bool = False  # whether the copy of a tied tensor is a parameter of its own
    step: tuple[str, ...] = ()  # keys of the number of steps in ``beside``


@dataclass(frozen=True)
class Map:
    """Everything that takes their state dict to a model here, and back."""

    rules: tuple[Rule, ...]
    model: Mapping[str, Any]  # fields of ModelConfig that are known
    left: Mapping[str, str] = field(default_factory=dict)  # their name with {n} -> why it is no weight (a buffer)
    rope: str = "halves"  # of ROPES: rows of q and k, and their norms, are reordered by it
    under: tuple[str, ...] = ()  # keys under which the state dict lies in the file
    prefix: str = ""  # what every name begins with, and the rules leave out
    # the rest is filled in by maps.buffers.complete, and says how to write their file again
    kind: str = "pt"  # pt, safetensors or npz
    separator: str = "."  # between the words of their names
    dtypes: Mapping[str, str] = field(default_factory=dict)  # their name -> its dtype; "" of all others
    buffers: Mapping[str, Buffer] = field(default_factory=dict)  # their name with {n}, as in ``left``
    order: tuple[str, ...] = ()  # their names in the file's order, where that is not the rules'
    nested: bool = False  # whether tensors lie in dicts and lists, a word of their names each
    beside: Mapping[str, Any] = field(default_factory=dict)  # plain values of the file beside its tensors
    optimizer: "Optimizer | None" = None


@dataclass(frozen=True)
class Option:
    """One answer to a choice: the fields it sets, the rules it replaces (by ``theirs``), the pairing of rope."""

    label: str
    model: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    rope: str | None = None


@dataclass(frozen=True)
class Choice:
    """What neither names nor shapes say; the likeliest option is first."""

    name: str  # n_head, activation, norm_eps, or "layout of blocks.{n}.attn.qkv.weight"
    options: tuple[Option, ...]
    why: str = ""


@dataclass(frozen=True)
class Proposal:
    """What names and shapes say: a map that is complete but for ``choices``, of which it holds the first options."""

    map: Map
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()


def chosen(proposal: Map, options: tuple[Option, ...]) -> Map:
    """The map with these options taken."""
    made, model, rope = {rule.theirs: rule for rule in proposal.rules}, dict(proposal.model), proposal.rope
    for option in options:
        made |= option.rules
        model |= option.model
        rope = option.rope or rope
    return dataclasses.replace(proposal, rules=tuple(made.values()), model=model, rope=rope)
