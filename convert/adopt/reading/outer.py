"""Rules for what lies outside the blocks: embeddings, positions, the head, and norms before and behind."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from convert.adopt.reading import matrices, refusals, rules_of, tables, words
from convert.adopt.reading.blocks import Item
from convert.adopt.reading.draft import Draft
from convert.adopt.reading.tables import Norm
from convert.adopt.rules import Choice, Option, Rule
from convert.formats.opened import Tensor
from mlxgpt.common.errors import UserError


def apart(items: tuple[Item, ...], width: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """(block, outside) of a model with one block whose tensors bear no number."""
    found = tables.tables(tuple(item for item in items if _outer(item)), width)
    outer = {item.theirs for item, _ in found.roles.values()}
    head = found.roles.get("lm_head")
    for item in items:
        said = set(words.words(item.inside))
        if len(item.used) == 1 and (
            (said & words.NORM and said & {"f", "final", "last", "out", "head"})
            or (head is not None and tables.key(item) == tables.key(head[0]) and item.kind == "bias")
        ):
            outer.add(item.theirs)
    return (
        tuple(item for item in items if item.theirs not in outer),
        tuple(item for item in items if item.theirs in outer),
    )


def _outer(item: Item) -> bool:
    worth = tables.embeds(item)
    context = matrices.contexts((item,))[item.theirs]
    return len(item.used) == 2 and not context and max(worth.values()) >= 3.0


def outside(
    tensors: Mapping[str, Tensor],
    shared: tuple[tuple[str, ...], ...],
    top: tuple[Item, ...],
    width: int,
    draft: Draft,
    blocks_at: int,
) -> None:
    """Embeddings, positions, head and norms outside the blocks.

    Raises:
        UserError: no embedding, or a tensor that nothing explains.
    """
    matrix = tuple(item for item in top if len(item.used) >= 2)
    found = tables.tables(matrix, width)
    if "wte" not in found.roles:
        shown = ", ".join(f"{item.theirs} {list(item.shape)}" for item in matrix[:4]) or "none"
        raise UserError(f"no embedding of tokens (V, {width}) outside the blocks: found {shown}")
    if found.left:
        raise UserError(refusals.unexplained(found.left))
    draft.add(_named_tables(found))
    rest = [item for item in top if item not in matrix]
    token = found.roles["wte"][0]
    head = found.roles.get("lm_head")
    rest = _head(tensors, shared, token, head, rest, draft)
    _outer_norms(rest, width, draft, token, blocks_at)


def _named_tables(found: tables.Tables) -> Choice:
    """The tables' rules and sizes; a choice where neither names nor a head say which of two is the tokens'."""

    def option(roles: Mapping[str, tuple[Item, bool]]) -> Option:
        rules, fields = {}, {}
        for role, (item, turned) in roles.items():
            sure, why = ("sure", "name and shape") if tables.embeds(item)[role] >= 3 else ("likely", "shape")
            axes = rules_of.axes(item, "i o" if turned else "")
            rules[item.theirs] = Rule(item.theirs, (f"{role}.weight",), axes, sure, why)
            rows = item.used[1 if turned else 0]
            fields |= {"wte": {"vocab_size": rows}, "wpe": {"position": "learned", "block_size": rows}}.get(role, {})
        return Option(", ".join(f"{item.theirs} is {role}" for role, (item, _) in roles.items()), fields, rules)

    roles = found.roles
    options = [option(roles)]
    if "wpe" in roles and "lm_head" not in roles:
        told = [tables.embeds(item) for item, _ in roles.values()]
        if not any(each["wpe"] or each["wte"] > 3 for each in told):
            options.append(option({"wte": roles["wpe"], "wpe": roles["wte"]}))
    token = roles["wte"][0]
    return Choice(f"place of {token.theirs}", tuple(options), "which table is of tokens, and which of positions")


def _head(
    tensors: Mapping[str, Tensor],
    shared: tuple[tuple[str, ...], ...],
    token: Item,
    head: tuple[Item, bool] | None,
    rest: list[Item],
    draft: Draft,
) -> list[Item]:
    """Tied or not, and the head's bias."""
    vocab = (draft.model["vocab_size"],)
    fits = [item for item in rest if item.used == vocab and (vocab[0] != draft.model["n_embd"] or item.kind == "bias")]
    own = [item for item in fits if head is not None and tables.key(item) == tables.key(head[0])]
    bias = next(iter(own or fits[: vocab[0] != draft.model["n_embd"]]), None)
    tied = head is None
    if head is not None:
        both = {token.theirs, head[0].theirs}
        tied = any(both <= set(group) for group in shared)
        if not tied and not head[1] and token.shape == head[0].shape:
            one, two = (np.asarray(tensors[name].read()) for name in (token.theirs, head[0].theirs))
            tied = one.dtype == two.dtype and np.array_equal(one, two)
    if bias is not None:
        draft.rules[bias.theirs] = Rule(bias.theirs, ("lm_head.bias",), "", "sure", "size of the vocabulary")
        draft.model["head_bias"] = True
    if tied and head is not None:
        rule = draft.rules[head[0].theirs]
        draft.rules[head[0].theirs] = replace(rule, to=("wte.weight",), why=f"the values of {token.theirs}: tied")
    draft.model["tied"] = tied
    return [item for item in rest if item is not bias]


def _outer_norms(rest: list[Item], width: int, draft: Draft, token: Item, blocks_at: int) -> None:
    """The norm behind the blocks, and one right behind the embeddings; ``blocks_at``: where blocks are in the file."""
    wrong = [item for item in rest if item.used != (width,)]
    found = tables.norms(tuple(item for item in rest if item not in wrong))
    said = [set(norm.item.said) for norm in found]
    late = [bool(each & {"head", "logits", "out", "output", "final", "f", "last"}) for each in said]
    early = [
        bool(each & (words.EMBED | {"input", "pre", "in", "first"})) and not behind
        for each, behind in zip(said, late, strict=True)
    ]
    told = sum(early) == 1 or sum(late) == 1
    if len(found) == 2 and sum(early) != 1 and sum(late) == 1:
        early = [not behind for behind in late]
    elif len(found) == 2 and sum(early) != 1:
        early = [True, False] if found[0].item.order < found[1].item.order else [False, True]
    if wrong or len(found) > 2 or any(norm.weight is None for norm in found):
        bare = [norm for norm in found if norm.weight is None] or found
        bad = tuple(wrong) or tuple(norm.item for norm in bare)
        raise UserError(refusals.unexplained(bad))
    draft.model |= {"final_norm": False, "embed_norm": False}
    if len(found) == 2 and not told:
        draft.add(_either(*(found if early[0] else reversed(found))))
        return
    for norm, before in zip(found, early, strict=True):
        draft.add(_norm_place(norm, before or (_between(norm, token, blocks_at) and not late[0]), len(found) == 1))


def _between(norm: Norm, token: Item, blocks_at: int) -> bool:
    """Whether the file has a norm between the embeddings and the blocks."""
    return token.order < norm.item.order < blocks_at


def _either(first: Norm, last: Norm) -> Choice:
    """Two norms outside of the blocks whose names do not say which is which; ``first`` is likely the embeddings'."""
    fields = {"final_norm": True, "embed_norm": True}

    def option(embed: Norm, final: Norm) -> Option:
        rules: dict[str, Rule] = {}
        for norm, name in ((embed, "ln_e"), (final, "ln_f")):
            rules |= _rules(norm, name, "likely", "shape, and place in the file")
        return Option(f"{embed.item.theirs} is ln_e, {final.item.theirs} is ln_f", fields, rules)

    why = "which is behind the embeddings, and which behind the blocks"
    return Choice(f"place of {first.item.theirs}", (option(first, last), option(last, first)), why)


def _rules(norm: Norm, name: str, sure: str, why: str) -> dict[str, Rule]:
    """Its tensors as the norm ``name`` of ours."""
    return {
        item.theirs: Rule(item.theirs, (f"{name}.{kind}",), rules_of.axes(item, ""), sure, why)
        for item, kind in ((norm.weight, "weight"), (norm.bias, "bias"))
        if item is not None
    }


def _norm_place(norm: Norm, before: bool, alone: bool) -> Choice:
    """Where a norm outside of the blocks acts; a choice where it is the only one and no name says it."""
    said = set(norm.item.said)
    sure, why = ("sure", "name and shape") if said & words.NORM else ("likely", "shape")

    def option(name: str, field: str) -> Option:
        only = {"final_norm": False, "embed_norm": False} if alone else {}
        return Option(name, {**only, field: True}, _rules(norm, name, sure, why))

    options = [option("ln_f", "final_norm"), option("ln_e", "embed_norm")]
    if before:
        options.reverse()
    said_so = bool(said & words.EMBED) or bool(said & words.FINAL) or (alone and said == {"norm"} and not before)
    kept = options[: 1 if said_so or not alone else 2]
    return Choice(f"place of {norm.item.theirs}", tuple(kept), "behind the blocks, or behind the embeddings")
