"""Rules for what lies in a block: matrices with their biases, norms of queries and keys, norms around the branches."""

import math
from collections.abc import Mapping

from convert.adopt.reading import matrices, refusals, rules_of, tables, words
from convert.adopt.reading.blocks import Item
from convert.adopt.reading.draft import Draft
from convert.adopt.reading.matrices import Reading
from convert.adopt.reading.tables import Norm
from convert.adopt.rules import Choice, Option, Rule
from mlxgpt.common.errors import UserError


def biases(mats: tuple[Item, ...], vectors: tuple[Item, ...]) -> dict[str, Item]:
    """Matrix -> the vector whose name is a bias's of it."""
    by_key = {tables.key(item): item for item in vectors if item.kind == "bias"}
    return {item.theirs: by_key[tables.key(item)] for item in mats if tables.key(item) in by_key}


def read(mats: tuple[Item, ...], vectors: tuple[Item, ...], width: int) -> Reading | None:
    """The likeliest roles of a block's matrices."""
    sizes = bias_sizes(mats, vectors)
    return matrices.read(mats, width, sizes) or matrices.read(mats, width)


def bias_sizes(mats: tuple[Item, ...], vectors: tuple[Item, ...]) -> dict[str, int]:
    """Matrix -> size of its bias, of all heads."""
    return {name: math.prod(bias.shape) * max(bias.heads, 1) for name, bias in biases(mats, vectors).items()}


def matrix_rules(reading: Reading, vectors: tuple[Item, ...], width: int, draft: Draft) -> list[Item]:
    """Rules of the block's matrices and their biases; gives the vectors that are left."""
    items = tuple(item for item, _ in reading.roles.values())
    named, sizes = biases(items, vectors), bias_sizes(items, vectors)
    bias_of: dict[str, Item | None] = {}
    fixed: set[str] = set()
    turned = {kind for kind, _ in matrices.turned(reading, items, width, sizes)}
    for role, (item, lay) in reading.roles.items():
        fits = sizes.get(item.theirs) == (width if role in matrices.WRITES else lay.size)
        bias_of[item.theirs] = named[item.theirs] if fits else None
        sure, why = rules_of.certainty(role, reading, items, width, sizes, turned)
        if sure != "guess":
            fixed.add(role)
        draft.rules |= rules_of.pair(role, item, lay, bias_of[item.theirs], sure, why)
    _bias_fields(reading, bias_of, draft)
    either = list(rules_of.turns(reading, items, bias_of, width, sizes))
    four = rules_of.which_of_four(reading, bias_of, fixed, bool(either))
    for choice in [] if four is not None else either:
        draft.add(choice)
    draft.add(four)
    out = reading.roles["o"][1].size
    for role in ("qkv", "kv"):
        if role in reading.roles:
            item, lay = reading.roles[role]
            grouped = role == "qkv" and lay.size != 3 * out
            draft.add(rules_of.fused(role, item, lay, bias_of[item.theirs], grouped))
    draft.add(rules_of.gate_or_up(reading, bias_of))
    used = {bias.theirs for bias in bias_of.values() if bias is not None}
    return [item for item in vectors if item.theirs not in used]


def _bias_fields(reading: Reading, bias_of: Mapping[str, Item | None], draft: Draft) -> None:
    """qkv_bias, out_bias and mlp_bias; what lacks a bias that others have."""
    have = {
        name: bias_of[item.theirs] is not None
        for role, (item, _) in reading.roles.items()
        for name in matrices.OURS[role]
    }
    draft.model["gated"] = reading.gated
    for flag, names in (
        ("qkv_bias", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),
        ("out_bias", ("attn.c_proj",)),
        ("mlp_bias", ("mlp.c_gate", "mlp.c_fc", "mlp.c_proj")),
    ):
        there = [name for name in names if name in have]
        draft.model[flag] = any(have[name] for name in there)
        if draft.model[flag]:
            draft.without += [name for name in there if not have[name]]


def qk_norms(rest: list[Item], reading: Reading, width: int, draft: Draft) -> list[Item]:
    """Norms of queries and keys among the vectors."""
    left: list[Item] = []
    out = reading.roles["o"][1].size
    found: dict[str, Norm] = {}
    for norm in tables.norms(tuple(rest)):
        item = norm.item
        near = set(words.words(".".join(item.inside.split(".")[-2:])))
        letters = [letter for letter, group in (("q", words.QUERY), ("k", words.KEY)) if near & group]
        size = item.used[-1]
        small = reading.context.get(item.theirs, "") != "mlp" and size != width
        if len(letters) == 1 and (near & words.NORM or small) and norm.weight is not None:
            found[letters[0]] = norm
        else:
            left += [each for each in (norm.weight, norm.bias) if each is not None]
    if not found:
        return left
    if set(found) != {"q", "k"}:
        raise UserError(f"{next(iter(found.values())).item.theirs}: a norm of queries or keys only: expected both")
    query, key = list(found["q"].item.used), list(found["k"].item.used)
    if len(query) > 1:
        raise UserError(f"{found['q'].item.theirs}: {query}, a norm of its own for each head: expected one for all")
    full = query[0] == out and key[0] == kv_size(reading)
    draft.model["qk_norm"] = "full" if full else "head"
    if not full:
        draft.told["head_dim"] = query[0]
    for letter, norm in found.items():
        name = f"attn.{letter}_norm"
        for item, kind in ((norm.weight, "weight"), (norm.bias, "bias")):
            if item is not None:
                axes = rules_of.axes(item, "")
                draft.rules[item.theirs] = Rule(
                    item.theirs, (f"h.{{n}}.{name}.{kind}",), axes, "sure", "name and shape"
                )
        if norm.bias is None:
            draft.bare_qk.append(name)
    return left


def size(reading: Reading, role: str) -> int:
    """Of a matrix, the side that is not n_embd."""
    return reading.roles[role][1].size


def kv_size(reading: Reading) -> int:
    """n_kv_head head_dim."""
    if "k" in reading.roles:
        return size(reading, "k")
    return size(reading, "kv") // 2 if "kv" in reading.roles else (size(reading, "qkv") - size(reading, "o")) // 2


def block_norms(rest: list[Item], block: tuple[Item, ...], width: int, draft: Draft) -> list[Norm]:
    """The norms of a block, with their rules."""
    wrong = [item for item in rest if item.used != (width,) or set(item.said) & refusals.SCALES]
    if wrong:
        raise UserError(refusals.unexplained(tuple(wrong)))
    found = tables.norms(tuple(rest))
    placed = tables.place(found, block) if found else {}
    if placed is None:
        shown = ", ".join(norm.item.theirs for norm in found[:5])
        raise UserError(f"{len(found)} norms in a block ({shown}): expected none, one, two or four")
    if tables.unsaid(found, block):
        draft.choices.append(_swap(placed))
    if len(found) == 1:
        draft.notes.append(f"one norm in a block, {found[0].item.theirs}: taken for both branches")
    for name, norm in placed.items():
        named = bool(set(norm.item.said) & words.NORM)
        for item, kind in ((norm.weight, "weight"), (norm.bias, "bias")):
            if item is not None:
                why = "name and shape" if named else "shape, and place in the file"
                draft.rules[item.theirs] = Rule(
                    item.theirs,
                    (f"h.{{n}}.{name}.{kind}",),
                    rules_of.axes(item, ""),
                    "sure" if named else "likely",
                    why,
                )
        if norm.bias is None and any(other.bias for other in found):
            draft.without.append(name)
        if norm.weight is None:
            raise UserError(f"{norm.item.theirs}: a norm with a bias and no weight: expected a weight")
    return found


def _swap(placed: Mapping[str, Norm]) -> Choice:
    """Two norms of which names do not say which is before attention: in the order of the file, or the other."""
    options = []
    for names in (("ln_1", "ln_2"), ("ln_2", "ln_1")):
        rules: dict[str, Rule] = {}
        for name, norm in zip(names, (placed["ln_1"], placed["ln_2"]), strict=True):
            for item, kind in ((norm.weight, "weight"), (norm.bias, "bias")):
                if item is not None:
                    axes = rules_of.axes(item, "")
                    rules[item.theirs] = Rule(
                        item.theirs, (f"h.{{n}}.{name}.{kind}",), axes, "likely", "shape, and place"
                    )
        options.append(Option(f"{placed['ln_1'].item.theirs} is {names[0]}", rules=rules))
    return Choice(
        f"place of {placed['ln_1'].item.theirs}", tuple(options), "which norm is the attention's, which the MLP's"
    )
