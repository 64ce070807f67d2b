"""Which number in a name is the block and which the head; tensors that hold all blocks along their first axis."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from convert.adopt.reading import words
from mlxgpt.common.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
_NUMBER = re.compile(r"\d+")
_NO_BLOCKS = frozenset(
    {"head", "heads", "expert", "experts", "linears", "net", "mlp", "ff", "ffn", "ffwd", "fc", "w", "lin"}
)
_NO_BLOCKS |= {"linear", "ln", "norm", "dense"}
_HEADS = frozenset({"head", "heads"})
_LIKE = 0.7  # share of tensors that two blocks have in common, at least


@dataclass(frozen=True)
class Item:
    """A tensor of every block, or one outside of them: how it is named, and the shape of one block's and one head's."""

    theirs: str  # {n} the block, {h} the head
    example: str  # the name in the first block, of the first head
    inside: str  # the name without what leads to the block
    shape: tuple[int, ...]
    kind: str  # weight or bias
    said: tuple[str, ...]  # words of ``inside``, without the one for the kind
    order: int  # in the file
    heads: int = 0  # tensors of a block, one a head
    stacked: bool = False  # the first axis is the block's, and not in ``shape``

    @property
    def used(self) -> tuple[int, ...]:
        """The shape without axes of one."""
        return self.shape if self.heads else bare(self.shape)

    @property
    def leaf(self) -> str:
        """What the tensor is called within its module."""
        return self.inside.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The path of its module within the block."""
        return self.inside.rpartition(".")[0]


@dataclass(frozen=True)
class Structure:
    """``block``: what each of ``n_layer`` blocks has; ``top``: everything else."""

    n_layer: int
    block: tuple[Item, ...]
    top: tuple[Item, ...]


@dataclass(frozen=True)
class _Run:
    """Numbers base, base + 1 ... of ``count`` blocks; with ``stride`` 2, block n has two of them."""

    base: int
    stride: int
    count: int


def bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without axes of one, where it has other axes."""
    if len(shape) < 2 or (kept := tuple(size for size in shape if size != 1)) == shape:
        return shape
    return kept or (1,)


def structure(shapes: Shapes) -> Structure:
    """The blocks of a model, from names and shapes.

    Raises:
        UserError: a block is missing, or has tensors or shapes that others have not.
    """
    lists = _lists(shapes)
    runs = {prefix: run for prefix, members in lists.items() if (run := _run(members))}
    chosen = _best(shapes, lists, runs)
    if chosen is None:
        return _stacked(shapes) or _single(shapes)
    count = next(iter(chosen.values())).count
    chosen = _joined(shapes, lists, chosen, count)
    found: dict[str, dict[int, str]] = {}
    top: list[str] = []
    for name in shapes:
        place = _place(name, chosen)
        if place is None:
            top.append(name)
        else:
            pattern, n = place
            found.setdefault(pattern, {})[n] = name
    _check_blocks(shapes, lists, chosen, count, found)
    order = {name: i for i, name in enumerate(shapes)}
    several = len({pattern.partition("{")[0] for pattern in found}) > 1
    rows = [
        (pattern, _within(pattern, several), names[0], shapes[names[0]])
        for pattern, names in found.items()
        if 0 in names
    ]
    block = _with_heads(rows, order)
    return Structure(count, block, tuple(_item(name, name, name, shapes[name], order[name]) for name in top))


def _lists(shapes: Shapes) -> dict[str, dict[int, dict[str, tuple[int, ...]]]]:
    """What stands before a number -> number -> what stands behind it -> shape."""
    found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        for number in _NUMBER.finditer(name):
            members = found.setdefault(name[: number.start()], {})
            members.setdefault(int(number.group()), {})[name[number.end() :]] = shape
    return found


def _alike(one: Shapes, other: Shapes) -> bool:
    same = sum(other.get(name) == shape for name, shape in one.items())
    return same >= _LIKE * max(len(one), len(other)) and same > 0


def _run(members: Mapping[int, Shapes]) -> _Run | None:
    """The longest run of numbers with the same tensors, or of pairs of numbers."""
    best: _Run | None = None
    for base in sorted(members):
        count = 1
        while base + count in members and _alike(members[base], members[base + count]):
            count += 1
        if best is None or count > best.count:
            best = _Run(base, 1, count)
    assert best is not None
    base = min(members)
    if best.count == 1 and base + 1 in members:
        pairs = 1
        while all(
            base + 2 * pairs + i in members and _alike(members[base + i], members[base + 2 * pairs + i]) for i in (0, 1)
        ):
            pairs += 1
        if pairs > 1:
            return _Run(base, 2, pairs)
    return best


def _matrices(shapes: Shapes) -> int:
    return sum(len(bare(shape)) > 1 for shape in shapes.values())


def _best(
    shapes: Shapes, lists: Mapping[str, Mapping[int, Shapes]], runs: Mapping[str, _Run]
) -> dict[str, _Run] | None:
    """What stands before the numbers of blocks, with these: of one run, and covering most tensors together."""
    groups: dict[_Run, dict[str, _Run]] = {}
    for prefix, run in runs.items():
        said = words.words(prefix)
        if not said or said[-1] not in _NO_BLOCKS or prefix.endswith(("layer", "block")):
            groups.setdefault(run, {})[prefix] = run
    best: tuple[float, dict[str, _Run]] | None = None
    for run, prefixes in groups.items():
        covered = {name for name in shapes if _place(name, prefixes) is not None}
        outside = [name for name in shapes if len(bare(shapes[name])) > 1 and name not in covered]
        matrices = _matrices({name: shapes[name] for name in covered})
        if matrices < 2 * run.count or (run.count == 1 and (not outside or matrices < max(3, len(outside)))):
            continue
        value = len(covered) * (1.0 if run.count > 1 else 0.5)
        if best is None or value > best[0]:
            best = value, prefixes
    if best is None:
        return None
    joined = _joined(shapes, lists, best[1], next(iter(best[1].values())).count)
    inside = {name for name in shapes if _place(name, joined) is not None}
    rest = [name for name in shapes if len(bare(shapes[name])) > 1 and name not in inside]
    return best[1] if _matrices({name: shapes[name] for name in inside}) >= max(3, len(rest)) else None


def _joined(
    shapes: Shapes, lists: Mapping[str, Mapping[int, Shapes]], chosen: Mapping[str, _Run], count: int
) -> dict[str, _Run]:
    """Further lists of as many members as there are blocks, or of two, three or four a block (and a last one)."""
    made = dict(chosen)
    free = {name for name in shapes if _place(name, made) is None}
    for prefix, members in lists.items():
        base = min(members)
        run = sorted(members) == list(range(base, base + len(members)))
        stride, rest = divmod(len(members), count)
        said = words.words(prefix)
        if not run or count < 2 or not 1 <= stride <= 4 or rest > (stride > 1) or prefix in made:
            continue
        if any(f"{prefix}{base}{behind}" not in free for behind in members[base]) or set(said[-1:]) & words.EMBED:
            continue
        turns = [[members[base + stride * n + i] for n in range(count)] for i in range(stride)]
        if all(_alike(turn[0], each) for turn in turns for each in turn):
            made[prefix] = _Run(base, stride, count)
    return made


def _place(name: str, prefixes: Mapping[str, _Run]) -> tuple[str, int] | None:
    """(pattern, block) of a name, by its first number that counts blocks."""
    for number in _NUMBER.finditer(name):
        run = prefixes.get(name[: number.start()])
        if run is not None:
            n, rest = divmod(int(number.group()) - run.base, run.stride)
            if not 0 <= n < run.count:
                return None
            more = run.base + rest
            letter = f"{run.stride if run.stride > 1 else ''}n{f'+{more}' if more else ''}"
            return f"{name[: number.start()]}{{{letter}}}{name[number.end() :]}", n
    return None


def _check_blocks(
    shapes: Shapes, lists: Mapping[str, Mapping[int, Shapes]], chosen: Mapping[str, _Run], count: int,
    found: Mapping[str, Mapping[int, str]],
) -> None:  # fmt: skip
    """Refuses blocks that are missing or differ.

    Raises:
        UserError: names the block and the tensor.
    """
    for prefix, run in chosen.items():
        members = lists[prefix]
        if run.stride > 1:
            continue
        like = [i for i in sorted(members) if _alike(members[run.base], members[i])]
        listed = prefix.endswith(".") and 0 not in members
        missing = [i for i in range(0 if listed else like[0], like[-1]) if i not in like]
        if missing:
            there = [f"{prefix}{i}" for i in like]
            shown = ", ".join(there if len(there) < 4 else [*there[:2], "...", there[-1]])
            raise UserError(f"{prefix}{missing[0]} is missing: found {shown}")
    for pattern, names in found.items():
        missing = [n for n in range(count) if n not in names]
        if missing and len(shapes[next(iter(names.values()))]) > 1:
            raise UserError(
                f"{pattern}: block {missing[0]} has none, others have: blocks that differ are not one decoder"
            )
        sizes = {shapes[name] for name in names.values()}
        if len(sizes) > 1:
            shown = " and ".join(str(list(size)) for size in sorted(sizes)[:2])
            raise UserError(f"{pattern}: {shown} in different blocks: blocks that differ are not one decoder")


def _with_heads(found: list[tuple[str, str, str, tuple[int, ...]]], order: Mapping[str, int]) -> tuple[Item, ...]:
    """The tensors of a block, (pattern, name within it, name, shape); those that are there once a head as one."""
    heads = _head_lists({within: shape for _, within, _, shape in found})
    items: dict[str, Item] = {}
    for pattern, within, name, shape in found:
        count, theirs = 0, pattern
        for number in _NUMBER.finditer(within):
            count = heads.get(within[: number.start()], 0)
            if count:
                behind = within[number.end() :]
                start = len(pattern) - len(behind) - len(number.group())
                theirs = f"{pattern[:start]}{{h}}{behind}"
                within = f"{within[: number.start()]}{{h}}{behind}"
                break
        items.setdefault(theirs, _item(theirs, name, within, shape, order[name], count))
    return tuple(items.values())


def _within(pattern: str, several: bool) -> str:
    """The name within the block; with ``several`` lists of blocks, what the list is called belongs to it."""
    before, _, behind = pattern.partition("}")
    before, _, letter = before.partition("{")
    stride, _, more = letter.partition("n")
    turn = f"{int(more or 0) % int(stride)}." if stride else ""
    called = before.rstrip("._").rpartition(".")[2]
    behind = behind.lstrip("._")
    return turn + (f"{called}.{behind}".rstrip(".") if several or not behind else behind)


def _head_lists(inside: Shapes) -> dict[str, int]:
    """Prefixes within a block whose numbers count heads -> their number."""
    made: dict[str, int] = {}
    for prefix, members in _lists(inside).items():
        said = words.words(prefix)
        named = bool(said) and said[-1] in _HEADS
        tail = {word for behind in members[min(members)] for word in words.words(prefix + behind)}
        small = all(len(shape) < 2 or min(shape) < max(shape) for shape in members[min(members)].values())
        role = bool(tail & (words.QUERY | words.KEY | words.VALUE | words.QKV)) and len(members) > 1 and small
        numbers = list(range(len(members)))
        if (named or role) and sorted(members) == numbers and all(members[0] == members[i] for i in numbers):
            made.setdefault(prefix, len(members))
    return made


def _item(
    theirs: str, example: str, inside: str, shape: tuple[int, ...], order: int, heads: int = 0, stacked: bool = False
) -> Item:
    what, said = words.kind(inside.replace("{h}", ""))
    return Item(theirs, example, inside, shape, what, said, order, heads, stacked)


def _stacked(shapes: Shapes) -> Structure | None:
    """Tensors that hold all blocks along their first axis; None where these are not most of the model."""
    deep = [shape for shape in shapes.values() if len(shape) >= 3]
    if len(deep) < 3:
        return None
    count, times = Counter(shape[0] for shape in deep).most_common(1)[0]
    width = Counter(size for shape in deep if shape[0] == count for size in shape[1:]).most_common(1)[0][0]
    flat = [shape for shape in shapes.values() if len(shape) == 2 and width in shape and shape[0] != count]
    if times < 3 or len(flat) > 4:  # an embedding, positions, a head: and no MLP of one block
        return None
    block, top = [], []
    for order, (name, shape) in enumerate(shapes.items()):
        held = len(shape) >= 2 and shape[0] == count and not (len(shape) == 2 and _is_table(name))
        if held:
            block.append(_item(name, name, name, shape[1:], order, stacked=True))
        else:
            top.append(_item(name, name, name, shape, order))
    return Structure(count, tuple(block), tuple(top))


def _is_table(name: str) -> bool:
    said = set(words.words(name))
    return bool(said & (words.EMBED | words.POSITION)) and not said & words.NORM


def _single(shapes: Shapes) -> Structure:
    """One block whose tensors bear no number: what names and shapes put outside is sorted out by ``tables``."""
    order = {name: i for i, name in enumerate(shapes)}
    items = _with_heads([(name, name, name, shape) for name, shape in shapes.items()], order)
    return Structure(1, (), items)
