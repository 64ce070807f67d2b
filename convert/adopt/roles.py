"""From names and shapes to a proposal: what each tensor of a home-made model is, and what its weights cannot say."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from convert.adopt.reading import blocks, buffers, choices, hints, matrices, refusals, rules_of, tables, words
from convert.adopt.reading.blocks import Item
from convert.adopt.reading.choices import Style
from convert.adopt.reading.matrices import Reading
from convert.adopt.reading.rules_of import bare
from convert.adopt.reading.tables import Norm
from convert.adopt.rules import Choice, Map, Proposal, Rule, has_number, named
from convert.formats.opened import Tensor
from mlxgpt.common.errors import UserError

_NEAR_ZERO = 0.5  # of a norm's weights, the median of the absolute values: below it, they are added to 1


class State(Protocol):
    """What is asked of source.State."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def under(self) -> tuple[str, ...]: ...
    @property
    def prefix(self) -> str: ...
    @property
    def extras(self) -> Mapping[str, Any]: ...
    @property
    def tied(self) -> tuple[tuple[str, ...], ...]: ...


@dataclass
class _Draft:
    """A proposal in the making."""

    rules: dict[str, Rule] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)  # what buffers say
    pairing: str = ""  # of rope, as a table has it
    bare_qk: list[str] = field(default_factory=list)  # norms of queries and keys without bias
    without: list[str] = field(default_factory=list)  # modules without the bias that others of their kind have

    def add(self, choice: Choice | None) -> None:
        """Appends a choice and takes its first option."""
        if choice is None:
            return
        first = choice.options[0]
        self.rules |= first.rules
        self.model |= first.model
        if len(choice.options) > 1:
            self.choices.append(choice)


def propose(state: State) -> Proposal:
    """The map of a state dict with the likeliest of each choice, and the choices.

    Raises:
        UserError: no decoder: says what was found.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    refusals.check(shapes, {name: tensor.dtype.name for name, tensor in state.tensors.items()})
    built = blocks.structure(shapes)
    width = _width(built)
    draft = _Draft()
    known = hints.read(state.extras)
    block = _weights(state, built.block, width, draft, True)
    top = _weights(state, built.top, width, draft, False)
    if not block:
        block, top = _apart(top, width)
    vectors = tuple(item for item in block if len(bare(item.shape)) < 2 or item.kind == "bias")
    mats = tuple(item for item in block if item not in vectors)
    reading = matrices.read(
        tuple(replace(item, shape=item.shape if item.heads else bare(item.shape)) for item in mats), width
    )
    if reading is None:
        raise UserError(refusals.unread(mats, width))
    if reading.left:
        raise UserError(refusals.unexplained(reading.left))
    rest = _matrices(reading, vectors, width, draft)
    style = _style(reading, block, top)
    rest = _qk_norms(rest, reading, width, draft)
    found = _block_norms(rest, block, width, draft)
    style = replace(style, nanochat=not found and not style.encoder)
    _outside(state, top, width, draft)
    _norm_fields(state, found, draft, style, known)
    draft.model = {
        "family": "mlxgpt", "n_layer": built.n_layer, "n_embd": width, "fused_qkv": False, "fused_mlp": False,
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


def _unnumbered(draft: _Draft) -> None:
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
    tops = {size for item in built.top for size in item.shape if len(bare(item.shape)) == 2}
    for item in built.block or built.top:
        shape = bare(item.shape)
        square = len(item.shape) > len(shape) and len(shape) == 2 and shape[0] == shape[1]
        if len(shape) >= 2 and item.kind != "bias" and not square:
            counts.update({size: 2 for size in set(shape) if size > 1})
        elif len(shape) == 1:
            counts.update({shape[0]: 1})
    if not counts:
        raise UserError("no matrices in blocks: expected the state dict of a decoder")
    return max(counts, key=lambda size: (counts[size], size in tops, size))


def _weights(state: State, items: tuple[Item, ...], width: int, draft: _Draft, inside: bool) -> tuple[Item, ...]:
    """The items that are weights; buffers go to the draft, with what they tell."""
    kept = []
    for item in items:
        tensor = state.tensors[item.example]
        found = buffers.recognize(item.theirs, item.shape, tensor.dtype.name, tensor.read, width, inside)
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


def _apart(items: tuple[Item, ...], width: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
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


def _matrices(reading: Reading, vectors: tuple[Item, ...], width: int, draft: _Draft) -> list[Item]:
    """Rules of the block's matrices and their biases; gives the vectors that are left."""
    by_key = {tables.key(item): item for item in vectors if item.kind == "bias"}
    bias_of: dict[str, Item | None] = {}
    items = tuple(item for item, _ in reading.roles.values())
    fixed: set[str] = set()
    for role, (item, lay) in reading.roles.items():
        bias = by_key.get(tables.key(item))
        if bias is not None and int(np.prod(bias.shape)) * max(bias.heads, 1) != (
            width if role in matrices.WRITES else lay.size
        ):
            bias = None
        bias_of[item.theirs] = bias
        sure, why = rules_of.certainty(role, reading, items, width)
        if sure != "guess":
            fixed.add(role)
        draft.rules |= rules_of.pair(role, item, lay, bias, sure, why)
    _bias_fields(reading, bias_of, draft)
    turned = list(rules_of.turns(reading, bias_of))
    four = rules_of.which_of_four(reading, bias_of, fixed, bool(turned))
    for choice in [] if four is not None else turned:
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


def _bias_fields(reading: Reading, bias_of: Mapping[str, Item | None], draft: _Draft) -> None:
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


def _qk_norms(rest: list[Item], reading: Reading, width: int, draft: _Draft) -> list[Item]:
    """Norms of queries and keys among the vectors."""
    left: list[Item] = []
    out = reading.roles["o"][1].size
    found: dict[str, Norm] = {}
    for norm in tables.norms(tuple(rest)):
        item = norm.item
        near = set(words.words(".".join(item.inside.split(".")[-2:])))
        letters = [letter for letter, group in (("q", words.QUERY), ("k", words.KEY)) if near & group]
        size = bare(item.shape)[-1]
        small = reading.context.get(item.theirs, "") != "mlp" and size != width
        if len(letters) == 1 and (near & words.NORM or small) and norm.weight is not None:
            found[letters[0]] = norm
        else:
            left += [each for each in (norm.weight, norm.bias) if each is not None]
    if not found:
        return left
    if set(found) != {"q", "k"}:
        raise UserError(f"{next(iter(found.values())).item.theirs}: a norm of queries or keys only: expected both")
    query, key = bare(found["q"].item.shape), bare(found["k"].item.shape)
    if len(query) > 1:
        raise UserError(
            f"{found['q'].item.theirs}: {list(query)}, a norm of its own for each head: expected one for all"
        )
    full = query[0] == out and key[0] == _kv_size(reading)
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


def _kv_size(reading: Reading) -> int:
    """n_kv_head head_dim."""
    if "k" in reading.roles:
        return _size(reading, "k")
    return _size(reading, "kv") // 2 if "kv" in reading.roles else (_size(reading, "qkv") - _size(reading, "o")) // 2


def _size(reading: Reading, role: str) -> int:
    return reading.roles[role][1].size


def _block_norms(rest: list[Item], block: tuple[Item, ...], width: int, draft: _Draft) -> list[Norm]:
    """The norms of a block, with their rules."""
    wrong = [item for item in rest if bare(item.shape) != (width,) or set(item.said) & refusals.SCALES]
    if wrong:
        raise UserError(refusals.unexplained(tuple(wrong)))
    found = tables.norms(tuple(rest))
    placed = tables.place(found, block) if found else {}
    if placed is None:
        shown = ", ".join(norm.item.theirs for norm in found[:5])
        raise UserError(f"{len(found)} norms in a block ({shown}): expected none, one, two or four")
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


def _outside(state: State, top: tuple[Item, ...], width: int, draft: _Draft) -> None:
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


def _head(state: State, token: Item, head: tuple[Item, bool] | None, rest: list[Item], draft: _Draft) -> list[Item]:
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


def _outer_norms(rest: list[Item], width: int, draft: _Draft, token: int) -> None:
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


def _norm_fields(state: State, found: list[Norm], draft: _Draft, style: Style, known: Mapping[str, Any]) -> None:
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
        values = np.abs(np.asarray(state.tensors[name].read(), dtype=np.float32)) if name else np.ones(1)
        draft.model["norm_bias"] = False
        draft.add(choices.norm(False, said, float(np.median(values)) < _NEAR_ZERO, style))
    else:
        draft.model |= {"norm_weight": False, "norm_bias": False, "final_norm": True, "embed_norm": False}
        draft.notes.append("no norm has weights: they are norms without weights, or there are none")
        draft.add(choices.bare_norms("qk_norm" in draft.model))
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


def _sizes(reading: Reading, known: Mapping[str, Any], draft: _Draft, style: Style, width: int) -> None:
    """Heads, hidden size, context and positions, and the choices that are left."""
    out = _size(reading, "o")
    kv = _kv_size(reading)
    draft.model["n_hidden"] = _size(reading, "proj")
    told = draft.told
    dim = told.get("head_dim", 0) or _head_dim(reading)
    if not dim and told.get("n_head") and out % told["n_head"] == 0:
        dim = out // told["n_head"]
    if not dim and told.get("rotary_dim") and not known.get("n_head") and out % told["rotary_dim"] == 0:
        dim = told["rotary_dim"]
        draft.notes.append(f"head_dim = {dim}: the width of the table of rope")
    may_rope = draft.model.get("position") is None and told.get("position") in (None, "rope")
    fields, choice = choices.n_head(out, kv, dim, known, may_rope)
    draft.model |= fields
    draft.add(choice)
    dims = [option.model["head_dim"] for option in choice.options] if choice else [fields["head_dim"]]
    draft.model["block_size"] = draft.model.get("block_size") or told.get("block_size") or known.get("block_size") or 0
    if not draft.model["block_size"]:
        draft.model["block_size"] = 1024
        draft.notes.append("block_size = 1024: nothing tells the longest context; --set block_size=N where you know it")
    _positions(known, draft, style, width, fields["head_dim"] if choice is None else 0)
    if known.get("activation"):
        draft.model["activation"] = known["activation"]
    draft.add(choices.activation(style, reading.gated, known))
    for choice in choices.others(known, style, width, dims):
        draft.add(choice)


def _head_dim(reading: Reading) -> int:
    """From kernels with an axis of heads, or a list of heads; 0 where there is none."""
    dims = [lay.head_dim for _, lay in reading.roles.values() if lay.head_dim]
    return dims[0] if dims else 0


def _positions(known: Mapping[str, Any], draft: _Draft, style: Style, width: int, head_dim: int) -> None:
    """Learned, sinusoids or rope where a tensor says it; else a choice."""
    told = draft.told
    if "position" in draft.model:
        return
    if told.get("position") in ("sinusoidal", "alibi"):
        draft.model |= {key: told[key] for key in ("position", "sinusoid", "position_multiplier") if key in told}
        return
    fields, made = choices.position({"position": told.get("position")}, style, width)
    draft.model |= fields
    for choice in made:
        draft.add(choice)
    for key in ("rope_theta", "rotary_dim"):
        if key in told:
            draft.model[key] = told[key]
        elif key in known:
            draft.model[key] = known[key]
    for choice in choices.rope(known, style, draft.pairing, head_dim, "rope_theta" in told):
        if choice.name == "rope":
            draft.choices.append(choice)
        else:
            draft.add(choice)


def _said(known: Mapping[str, Any], draft: _Draft) -> None:
    """Notes on settings that shapes contradict."""
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
