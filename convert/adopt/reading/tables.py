"""What lies outside the blocks: embeddings, positions, the head, norms before and after; and norms inside."""

from collections.abc import Mapping
from dataclasses import dataclass

from convert.adopt.reading import words
from convert.adopt.reading.blocks import Item
from convert.adopt.reading.matrices import contexts
from mlxgpt.common.errors import UserError

_FIRST = frozenset(
    {"1", "attn", "attention", "input", "pre", "sa", "mha", "first", "self", "att", "0", "msa", "before"}
)
_SECOND = frozenset(
    {"2", "ffn", "mlp", "ff", "ffwd", "feed", "forward", "second", "feedforward", "ffw", "after", "post"}
)

_NAMED = 9.0  # what ``embeds`` gives for a word for tokens beside one for an embedding


def embeds(item: Item) -> dict[str, float]:
    """How well the name of a table outside the blocks fits wte, wpe and lm_head."""
    said = set(words.words(item.inside))
    position = 10.0 if said & words.POSITION else 0.0
    embed = bool(said & words.EMBED) or "wte" in said
    head = (
        6.0 if said & {"lm", "head", "unembed", "unembedding", "logits", "logit", "generator", "deembed"} else 0.0
    ) + (3.0 if said & words.HEAD and not embed else 0.0)
    token = (5.0 if said & words.TOKEN else 0.0) + (4.0 if embed else 0.0)
    if "wte" in said:
        token += 5.0
    if position:
        token, head = token - 6.0, head - 6.0
    row = 2.0 if len(item.shape) == 3 and item.shape[0] == 1 else 0.0  # (1, T, C), to be added to a batch
    return {"wte": token - (6.0 if head > 5 else 0.0), "wpe": position + row, "lm_head": head}


@dataclass(frozen=True)
class Tables:
    """The tables outside the blocks, [V, C] as they lie unless ``turned``; None where there is none."""

    roles: Mapping[str, tuple[Item, bool]]
    left: tuple[Item, ...]


def tables(items: tuple[Item, ...], width: int) -> Tables:
    """Gives the matrices outside the blocks their roles, by name and by which share the size of the vocabulary.

    Raises:
        UserError: two tables are named as the embedding of tokens.
    """
    fit: list[tuple[Item, int, bool]] = []
    for item in items:
        sides = list(item.used)
        if len(sides) == 2 and width in sides:
            turned = sides[1] != width
            fit.append((item, sides[0] if turned is False else sides[1], turned))
    best: tuple[float, dict[str, tuple[Item, bool]]] | None = None
    choices = [*range(len(fit)), None]
    for token in range(len(fit)):
        for position in choices:
            for head in choices:
                used = [i for i in (token, position, head) if i is not None]
                if len(set(used)) < len(used) or (head is not None and fit[head][1] != fit[token][1]):
                    continue
                value = sum(embeds(fit[i][0])[role] + 1.0 for i, role in
                            ((token, "wte"), (position, "wpe"), (head, "lm_head")) if i is not None)  # fmt: skip
                if head is not None and len(fit) == 2 and fit[0][1] == fit[1][1]:
                    value += 2.0
                if position is not None:
                    value += 0.5 if fit[position][1] < fit[token][1] else 0.0
                    value -= 4.0 if not embeds(fit[position][0])["wpe"] else 0.0
                value -= 2.0 * (fit[token][2]) + 10.0 * (len(fit) - len(used))
                value += 0.1 * (head is None or head > token) + 1.0 * (position is None or position > token)
                if best is None or value > best[0]:
                    made = {"wte": token, "wpe": position, "lm_head": head}
                    best = value, {role: (fit[i][0], fit[i][2]) for role, i in made.items() if i is not None}
    roles = best[1] if best else {}
    both = [roles[role][0] for role in ("wte", "wpe") if role in roles]
    if len(both) == 2 and all(embeds(item)["wte"] >= _NAMED for item in both):
        raise UserError(
            f"{both[0].theirs} and {both[1].theirs} are both named as the embedding of tokens: expected one; name"
            " the other with --map"
        )
    used = [item for item, _ in roles.values()]
    return Tables(roles, tuple(item for item in items if all(item is not other for other in used)))


@dataclass(frozen=True)
class Norm:
    """A norm: its weight and bias, where it has them."""

    weight: Item | None
    bias: Item | None

    @property
    def item(self) -> Item:
        """Either of them."""
        item = self.weight or self.bias
        assert item is not None
        return item


def key(item: Item) -> tuple[str, ...]:
    """What pairs a bias with its weight: the module's path, and the words that do not say which it is."""
    return (item.module, *words.kind(item.leaf)[1])


def norms(items: tuple[Item, ...]) -> list[Norm]:
    """Vectors that belong to no matrix, in pairs of weight and bias, in the order of the file."""
    pairs: dict[tuple[str, ...], dict[str, Item]] = {}
    for item in items:
        pairs.setdefault(key(item), {})[item.kind] = item
    made = [Norm(pair.get("weight"), pair.get("bias")) for pair in pairs.values()]
    for lone in [norm for norm in made if norm.weight is None]:
        near = [norm for norm in made if norm.bias is None and _one_word_apart(norm.item, lone.item)]
        if len(near) == 1:  # whatever the project calls its gain
            made[made.index(near[0])] = Norm(near[0].weight, lone.bias)
            made.remove(lone)
    return made


def _one_word_apart(one: Item, other: Item) -> bool:
    """Whether two tensors of a module differ in one word of their names."""
    said = words.words(one.leaf), words.words(other.leaf)
    return (
        one.module == other.module
        and len(said[0]) == len(said[1]) > 1
        and sum(a != b for a, b in zip(*said, strict=True)) == 1
    )


def place(found: list[Norm], block: tuple[Item, ...]) -> dict[str, Norm] | None:
    """ln_1, ln_2 and the two behind the branches, of one, two or four norms of a block; None for another number."""
    context = contexts(block)
    ordered = sorted(found, key=lambda norm: norm.item.order)
    if len(found) == 1:
        return {"ln_1": ordered[0]}
    if len(found) == 2 and all(_behind(norm.item) for norm in ordered):
        ordered.sort(key=lambda norm: -_branch(norm.item, context[norm.item.theirs]))
        return dict(zip(("ln_1", "ln_2"), ordered, strict=True))
    if len(found) == 2:
        lean = [_lean(norm.item, context[norm.item.theirs]) for norm in ordered]
        return dict(zip(("ln_1", "ln_2") if lean[0] >= lean[1] else ("ln_2", "ln_1"), ordered, strict=True))
    if len(found) != 4:
        return None
    branch = sorted(ordered, key=lambda norm: -_branch(norm.item, context[norm.item.theirs]))
    made: dict[str, Norm] = {}
    for name, both in (("ln_1", branch[:2]), ("ln_2", branch[2:])):
        pair = sorted(both, key=lambda norm: (_behind(norm.item), _extended(norm, both), norm.item.order))
        made |= {name: pair[0], f"{name}_post": pair[1]}
    return made


def _extended(norm: Norm, pair: list[Norm]) -> bool:
    """Whether its module is called as the other's, and something more: n1b of n1 and n1b, the later one."""
    said, module = set(norm.item.said), norm.item.module
    shorter = any(each is not norm and module.startswith(each.item.module) for each in pair)
    return shorter and not said & {"pre", "before", "in", "input"}


def unsaid(found: list[Norm], block: tuple[Item, ...]) -> bool:
    """Whether a block has two norms of which no name says which is which: neither words, nor numbers, nor modules."""
    if len(found) != 2 or behind(found):
        return False
    context = contexts(block)
    one, two = (_lean(norm.item, context[norm.item.theirs]) for norm in found)
    numbers = [[word for word in norm.item.said if word.isdigit()] for norm in found]
    return one == two and not all(numbers)


def _lean(item: Item, context: str) -> float:
    """Above 0 for the norm of attention, below for the MLP's."""
    said = set(item.said)
    value = {"attn": 1.5, "mlp": -1.5, "": 0.0}[context]
    if {"post", "attention"} <= said or {"post", "attn"} <= said:
        return -3.0 if not said & {"ffn", "mlp", "ff"} else value
    return value + 2.0 * (bool(said & _FIRST)) - 2.0 * bool(said & _SECOND)


def _branch(item: Item, context: str) -> float:
    """Of four norms: above 0 where it is before or behind attention."""
    said = set(item.said)
    if said & words.MLP or said & {"ffw", "feedforward"}:
        return -2.0
    if said & words.ATTENTION or "input" in said:
        return 2.0
    return {"attn": 1.0, "mlp": -1.0, "": 0.0}[context] + (
        1.0 if said & {"1", "0"} else -1.0 if said & {"3", "4"} else 0.0
    )


def behind(found: list[Norm]) -> bool:
    """Whether the names of all norms say that they come after a branch."""
    return bool(found) and all(_behind(norm.item) for norm in found)


def _behind(item: Item) -> bool:
    said = set(item.said)
    return bool(said & {"post", "after", "out", "behind", "sandwich"})
