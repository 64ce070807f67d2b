"""From names and shapes to a proposal: what each tensor of a home-made model is, and what its weights cannot say."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from convert.adopt.reading import blocks, buffers, choices, hints, inner, outer, refusals, tables, words, zeros
from convert.adopt.reading.blocks import Item
from convert.adopt.reading.choices import Style
from convert.adopt.reading.draft import Draft, State
from convert.adopt.reading.matrices import Reading
from convert.adopt.reading.tables import Norm
from convert.adopt.rules import Map, Proposal, Rule, has_number, named
from convert.formats.opened import Tensor
from mlxgpt.common.errors import UserError

_NEAR_ZERO = 0.5  # of a norm's weights, the median of the absolute values: below it, they are added to 1


def propose(state: State) -> Proposal:
    """The map of a state dict with the likeliest of each choice, and the choices.

    Raises:
        UserError: no decoder: says what was found.
    """
    try:
        return _propose(state, state.tensors)
    except UserError:
        real = zeros.numbered(state.tensors)
        if not real:
            raise
        called = {name: new for new, name in real.items()}
        try:
            made = _propose(state, {called.get(name, name): tensor for name, tensor in state.tensors.items()})
        except UserError:
            made = None
        if made is None:
            raise
    return zeros.restored(made, real)


def _propose(state: State, tensors: Mapping[str, Tensor]) -> Proposal:
    """The proposal for a state's tensors under these names."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    refusals.check(shapes)
    built = blocks.structure(shapes)
    width = _width(built)
    draft = Draft(model={"n_embd": width})
    known = hints.read(state.extras)
    block = _weights(tensors, built.block, width, draft, True)
    top = _weights(tensors, built.top, width, draft, False)
    if not block:
        block, top = outer.apart(top, width)
    vectors = tuple(item for item in block if len(item.used) < 2 or item.kind == "bias")
    mats = tuple(item for item in block if item not in vectors)
    reading = inner.read(mats, vectors, width)
    if reading is None:
        raise UserError(refusals.unread(mats, width))
    if reading.left:
        raise UserError(refusals.unexplained(reading.left))
    rest = inner.matrix_rules(reading, vectors, width, draft)
    style = _style(reading, block, top)
    rest = inner.qk_norms(rest, reading, width, draft)
    found = inner.block_norms(rest, block, width, draft)
    style = replace(style, nanochat=not found and not style.encoder)
    outer.outside(tensors, state.tied, top, width, draft, min(item.order for item in block))
    _norm_fields(tensors, found, draft, style, known)
    draft.model = {
        "family": "mlxgpt", "n_layer": built.n_layer, "fused_qkv": False, "fused_mlp": False,
        "qkv_by_head": False, **draft.model,
    }  # fmt: skip
    _sizes(reading, known, draft, style, width)
    _said(known, draft)
    if draft.without:
        draft.model["no_bias"] = tuple(draft.without)
    if built.n_layer == 1:
        _unnumbered(draft)
    order = {item.theirs: item.order for item in (*built.block, *built.top)}
    rules = tuple(sorted(draft.rules.values(), key=lambda rule: order[rule.theirs]))
    rope = next((choice.options[0].rope for choice in draft.choices if choice.name == "rope"), None)
    made = Map(rules, draft.model, draft.left, rope or "halves", tuple(state.under), state.prefix)
    return Proposal(made, tuple(draft.choices), tuple(draft.notes))


def _unnumbered(draft: Draft) -> None:
    """One block whose tensors bear no number: ours are those of block 0."""

    def plain(rules: Mapping[str, Rule]) -> dict[str, Rule]:
        return {
            name: rule if has_number(rule.theirs, "n") or rule.axes.startswith("n ")
            else replace(rule, to=tuple(named(each) for each in rule.to))
            for name, rule in rules.items()
        }  # fmt: skip

    draft.rules = plain(draft.rules)
    draft.choices = [
        replace(choice, options=tuple(replace(option, rules=plain(option.rules)) for option in choice.options))
        for choice in draft.choices
    ]


def _width(built: blocks.Structure) -> int:
    """n_embd: the size that most matrices of a block share.

    Raises:
        UserError: there are no matrices.
    """
    counts: Counter[int] = Counter()
    tops = {size for item in built.top for size in item.shape if len(item.used) == 2}
    for item in built.block or built.top:
        shape = item.used
        square = len(item.shape) > len(shape) and len(shape) == 2 and shape[0] == shape[1]
        if len(shape) >= 2 and item.kind != "bias" and not square:
            counts.update({size: 2 for size in set(shape) if size > 1})
        elif len(shape) == 1:
            counts.update({shape[0]: 1})
    if not counts:
        raise UserError("no matrices in blocks: expected the state dict of a decoder")
    return max(counts, key=lambda size: (counts[size], size in tops, size))


def _weights(
    tensors: Mapping[str, Tensor], items: tuple[Item, ...], width: int, draft: Draft, inside: bool
) -> tuple[Item, ...]:
    """The items that are weights; buffers go to the draft, with what they tell."""
    kept = []
    for item in items:
        tensor = tensors[item.example]
        read = (lambda tensor=tensor: tensor.read()[0]) if item.stacked else tensor.read
        found = buffers.recognize(item.theirs, item.shape, tensor.dtype.name, read, width, inside)
        if found is None and not inside:
            found = _sinusoid(item, tensor, width)
        if found is None:
            kept.append(item)
            continue
        draft.left[item.theirs] = found.why
        if "rope_theta" in found.model or "rope_theta" not in draft.told:
            draft.told |= {key: value for key, value in found.model.items() if key != "block_size"}
        if "block_size" in found.model:
            draft.told.setdefault("block_size", found.model["block_size"])
        draft.pairing = draft.pairing or found.rope
    return tuple(kept)


def _sinusoid(item: Item, tensor: Tensor, width: int) -> buffers.Buffer | None:
    """A table of sinusoids outside the blocks."""
    sides = [side for side in item.shape if side != 1]
    if len(sides) != 2 or sides[1] != width or sides[0] * sides[1] > 1 << 24 or not set(item.said) & words.POSITION:
        return None
    fields = buffers.sinusoid(np.asarray(tensor.read()).reshape(sides))
    return None if fields is None else buffers.Buffer("table of sinusoids", fields | {"block_size": sides[0]})


def _norm_fields(
    tensors: Mapping[str, Tensor], found: list[Norm], draft: Draft, style: Style, known: Mapping[str, Any]
) -> None:
    """Kind, epsilon and placement of norms."""
    made = [rule for rule in draft.rules.values() if any(part in rule.to[0] for part in ("ln_", "q_norm", "k_norm"))]
    if made and not found:
        raise UserError(f"{made[0].theirs}: a norm with weights, and none in the blocks: expected both or neither")
    bias = any(rule.to[0].endswith(".bias") for rule in made)
    weights = [rule for rule in made if rule.to[0].endswith(".weight")]
    if bias:
        draft.model |= {"norm": "layer", "norm_bias": True}
        draft.without += draft.bare_qk
        lone = {rule.to[0].rpartition(".")[0] for rule in weights} - {
            rule.to[0].rpartition(".")[0] for rule in made if rule.to[0].endswith(".bias")
        }
        draft.without += [name for name in ("ln_f", "ln_e") if name in lone]
    elif weights:
        said = frozenset(word for rule in weights for word in words.words(rule.theirs))
        name = next((rule.theirs for rule in weights if rule.to[0] == "ln_f.weight"), None)
        values = np.abs(np.asarray(tensors[name].read(), dtype=np.float32)) if name else np.ones(1)
        draft.model["norm_bias"] = False
        draft.add(choices.norm(said, float(np.median(values)) < _NEAR_ZERO, style, known))
    else:
        draft.model |= {"norm_weight": False, "norm_bias": False, "final_norm": True, "embed_norm": False}
        draft.notes.append("no norm has weights: they are norms without weights, or there are none")
        for choice in choices.bare_norms("qk_norm" in draft.model, style):
            draft.add(choice)
    if "norm_eps" in known:
        draft.model["norm_eps"] = known["norm_eps"]
    draft.add(choices.norm_eps(draft.model.get("norm", "layer"), known, style))
    style = replace(style, behind=tables.behind(found))
    placement, choice = choices.placement(len(found), style, draft.model["final_norm"], known)
    draft.model["placement"] = placement
    draft.add(choice)


def _style(reading: Reading, block: tuple[Item, ...], top: tuple[Item, ...]) -> Style:
    """What the names remind of."""
    said = {word for item in (*block, *top) for word in words.words(item.theirs)}
    leaves = {item.leaf for item in block}
    bare_norms = not any(item.kind == "bias" for item in block)
    return Style(
        llama=(reading.gated and bare_norms) or bool(said & {"rms", "rmsnorm"}),
        lecture=bool(said & {"sa", "ffwd"}) or any(item.heads for item in block),
        encoder=not reading.gated and {"linear1", "linear2"} <= {item.module.replace("_", "") for item in block},
        gpt2=bool(said & {"wte", "wpe"}) or {"c", "attn"} <= said,
        flax="kernel" in leaves,
        meta={"q", "w"} <= said and {"1", "3"} <= said and not said & {"proj", "query"},
    )


def _sizes(reading: Reading, known: Mapping[str, Any], draft: Draft, style: Style, width: int) -> None:
    """Heads, hidden size, context and positions, and the choices that are left."""
    out = inner.size(reading, "o")
    kv = inner.kv_size(reading)
    draft.model["n_hidden"] = inner.size(reading, "proj")
    told = draft.told
    dim = told.get("head_dim", 0) or _head_dim(reading)
    if not dim and told.get("n_head") and out % told["n_head"] == 0:
        dim = out // told["n_head"]
    may_rope = draft.model.get("position") is None and told.get("position") in (None, "rope")
    fields, choice = choices.n_head(out, kv, dim, known, may_rope, told.get("rotary_dim", 0))
    draft.model |= fields
    draft.add(choice)
    dims = [option.model["head_dim"] for option in choice.options] if choice else [fields["head_dim"]]
    draft.model["block_size"] = draft.model.get("block_size") or told.get("block_size") or known.get("block_size") or 0
    if not draft.model["block_size"]:
        draft.model["block_size"] = 1024
        draft.notes.append("block_size = 1024: nothing tells the longest context; --set block_size=N where you know it")
    _positions(known, draft, style, width, dims)
    draft.add(choices.activation(style, reading.gated, known))
    for choice in choices.others(known, style, width, dims, told.get("attn_scale")):
        draft.add(choice)


def _head_dim(reading: Reading) -> int:
    """From kernels with an axis of heads, or a list of heads; 0 where there is none."""
    dims = [lay.head_dim for _, lay in reading.roles.values() if lay.head_dim]
    return dims[0] if dims else 0


def _positions(known: Mapping[str, Any], draft: Draft, style: Style, width: int, dims: list[int]) -> None:
    """Learned, sinusoids or rope where a tensor says it; else a choice."""
    told = draft.told
    if "position" in draft.model:
        normed = any(option.model.get("embed_norm") for choice in draft.choices for option in choice.options)
        if not normed and not draft.model.get("embed_norm"):  # behind a norm it is the same as a scale of embeddings
            draft.add(choices.learned(width))
        return
    if told.get("position") in ("sinusoidal", "alibi"):
        draft.model |= {key: told[key] for key in ("position", "sinusoid", "position_multiplier") if key in told}
        return
    fields, made = choices.position(told.get("position") or known.get("position"), style, width)
    draft.model |= fields
    for choice in made:
        draft.add(choice)
    for key in ("rope_theta", "rotary_dim"):
        if key in told:
            draft.model[key] = told[key]
        elif key in known:
            draft.model[key] = known[key]
    for choice in choices.rope(known, style, draft.pairing, dims, "rope_theta" in told):
        if choice.name == "rope":
            draft.choices.append(choice)
        else:
            draft.add(choice)


def _said(known: Mapping[str, Any], draft: Draft) -> None:
    """Notes on settings that shapes contradict.

    Raises:
        UserError: there are fewer blocks than settings say.
    """
    if known.get("n_layer", 0) > draft.model["n_layer"]:
        found = f"settings beside the weights say n_layer = {known['n_layer']}"
        raise UserError(f"{found}, and {draft.model['n_layer']} blocks are there: expected all of them")
    for name in ("n_head", "n_kv_head", "head_dim", "n_embd", "n_layer", "vocab_size"):
        value, mine = known.get(name), draft.model.get(name)
        if (
            value is not None
            and mine is not None
            and value != mine
            and not any(choice.name == name for choice in draft.choices)
        ):
            draft.notes.append(f"settings beside the weights say {name} = {value}; shapes say {mine}")
    if known.get("n_head") and any(choice.name == "n_head" for choice in draft.choices):
        draft.notes.append(f"settings beside the weights say n_head = {known['n_head']}, which no shape allows")
