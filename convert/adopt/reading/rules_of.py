"""Rules for a block's matrices and their biases, and the other ways in which they may lie."""

from collections.abc import Collection, Iterator, Mapping
from itertools import permutations

from convert.adopt.reading import matrices, words
from convert.adopt.reading.blocks import Item
from convert.adopt.reading.matrices import OURS, WRITES, Lay, Reading
from convert.adopt.rules import Choice, Option, Rule

_ORDERS = ("qkv", "kqv", "kvq", "vkq", "qvk", "vqk")
# which of four square matrices is which, the usual orders first: the rest follow
_FOUR = ("qkvo", "kqvo", "vkqo", "qvko", "oqkv", "kvqo", "vqko")


def axes(item: Item, lay: str) -> str:
    """``lay`` of a tensor without axes of one, with these, and with the one of all blocks."""
    used = item.used
    if item.stacked or len(used) < len(item.shape):
        parts = _parts(lay or ("o i" if len(used) == 2 else "o"))
        ones = len(used) < len(item.shape)
        lay = " ".join("1" if ones and size == 1 else parts.pop(0) for size in item.shape)
    return ("n " if item.stacked else "") + lay


def bias_axes(bias: Item, role: str, lay: Lay) -> str:
    """How the bias of a matrix lies: as the outputs of the matrix do, in as many axes as it has."""
    if role in WRITES:
        return "o" if bias.stacked else ""
    outputs = " ".join(part for part in _parts(lay.axes or "o i") if part != "i")
    if len(bias.used) == 1 and len(_parts(outputs)) > 1:
        outputs = "(" + outputs.replace("(", "").replace(")", "") + ")"
    return "" if outputs == "o" and not bias.stacked else outputs


def _parts(text: str) -> list[str]:
    """The axes of a pattern, those in brackets as one."""
    found: list[str] = []
    for word in text.split():
        if found and found[-1].startswith("(") and not found[-1].endswith(")"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def names(role: str, kind: str, order: str = "") -> tuple[str, ...]:
    """Ours for a role, in the order in which the pieces lie: "kqv" is k first."""
    parts = OURS[role]
    if order:
        parts = tuple({"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj"}[letter] for letter in order)
    return tuple(f"h.{{n}}.{part}.{kind}" for part in parts)


def said_order(item: Item) -> str:
    """The order of q, k and v that a fused matrix's name says; q, k, v otherwise."""
    found = [word for word in item.said if word in words.QKV]
    if found:
        return found[-1]
    letters = [
        letter for word in item.said
        for letter, group in (("q", words.QUERY), ("k", words.KEY), ("v", words.VALUE)) if word in group
    ]  # fmt: skip
    return "".join(letters) if sorted(letters) == ["k", "q", "v"] else "qkv"


def pair(
    role: str,
    item: Item,
    lay: Lay,
    bias: Item | None,
    sure: str = "sure",
    why: str = "",
    order: str = "",
    form: str = "",
) -> dict[str, Rule]:
    """The rules of a matrix and its bias; ``form`` replaces how it lies."""
    used = Lay(lay.size, form or lay.axes, lay.turned)
    made = {item.theirs: Rule(item.theirs, names(role, "weight", order), axes(item, used.axes), sure, why)}
    if bias is not None:
        how = axes(bias, bias_axes(bias, role, used))
        made[bias.theirs] = Rule(bias.theirs, names(role, "bias", order), how, sure, f"bias of {item.theirs}")
    return made


def certainty(
    role: str, reading: Reading, items: tuple[Item, ...], width: int, sizes: Mapping[str, int], turned: Collection[str]
) -> tuple[str, str]:
    """(sure, why) of a role; ``turned``: styles whose matrices may lie either way."""
    item, lay = reading.roles[role]
    context = reading.context.get(item.theirs, "")
    named = matrices.score(item, role, context)
    if named >= matrices.NAMED:
        return "sure", "name"

    def rivals(other: Item) -> bool:
        """Whether another matrix could be this role as well."""
        free = matrices.style(other) in turned
        ways = [way for way in matrices.lays(other, role, width) if free or way.turned == lay.turned]
        outputs = {width if role in WRITES else way.size for way in ways}
        fits = lay.size in {way.size for way in ways} and sizes.get(other.theirs, next(iter(outputs), 0)) in outputs
        return fits and reading.context.get(other.theirs, "") in (context, "")

    if not any(rivals(other) for other in items if other is not item):
        return ("sure", "name of its module, and shape") if context else ("likely", "the only matrix of its shape")
    if context and named >= 4:
        return "likely", "name of its module, and place"
    return "guess", "place in the file"


def fused(role: str, item: Item, lay: Lay, bias: Item | None, grouped: bool) -> Choice | None:
    """The orders in which q, k and v (or k and v) may lie in one matrix, whole or head by head."""
    first = said_order(item) if role == "qkv" else "kv"
    forms: list[tuple[str, str]] = []
    text = lay.axes
    options: list[Option] = []
    if "(p o)" in text:
        forms = [(text, "one after the other"), (text.replace("(p o)", "(g p d)" if grouped else "(h p d)"),
                                                 "group by group" if grouped else "head by head")]  # fmt: skip
        if {"query", "key", "value"} <= set(item.said):  # Megatron's name, and its layout
            forms.reverse()
        if not grouped:
            forms.append((text.replace("(p o)", "(h d p)"), "dimension by dimension"))
    else:
        forms = [(text, "as its axes say")]
        if text in ("p o i", "p i o") and item.used[1] == item.used[2]:
            forms = [("p o i", "W @ x"), ("p i o", "x @ W")]
    orders = [first, *(order for order in _ORDERS if order != first)] if role == "qkv" else ["kv", "vk"]
    # order by order what is usual: whole and by head of the first, then the other orders
    ranked = [(form, label, order) for order in orders for form, label in forms]
    ranked.sort(key=lambda each: 3 * orders.index(each[2]) + 2 * [form for form, _ in forms].index(each[0]))
    named = matrices.score(item, role, "attn") >= matrices.NAMED
    why = "name and shape" if named else "the only matrix of its shape"
    sure = "sure" if item.leaf == "in_proj_weight" else "likely"
    if sure == "sure":  # nn.MultiheadAttention has one order
        ranked = ranked[:1]
    for form, label, order in ranked:
        spelled = ", ".join(order)
        options.append(
            Option(f"{spelled}, {label}", rules=pair(role, item, lay, bias, sure, why, order, form))
        )  # fmt: skip
    return Choice(
        f"layout of {item.theirs}", tuple(options), "q, k and v in one matrix: weights do not say in which order"
    )


def which_of_four(
    reading: Reading, bias_of: dict[str, Item | None], fixed: set[str], both_turns: bool
) -> Choice | None:
    """Where names do not say which square matrix is q, k, v or o: the orders, usual ones first."""
    roles = [role for role in ("q", "k", "v", "o") if role in reading.roles and role not in fixed]
    if len(roles) < 2:
        return None
    held = sorted((reading.roles[role] for role in roles), key=lambda each: each[0].order)
    if len({item.used for item, _ in held}) > 1:
        return None
    orders = ["".join(order) for order in permutations(roles)]
    usual = ["".join(letter for letter in order if letter in roles) for order in _FOUR]
    orders.sort(key=lambda order: usual.index(order) if order in usual else len(usual))
    chosen = "".join(sorted(roles, key=lambda role: reading.roles[role][0].order))
    orders = [chosen, *(order for order in orders if order != chosen)]
    options = []
    for turned in (held[0][1].turned, not held[0][1].turned)[: 2 if both_turns else 1]:
        for order in orders:
            made: dict[str, Rule] = {}
            for role, (item, lay) in zip(order, held, strict=True):
                form = Lay(lay.size, "i o" if turned else "", turned)
                made |= pair(role, item, form, bias_of[item.theirs], "guess", "place in the file")
            label = ", ".join(order) + (", x @ W" if turned else ", W @ x") * both_turns
            options.append(Option(label, rules=made))
    return Choice(f"layout of {held[0][0].theirs} and its like", tuple(options), "which matrix is q, k, v or out")


def turns(
    reading: Reading,
    items: tuple[Item, ...],
    bias_of: dict[str, Item | None],
    width: int,
    sizes: dict[str, int],
) -> Iterator[Choice]:
    """Matrices that may lie either way: as they are read, or transposed, with what reads and what writes exchanged."""
    for kind, other in matrices.turned(reading, items, width, sizes):
        options = []
        for each in (reading, other):
            made: dict[str, Rule] = {}
            for role, (item, lay) in each.roles.items():
                if matrices.style(item) == kind and len(item.used) == 2:
                    made |= pair(role, item, lay, bias_of[item.theirs], "likely", "shapes allow both ways")
            way = next(lay.turned for item, lay in each.roles.values() if matrices.style(item) == kind)
            options.append(Option("x @ W" if way else "W @ x", rules=made))
        shown = next(item.theirs for item, _ in reading.roles.values() if matrices.style(item) == kind)
        why = "shapes do not say whether matrices are transposed"
        yield Choice(f"layout of {shown} and its like", tuple(options), why)


def gate_or_up(reading: Reading, bias_of: dict[str, Item | None]) -> Choice | None:
    """Which half of a gated MLP goes through the activation, where no name says it."""
    roles = reading.roles
    if "gate_fc" in roles:
        item, lay = roles["gate_fc"]
        said = [word for word in item.said if word in ("gate", "up")]
        options = []
        for order in (("mlp.c_gate", "mlp.c_fc"), ("mlp.c_fc", "mlp.c_gate")):
            made = pair("gate_fc", item, lay, bias_of[item.theirs], "likely", "fused")
            swapped = {
                name: Rule(rule.theirs, tuple(f"h.{{n}}.{part}.{rule.to[0].rpartition('.')[2]}" for part in order),
                           rule.axes, rule.sure, rule.why)
                for name, rule in made.items()
            }  # fmt: skip
            options.append(Option("gate, up" if order[0] == "mlp.c_gate" else "up, gate", rules=swapped))
        if said[:2] == ["up", "gate"]:
            options.reverse()
        return Choice(f"layout of {item.theirs}", tuple(options), "gate and up in one matrix")
    if "gate" not in roles:
        return None
    (gate, one), (fc, two) = roles["gate"], roles["fc"]
    if set(gate.said) & words.GATE or "up" in fc.said:
        return None
    straight = pair("gate", gate, one, bias_of[gate.theirs], "likely", "the first of two") | pair(
        "fc", fc, two, bias_of[fc.theirs], "likely", "the second of two"
    )
    other = pair("gate", fc, two, bias_of[fc.theirs], "guess", "the second of two") | pair(
        "fc", gate, one, bias_of[gate.theirs], "guess", "the first of two"
    )
    options = (Option(f"{gate.theirs} is the gate", rules=straight), Option(f"{fc.theirs} is the gate", rules=other))
    return Choice(f"layout of {gate.theirs}", options, "which half of the MLP goes through the activation")
