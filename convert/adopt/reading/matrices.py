"""Which matrix of a block is which: every way to give them roles that sizes allow, scored by what their names say."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from convert.adopt.reading import words
from convert.adopt.reading.blocks import Item

ATTENTIONS = (("q", "k", "v", "o"), ("qkv", "o"), ("q", "kv", "o"))
MLPS = (("fc", "proj"), ("gate", "fc", "proj"), ("gate_fc", "proj"))
OF_ATTENTION = frozenset({"q", "k", "v", "qkv", "kv", "o"})
PIECES = {"qkv": 3, "kv": 2, "gate_fc": 2}
WRITES = frozenset({"o", "proj"})  # into the residual stream; the others read it
OURS = {
    "q": ("attn.q_proj",), "k": ("attn.k_proj",), "v": ("attn.v_proj",), "o": ("attn.c_proj",),
    "qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "kv": ("attn.k_proj", "attn.v_proj"), "fc": ("mlp.c_fc",),
    "gate": ("mlp.c_gate",), "gate_fc": ("mlp.c_gate", "mlp.c_fc"), "proj": ("mlp.c_proj",),
}  # fmt: skip
_LINE = ("qkv", "q", "k", "v", "kv", "o", "gate", "gate_fc", "fc", "proj")  # the order in which models name them
_UNEXPLAINED = -40.0
_DOUBT = 5.0  # how much less the names of another reading may say
NAMED = 7.0  # a score from which on a name alone says the role


@dataclass(frozen=True)
class Lay:
    """One way in which a matrix can lie for a role: ``size`` of the side that is not n_embd; ``turned``: [in, out]."""

    size: int
    axes: str
    turned: bool
    heads: int = 0
    head_dim: int = 0


@dataclass(frozen=True)
class Reading:
    """The likeliest roles: role -> matrix and how it lies. ``left``: matrices that no role explains."""

    roles: Mapping[str, tuple[Item, Lay]]
    left: tuple[Item, ...]
    score: float
    context: Mapping[str, str] = field(default_factory=dict)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return "gate" in self.roles or "gate_fc" in self.roles


def lays(item: Item, role: str, width: int) -> Iterator[Lay]:
    """The ways in which a tensor can be the matrix of a role in a model of n_embd ``width``."""
    shape, pieces, mine = item.used, PIECES.get(role, 1), "o" if role in WRITES else "i"
    if item.heads:
        if len(shape) == 2 and role in OF_ATTENTION:
            d = "(p d)" if pieces > 1 else "d"
            for at in (1, 0):
                if shape[at] == width and shape[1 - at] % pieces == 0:
                    yield Lay(
                        item.heads * shape[1 - at], f"{d} {mine}" if at else f"{mine} {d}", (at == 0) != (mine == "o"),
                        item.heads, shape[1 - at] // pieces,
                    )  # fmt: skip
        return
    if len(shape) == 2:
        other = "i" if mine == "o" else "(p o)" if pieces > 1 else "o"
        for at in (1, 0) if mine == "i" else (0, 1):
            if shape[at] == width and (role == "qkv" or shape[1 - at] % pieces == 0):
                axes = f"{other} {mine}" if at else f"{mine} {other}"
                yield Lay(shape[1 - at], "" if axes == "o i" else axes, (at == 0) != (mine == "o"))
        return
    if len(shape) in (3, 4):
        for at in [i for i, size in enumerate(shape) if size == width]:
            yield from _deep(shape, at, role, pieces, mine)


def _deep(shape: tuple[int, ...], at: int, role: str, pieces: int, mine: str) -> Iterator[Lay]:
    """Kernels with an axis for pieces or heads; ``at`` is the axis of n_embd."""
    rest = [i for i in range(len(shape)) if i != at]
    size = 1
    for i in rest:
        size *= shape[i]
    turned = (at == 0 or at != len(shape) - 1) if mine == "i" else at == len(shape) - 1

    def line(letters: Mapping[int, str]) -> str:
        return " ".join(mine if i == at else letters[i] for i in range(len(shape)))

    head = role in OF_ATTENTION
    if pieces == 1:
        if len(rest) == 2 and head:
            yield Lay(size, line(dict(zip(rest, "hd", strict=True))), turned, shape[rest[0]], shape[rest[1]])
        return
    if len(rest) == 2 and head and shape[rest[1]] % pieces == 0 and shape[rest[0]] != pieces:
        heads, wide = shape[rest[0]], shape[rest[1]] // pieces
        yield Lay(size, line({rest[0]: "h", rest[1]: "(p d)"}), turned, heads, wide)
    for p in [i for i in rest if shape[i] == pieces]:
        others = [i for i in rest if i != p]
        if len(others) == 1:
            yield Lay(size, line({p: "p", others[0]: "o"}), turned)
        elif head:
            letters = {p: "p"} | dict(zip(others, "hd", strict=True))
            yield Lay(size, line(letters), turned, shape[others[0]], shape[others[1]])


def contexts(items: tuple[Item, ...]) -> dict[str, str]:
    """theirs -> "attn", "mlp" or "": by its words, else by what is certain about the module around it."""
    made = {item.theirs: _context(item) for item in items}
    for item in items:
        if made[item.theirs]:
            continue
        path = item.module
        while path:
            near = {
                made[other.theirs] for other in items if other.module == path or other.module.startswith(f"{path}.")
            }
            near -= {""}
            if len(near) == 1:
                made[item.theirs] = near.pop()
            if near or made[item.theirs]:
                break
            path = path.rpartition(".")[0]
    return made


def _context(item: Item) -> str:
    if item.heads:
        return "attn"
    for part in reversed(item.inside.split(".")):
        said = set(words.words(part))
        attn = bool(said & words.ATTENTION) or _asked(part) or bool(said & words.QKV)
        mlp = bool(said & words.MLP) or bool(said & {"gate", "up", "down"})
        if attn != mlp:
            return "attn" if attn else "mlp"
        if attn and {"q", "k", "v"} <= said:
            return "attn"
    return ""


def _asked(part: str) -> bool:
    """Whether words name a query, key or value; v alone may be a GLU's."""
    said = set(words.words(part))
    return bool(said & (words.QUERY | words.KEY)) or bool(said & (words.VALUE - {"v"}))


def _flags(item: Item) -> frozenset[str]:
    """Which of q, k and v the words of a tensor name, the nearest to the tensor first."""
    for part in reversed(item.inside.split(".")):
        said = set(words.words(part))
        found = {
            letter
            for letter, names in (("q", words.QUERY), ("k", words.KEY), ("v", words.VALUE))
            if said & names
        }  # fmt: skip
        if said & words.QKV:
            found |= set("qkv")
        if "kv" in said:
            found |= set("kv")
        if found:
            return frozenset(found)
    return frozenset()


def _near(item: Item) -> set[str]:
    """The words of the module that holds the tensor, and of the tensor; numbers among them."""
    parts = item.inside.split(".")
    for count in range(1, len(parts) + 1):
        said = set(words.kind(".".join(parts[-count:]))[1])
        if any(not word.isdigit() for word in said):
            return said | {word for part in parts[-count - 1 :] for word in words.words(part) if word.isdigit()}
    return set(item.said)


def score(item: Item, role: str, context: str) -> float:
    """How well a name fits a role."""
    near, flags = _near(item), _flags(item)
    if context == "mlp":
        flags = frozenset()
    of_attention = role in OF_ATTENTION
    value = 0.0
    if context:
        value += 4.0 if (context == "attn") == of_attention else -9.0
    if role in ("q", "k", "v", "qkv", "kv"):
        value += 12.0 if flags == frozenset(role) else -12.0 if flags else 0.0
        if role == "qkv" and not flags:
            value += 5.0 if near & {"attn", "in", "fused", "qkv"} else 0.0
        return value - (3.0 if near & {"o", "out", "output", "merge", "unify"} and not flags else 0.0)
    if flags:
        value -= 12.0
    if role == "o":
        if near & {"o", "out", "output", "merge", "unify", "combine", "proj", "projection"}:
            value += 6.0
        return value - (4.0 if near & {"up", "down", "gate", "fc", "in"} and context != "attn" else 0.0)
    if near & {"up", "gate", "down", "in", "out"}:
        near -= {"proj", "projection", "fc", "linear", "output" if "in" in near else ""}
    if role == "gate":
        value += 9.0 if near & {"gate", "gating"} else -6.0 if near & {"up", "down"} else 0.0
        return value + (3.0 if near & {"1", "0", "first"} else 0.0)
    if role == "gate_fc":
        return value + (9.0 if {"gate", "up"} <= near else 2.0 if near & (words.UP | words.GATE) else 0.0)
    if role == "fc":
        value += 6.0 if near & words.UP else -6.0 if near & {"gate", "down", "out"} else 0.0
        return value + (2.0 if near & {"1", "0", "first"} else 0.0)
    value += 6.0 if near & words.DOWN and "fc" not in near else -6.0 if near & {"gate", "up", "in"} else 0.0
    return value + (2.0 if near & {"2", "second"} else 0.0)


def style(item: Item) -> str:
    """What its leaf is called decides with which other matrices a matrix shares its layout."""
    leaf = item.leaf if item.leaf in ("weight", "kernel", "w") else "raw"
    return leaf if len(item.shape) == 2 else f"{leaf}, {len(item.shape)} axes"


def _taste(item: Item, turned: bool) -> float:
    """How usual it is that matrices of a style lie so; three in one are mostly three of nn.Linear's."""
    kind = style(item).partition(",")[0]
    if kind == "weight" or (kind == "raw" and item.used[0] == 3):
        return -2.5 if turned else 0.0
    return 0.0 if turned else -0.5


def read(
    items: tuple[Item, ...],
    width: int,
    biases: Mapping[str, int] | None = None,
    force: Mapping[str, bool] | None = None,
) -> Reading | None:
    """The likeliest roles of a block's matrices; None where no roles fit their sizes.

    ``biases``: matrix -> size of its bias, which is that of its outputs. ``force``: style -> whether its
    matrices are [in, out]; default: what is likeliest.
    """
    context = contexts(items)
    scores = {
        (item.theirs, role): score(item, role, context[item.theirs]) for item in items for role in _LINE
    }  # fmt: skip
    best: Reading | None = None
    for attention in ATTENTIONS:
        for mlp in MLPS:
            roles = (*attention, *mlp)
            if len(roles) > len(items):
                continue
            least = best.score if best else float("-inf")
            found = _assign(items, roles, width, scores, least, biases or {}, force or {})
            if found is not None:
                left = tuple(item for item in items if all(item is not used for used, _ in found[0].values()))
                best = Reading(found[0], left, found[1], context)
    return best


def turned(
    reading: Reading, items: tuple[Item, ...], width: int, biases: Mapping[str, int]
) -> Iterator[tuple[str, Reading]]:
    """(style, reading) where the matrices of a style may as well lie the other way round, for all that names say."""
    ways = {style(item): lay.turned for item, lay in reading.roles.values() if len(item.used) == 2}
    for kind, way in ways.items():
        other = read(items, width, biases, {**ways, kind: not way})
        if other is None or other.left:
            continue
        named = [
            sum(score(item, role, each.context.get(item.theirs, "")) for role, (item, _) in each.roles.items())
            for each in (reading, other)
        ]
        if named[0] - named[1] < _DOUBT:
            yield kind, other


def _assign(
    items: tuple[Item, ...],
    roles: tuple[str, ...],
    width: int,
    scores: Mapping[tuple[str, str], float],
    least: float,
    biases: Mapping[str, int],
    force: Mapping[str, bool],
) -> tuple[dict[str, tuple[Item, Lay]], float] | None:
    """The best way to give each role a matrix, if it scores more than ``least``: branch and bound."""
    ways: dict[str, list[tuple[Item, Lay, float]]] = {role: [] for role in roles}
    for role, item in ((role, item) for role in roles for item in items):
        for lay in lays(item, role, width):
            outputs = width if role in WRITES else lay.size
            forced = len(item.used) == 2 and force.get(style(item), lay.turned) != lay.turned
            if not forced and biases.get(item.theirs, outputs) == outputs:
                ways[role].append((item, lay, scores[item.theirs, role] + _taste(item, lay.turned)))
    if not all(ways.values()):
        return None
    order = sorted(roles, key=lambda role: len(ways[role]))
    for role in order:
        ways[role].sort(key=lambda way: -way[2])
    ahead = [0.0] * (len(order) + 1)
    for i in reversed(range(len(order))):
        ahead[i] = ahead[i + 1] + ways[order[i]][0][2]
    penalty = _UNEXPLAINED * (len(items) - len(roles))
    best: tuple[dict[str, tuple[Item, Lay]], float] | None = None
    limit = least

    def visit(i: int, chosen: dict[str, tuple[Item, Lay]], turned: dict[str, bool], value: float) -> None:
        nonlocal best, limit
        if value + ahead[i] + penalty + 1.0 <= limit:
            return
        if i == len(order):
            total = value + penalty + _in_line(chosen)
            if total > limit and _fits(chosen):
                best, limit = (dict(chosen), total), total
            return
        role = order[i]
        used = {id(item) for item, _ in chosen.values()}
        for item, lay, worth in ways[role]:
            kind = style(item)
            if id(item) in used or (len(item.used) == 2 and turned.get(kind, lay.turned) != lay.turned):
                continue
            more = {kind: lay.turned} if len(item.used) == 2 else {}
            visit(i + 1, chosen | {role: (item, lay)}, turned | more, value + worth)

    visit(0, {}, {}, 0.0)
    return best


def _in_line(chosen: Mapping[str, tuple[Item, Lay]]) -> float:
    """Up to 1 for roles in the usual order of files."""
    line = [chosen[role][0].order for role in _LINE if role in chosen]
    pairs = [(a, b) for i, a in enumerate(line) for b in line[i + 1 :]]
    return sum(a < b for a, b in pairs) / len(pairs)


def _fits(chosen: Mapping[str, tuple[Item, Lay]]) -> bool:
    """Whether the sizes of the roles agree."""
    size = {role: lay.size for role, (_, lay) in chosen.items()}
    out = size["o"]
    if "qkv" in size and not (size["qkv"] > out and (size["qkv"] - out) % 2 == 0 and size["qkv"] <= 3 * out):
        return False
    if "q" in size and size["q"] != out:
        return False
    if "k" in size and not (size["k"] == size["v"] and out % size["k"] == 0):
        return False
    if "kv" in size and not (size["kv"] % 2 == 0 and out % (size["kv"] // 2) == 0):
        return False
    hidden = size["proj"]
    return (
        size.get("fc", hidden) == hidden == size.get("gate", hidden) and size.get("gate_fc", 2 * hidden) == 2 * hidden
    )
