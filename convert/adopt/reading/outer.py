"""Rules for what lies outside the blocks: embeddings, positions, the head, and norms before and behind."""

from dataclasses import replace

import numpy as np

from convert.adopt.reading import matrices, refusals, rules_of, tables, words
from convert.adopt.reading.blocks import Item
from convert.adopt.reading.draft import Draft, State
from convert.adopt.reading.rules_of import bare
from convert.adopt.rules import Rule
from mlxgpt.common.errors import UserError


def apart(items: tuple[Item, ...], width: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """(block, outside) of a model with one block whose tensors bear no number."""
    found = tables.tables(tuple(item for item in items if _outer(item)), width)
    outer = {item.theirs for item, _ in found.roles.values()}
    head = found.roles.get("lm_head")
    for item in items:
        said = set(words.words(item.inside))
        if len(bare(item.shape)) == 1 and (
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
    return len(bare(item.shape)) == 2 and not context and max(worth.values()) >= 3.0


def outside(state: State, top: tuple[Item, ...], width: int, draft: Draft) -> None:
    """Embeddings, positions, head and norms outside the blocks.

    Raises:
        UserError: no embedding, or a tensor that nothing explains.
    """
    matrix = tuple(item for item in top if len(bare(item.shape)) >= 2)
    found = tables.tables(tuple(replace(item, shape=bare(item.shape)) for item in matrix), width)
    if "wte" not in found.roles:
        shown = ", ".join(f"{item.theirs} {list(item.shape)}" for item in matrix[:4]) or "none"
        raise UserError(f"no embedding of tokens (V, {width}) outside the blocks: found {shown}")
    if found.left:
        raise UserError(refusals.unexplained(found.left))
    original = {item.theirs: item for item in matrix}
    token, token_turned = found.roles["wte"]
    draft.model["vocab_size"] = token.shape[1 if token_turned else 0]
    for role, (item, turned) in found.roles.items():
        sure = "sure" if tables.embeds(item)[role] >= 3 else "likely"
        axes = rules_of.axes(original[item.theirs], "i o" if turned else "")
        draft.rules[item.theirs] = Rule(
            item.theirs, (f"{role}.weight",), axes, sure, "name and shape" if sure == "sure" else "shape"
        )
    if "wpe" in found.roles:
        item, turned = found.roles["wpe"]
        draft.model |= {"position": "learned", "block_size": item.shape[1 if turned else 0]}
    rest = [item for item in top if item not in matrix]
    head = found.roles.get("lm_head")
    rest = _head(state, token, head, rest, draft)
    _outer_norms(rest, width, draft, token.order)


def _head(state: State, token: Item, head: tuple[Item, bool] | None, rest: list[Item], draft: Draft) -> list[Item]:
    """Tied or not, and the head's bias."""
    vocab = draft.model["vocab_size"]
    bias = next((item for item in rest if item.kind == "bias" and bare(item.shape) == (vocab,)), None)
    bias = bias or next((item for item in rest if bare(item.shape) == (vocab,) != (draft.told.get("width"),)), None)
    tied = head is None
    if head is not None:
        both = {token.theirs, head[0].theirs}
        tied = any(both <= set(group) for group in state.tied)
        if not tied and not head[1] and token.shape == head[0].shape:
            one, two = (np.asarray(state.tensors[name].read()) for name in (token.theirs, head[0].theirs))
            tied = one.dtype == two.dtype and np.array_equal(one, two)
    if bias is not None:
        if tied:
            draft.notes.append(
                f"{bias.theirs}: a bias on a head that is the embedding: the head becomes a matrix of its own"
            )
            if head is None:
                draft.rules[token.theirs] = replace(
                    draft.rules[token.theirs], to=("wte.weight", "lm_head.weight"), axes="o i"
                )
        tied = False
        draft.rules[bias.theirs] = Rule(bias.theirs, ("lm_head.bias",), "", "sure", "size of the vocabulary")
        draft.model["head_bias"] = True
    if tied and head is not None:
        rule = draft.rules[head[0].theirs]
        draft.rules[head[0].theirs] = replace(rule, to=("wte.weight",), why=f"the values of {token.theirs}: tied")
    draft.model["tied"] = tied
    return [item for item in rest if item is not bias]


def _outer_norms(rest: list[Item], width: int, draft: Draft, token: int) -> None:
    """The norm behind the blocks, and one right behind the embeddings."""
    wrong = [item for item in rest if bare(item.shape) != (width,)]
    found = tables.norms(tuple(item for item in rest if item not in wrong))
    early = [
        norm
        for norm in found
        if set(norm.item.said) & (words.EMBED | {"input", "pre", "in", "first"})
        and not set(norm.item.said) & {"head", "logits", "out", "output", "final"}
    ]
    if len(found) == 2 and not early:
        early = [min(found, key=lambda norm: norm.item.order)]
    late = [norm for norm in found if norm not in early]
    if wrong or len(early) > 1 or len(late) > 1:
        raise UserError(refusals.unexplained(tuple(wrong) or tuple(norm.item for norm in found)))
    draft.model |= {"final_norm": bool(late), "embed_norm": bool(early)}
    for name, norm in [("ln_f", norm) for norm in late] + [("ln_e", norm) for norm in early]:
        sure, why = ("sure", "name and shape") if set(norm.item.said) & words.NORM else ("likely", "shape")
        for item, kind in ((norm.weight, "weight"), (norm.bias, "bias")):
            if item is not None:
                draft.rules[item.theirs] = Rule(item.theirs, (f"{name}.{kind}",), rules_of.axes(item, ""), sure, why)
        if norm.weight is None:
            raise UserError(f"{norm.item.theirs}: a bias that no matrix explains")
