"""What of many questions passes through a model at once, and where in it they ask what follows.

What contexts begin with is read once, then the contexts in batches of similar length, each with its longest
continuation behind it; its other continuations go on from what the context left in the cache.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import rotary

ROWS = 64  # at once
TOKENS = 8192  # that pass through the model at once, padding included
ENOUGH = 1024  # tokens for a pass: rows below 3/4 of its longest then wait for the next, for less padding
KEPT = 1 << 28  # bytes of keys and values of a batch, counted in float32
WORTH = 64  # tokens that must be saved before a beginning is read for itself


class Group(NamedTuple):
    """A context and what may follow it, in ids; either has one token at least, and all but the last fit together."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Read(NamedTuple):
    """Rows that pass through the model at once, and the N tokens that are asked for.

    Rows may go on from those of another read; ``lengths`` are those of the whole sequences. An owner is the number of
    a continuation among all of all groups.
    """

    tokens: np.ndarray  # (B, T) int32, padded with 0 on the right
    starts: np.ndarray  # (B,) tokens before, of the row's source
    sources: np.ndarray  # (B,) rows of the other read
    lengths: np.ndarray  # (B,)
    places: np.ndarray  # (N,) whose output says it: row T + column
    targets: np.ndarray  # (N,) ids
    owners: np.ndarray  # (N,)


class Batch(NamedTuple):
    """What goes on from ``prefix`` (() for nothing), and what goes on from that."""

    prefix: tuple[int, ...]
    first: Read
    others: list[Read]


class _Row(NamedTuple):
    tokens: Sequence[int]
    start: int
    source: int
    asked: list[tuple[int, Sequence[int], int]]  # first column, ids, owner


def beginning(prefix: Sequence[int]) -> Read:
    """The read of a prefix, which asks for nothing."""
    return _read([_Row(prefix, 0, 0, [])])


def batches(groups: Sequence[Group], config: ModelConfig, rows: int = ROWS) -> Iterator[Batch]:
    """Everything that groups ask for, once; batches with one prefix follow each other.

    Where rotary frequencies depend on a sequence's length, one longer than the original context is read alone.
    """
    owners = np.cumsum([0, *(len(group.continuations) for group in groups)]).tolist()
    shared: list[tuple[Group, list[int]]] = []
    alone: list[tuple[Group, list[int]]] = []
    for group, first in zip(groups, owners, strict=False):
        numbers = list(range(first, first + len(group.continuations)))
        longest = len(group.context) + max(map(len, group.continuations), default=0) - 1
        if rotary.by_length(config) and longest > config.rope_original:
            pairs = zip(group.continuations, numbers, strict=True)
            alone += [(Group(group.context, [each]), [number]) for each, number in pairs]
        elif numbers:
            shared.append((group, numbers))
    kept = max(1, KEPT // (8 * config.n_layer * config.n_kv_head * config.head_dim))
    for size, members in clusters([tuple(group.context) for group, _ in shared]):
        yield from _batches([shared[n] for n in members], size, config, rows, kept)
    yield from _batches(alone, 0, config, rows, kept)


def clusters(contexts: Sequence[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """(tokens, contexts by number) that are read together: they begin with so many tokens in common, and go on."""
    if not contexts:
        return []
    order = sorted(range(len(contexts)), key=lambda n: contexts[n])
    found: list[tuple[int, list[int]]] = []
    # depth, and the contexts that begin alike so far and have no cluster yet: the path to the current one in their trie
    path: list[tuple[int, list[int]]] = [(0, [])]

    def close(above: int) -> list[int]:
        """Takes the last of the path off, as a cluster where that saves enough; else what is left to ``above``."""
        depth, members = path.pop()
        own = min(depth, min((len(contexts[n]) for n in members), default=0) - 1)
        if (len(members) - 1) * own - len(members) * above > WORTH:
            found.append((own, members))
            return []
        return members

    for place, number in enumerate(order):
        following = order[place + 1 : place + 2]
        common = _alike(contexts[number], contexts[following[0]]) if following else 0
        if common > path[-1][0]:
            path.append((common, []))
        path[-1][1].append(number)
        while path[-1][0] > common:
            above = max(common, path[-2][0])
            left = close(above)
            if path[-1][0] < above:
                path.append((above, []))
            path[-1][1].extend(left)
    return [*found, (0, path[0][1])] if path[0][1] else found


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _batches(
    groups: Sequence[tuple[Group, list[int]]], size: int, config: ModelConfig, rows: int, kept: int
) -> Iterator[Batch]:
    """Batches of groups that begin with ``size`` tokens in common."""
    made = []
    for group, numbers in groups:
        longest = max(range(len(numbers)), key=lambda n: len(group.continuations[n]))
        asked = [
            (len(group.context) - 1 - size, each[:1], n) for each, n in zip(group.continuations, numbers, strict=True)
        ]
        asked[longest] = (asked[longest][0], group.continuations[longest], numbers[longest])
        tokens = [*group.context[size:], *group.continuations[longest][:-1]]
        made.append((_Row(tokens, size, 0, asked), group, numbers, longest))
    made.sort(key=lambda each: len(each[0].tokens), reverse=True)
    for part in _parts([each[0] for each in made], config, rows, kept):
        chosen = [made[n] for n in part]
        others = [
            _Row(each[:-1], len(group.context), source, [(0, each[1:], number)])
            for source, (_, group, numbers, longest) in enumerate(chosen)
            for n, (each, number) in enumerate(zip(group.continuations, numbers, strict=True))
            if n != longest and len(each) > 1
        ]
        others.sort(key=lambda row: len(row.tokens), reverse=True)
        reads = [_read([others[n] for n in few]) for few in _parts(others, config, rows, kept)]
        prefix = tuple(chosen[0][1].context[:size])
        yield Batch(prefix, _read([row for row, *_ in chosen]), reads)


def _parts(rows: Sequence[_Row], config: ModelConfig, most: int, kept: int) -> Iterator[list[int]]:
    """Numbers of rows, longest first, that are read at once; no place of their cache lies beyond the context."""
    part: list[int] = []
    start = 0
    for number, row in enumerate(rows):
        width, reach = len(rows[part[0]].tokens) if part else 0, max(start, row.start)
        count = len(part) + 1
        if part and (
            count > most
            or count * width > TOKENS
            or (len(part) * width >= ENOUGH and len(row.tokens) < 0.75 * width)
            or count * (reach + width) > kept
            or reach + width > config.block_size
        ):
            yield part
            part, reach = [], row.start
        part.append(number)
        start = reach
    if part:
        yield part


def _read(rows: Sequence[_Row]) -> Read:
    width = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), width), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row.tokens)] = row.tokens
    asked = [(n * width + column, ids, owner) for n, row in enumerate(rows) for column, ids, owner in row.asked]
    return Read(
        tokens,
        _ints(row.start for row in rows),
        _ints(row.source for row in rows),
        _ints(row.start + len(row.tokens) for row in rows),
        _ints(place + n for place, ids, _ in asked for n in range(len(ids))),
        _ints(token for _, ids, _ in asked for token in ids),
        _ints(owner for _, ids, owner in asked for _ in ids),
    )


def _ints(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int32)
