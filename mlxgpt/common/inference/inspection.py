"""What is inside a model on given tokens, in numbers that both frameworks agree on; the verb ``inspect`` shows it.

Sizes in the comments: T tokens, L layers, H query heads, V vocabulary, N candidates that are kept, U different tokens.
Sums and logarithms are taken here, in float64, of float32 arrays from the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import RunError, UserError

WEIGHTS = 6_000_000
"""Attention weights that an inspection holds: a byte each on the page (8 MB of it), about ten in JSON."""
_LOGITS = 1 << 22  # logits on the host at once: 32 MiB in float64
_ROWS = 8192  # rows of the embedding at once


class Inside(Protocol):
    """One pass of a model over ids; mlxgpt.probe and torch_ref.probe have it."""

    def stream(self, place: int) -> np.ndarray:
        """The residual stream (T, C) before block ``place``; n_layer: after the last."""
        ...

    def branch(self, layer: int, part: str) -> np.ndarray:
        """What ``attn`` or ``mlp`` of a block gives, (T, C), before a norm or multiplier that follows it."""
        ...

    def attention(self, layer: int) -> np.ndarray:
        """Where the tokens look in a layer, (H, T, T)."""
        ...

    def lens(self, place: int, start: int, stop: int) -> np.ndarray:
        """Logits (t, V) that the last norm and the head make of the stream at tokens start to stop."""
        ...

    def embeddings(self, start: int, stop: int) -> np.ndarray:
        """Rows of the embedding, (n, C)."""
        ...


@dataclass(frozen=True)
class Candidates:
    """Ids and what each of them has, the largest first; equal values by id."""

    ids: np.ndarray  # int
    values: np.ndarray  # float64


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` shows. Losses are nats; ``given``: tokens at the start that nothing predicts, at least 1."""

    ids: np.ndarray  # (T,)
    given: int
    losses: np.ndarray  # (T,), of each token after those before it; NaN for the given ones
    ranks: np.ndarray  # (T,), 1: the token was the likeliest; 0 for the given ones
    entropies: np.ndarray  # (T,), nats, of the distribution of the token that follows
    following: Candidates  # (T, N), the likeliest that follow, with their probabilities
    lens: Candidates  # (L + 1, T), the likeliest that follows, read before each block and after the last
    lens_targets: np.ndarray  # (L + 1, T - 1), probability of the token that does follow
    stream: np.ndarray  # (L + 1, T), L2 norms of the residual stream before each block and after the last
    branches: dict[str, np.ndarray]  # attn, mlp: (L, T), L2 norms of what each gives
    neighbors: dict[int, Candidates]  # of each id (N,), with cosines
    attention: dict[int, np.ndarray]  # layer -> (H, T, T)

    @property
    def loss(self) -> float | None:
        """The mean over the tokens that are not given; None without any."""
        scored = self.losses[self.given :]
        return float(scored.mean()) if len(scored) else None


def check(config: ModelConfig, ids: Sequence[int], where: str) -> None:
    """Refuses ids that the model does not have, and none at all."""
    if not len(ids):
        raise UserError(f"{where}: no tokens: expected text")
    wrong = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if wrong is not None:
        raise UserError(f"{where}: token id {wrong}: expected 0 to {config.vocab_size - 1}, the model's vocabulary")


def layers_of(config: ModelConfig, tokens: int, asked: str | None) -> list[int]:
    """The layers whose attention is kept: those of ``asked``, such as 0,3-5 or none; else as many as WEIGHTS allows.

    Where not all fit, they are spread evenly, the first and the last among them.

    Raises:
        UserError: another text, a layer that is not there, or more weights than WEIGHTS.
    """
    each = config.n_head * tokens * (tokens + 1) // 2
    most = WEIGHTS // each
    if asked is None:
        count = min(config.n_layer, most)
        return sorted({round(n) for n in np.linspace(0, config.n_layer - 1, count)}) if count else []
    chosen = _numbers(asked, config.n_layer)
    if len(chosen) > most:
        raise UserError(
            f"--layers {asked}: {len(chosen)} layers of {config.n_head} heads and {tokens} tokens are "
            f"{len(chosen) * each:,} attention weights: expected at most {WEIGHTS:,}, so "
            + (f"{most} layers, or fewer tokens with --limit" if most else "fewer tokens with --limit, or none")
        )
    return chosen


def _numbers(text: str, count: int) -> list[int]:
    """``0,3-5`` as 0, 3, 4, 5; ``none`` as nothing."""
    made: set[int] = set()
    for part in [] if text == "none" else text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < count):
            raise UserError(f"--layers {text}: {part!r}: expected layers from 0 to {count - 1} such as 0,2-3, or none")
        made |= set(range(int(first), int(last) + 1))
    return sorted(made)


def inspect(
    inside: Inside, config: ModelConfig, ids: np.ndarray, given: int, top: int, layers: Sequence[int], known: int
) -> Inspection:
    """Reads one pass.

    Args:
        inside: the pass over ``ids``.
        config: the model's.
        ids: (T,), checked.
        given: tokens at the start whose loss does not count, at least 1.
        top: candidates that are kept.
        layers: whose attention is kept.
        known: ids below it have a token; others are nobody's neighbor.

    Raises:
        RunError: a number that is not finite.
    """
    depth, size = config.n_layer, len(ids)
    losses, ranks, entropies = np.full(size, np.nan), np.zeros(size, int), np.zeros(size)
    following = Candidates(*_empty(size, min(top, config.vocab_size)))
    lens, targets = Candidates(*_empty(depth + 1, size)), np.zeros((depth + 1, size - 1))
    for place in range(depth + 1):
        for start, stop in _pieces(size, max(1, _LOGITS // config.vocab_size)):
            here = slice(start, stop)
            logits = _finite(inside.lens(place, start, stop), f"logits of {_name(place)}, tokens {start} to {stop - 1}")
            logits -= logits.max(axis=-1, keepdims=True)
            sums = np.log(np.exp(logits).sum(axis=-1))
            lens.ids[place, here], lens.values[place, here] = logits.argmax(axis=-1), np.exp(-sums)
            ends = ids[start + 1 : stop + 1]
            found = logits[np.arange(len(ends)), ends] - sums[: len(ends)]
            targets[place, start : start + len(ends)] = np.exp(found)
            if place == depth:
                logs = logits - sums[:, None]
                shares = np.exp(logs)
                losses[start + 1 : stop + 1] = -found
                ranks[start + 1 : stop + 1] = 1 + (logs[: len(ends)] > found[:, None]).sum(axis=-1)
                entropies[here] = -(shares * logs).sum(axis=-1)
                best = _largest(shares, following.ids.shape[-1])
                following.ids[here], following.values[here] = best.ids, best.values
    losses[:given], ranks[:given] = np.nan, 0
    return Inspection(
        ids=ids, given=given, losses=losses, ranks=ranks, entropies=entropies, lens_targets=targets,
        following=following, lens=lens,
        stream=np.stack([_norms(inside.stream(place), _name(place)) for place in range(depth + 1)]),
        branches={
            part: np.stack([_norms(inside.branch(n, part), f"{part} of layer {n}") for n in range(depth)])
            for part in ("attn", "mlp")
        },
        neighbors=_neighbors(inside.embeddings, ids, top, min(known, config.vocab_size)),
        attention={layer: inside.attention(layer) for layer in layers},
    )  # fmt: skip


def _empty(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(shape, int), np.zeros(shape)


def _name(place: int) -> str:
    return f"layer {place - 1}" if place else "the embedding"


def _pieces(size: int, most: int) -> list[tuple[int, int]]:
    return [(start, min(size, start + most)) for start in range(0, size, most)]


def _norms(array: np.ndarray, where: str) -> np.ndarray:
    return np.sqrt(np.square(_finite(array, f"activations of {where}")).sum(axis=-1))


def _finite(array: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise RunError(f"{where}: not finite; expected weights that compute finite numbers")
    return array.astype(np.float64)


def _largest(values: np.ndarray, count: int) -> Candidates:
    """The ``count`` largest along the last axis."""
    some = np.argpartition(values, -count, axis=-1)[..., -count:]
    order = np.lexsort((some, -np.take_along_axis(values, some, -1)), axis=-1)
    some = np.take_along_axis(some, order, -1)
    return Candidates(some, np.take_along_axis(values, some, -1))


def _neighbors(rows: Callable[[int, int], np.ndarray], ids: np.ndarray, top: int, known: int) -> dict[int, Candidates]:
    """The ids below ``known`` whose embeddings point most nearly where those of ``ids`` do, but for themselves."""
    different = np.unique(ids)
    own = np.concatenate([_directions(rows(i, i + 1)) for i in different.tolist()])  # (U, C)
    count = min(top, max(0, known - 1))
    best = Candidates(np.zeros((len(different), 0), int), np.zeros((len(different), 0)))
    for start, stop in _pieces(known, _ROWS):
        cosines = own @ _directions(rows(start, stop)).T
        here = (different >= start) & (different < stop)
        cosines[here, different[here] - start] = -np.inf
        found = _largest(cosines, min(count + 1, stop - start))  # itself may be among them
        both = np.concatenate([best.values, found.values], axis=1)
        numbers = np.concatenate([best.ids, found.ids + start], axis=1)
        order = np.lexsort((numbers, -both), axis=-1)[:, : count + 1]
        best = Candidates(np.take_along_axis(numbers, order, 1), np.take_along_axis(both, order, 1))
    return {i: Candidates(best.ids[n, :count], best.values[n, :count]) for n, i in enumerate(different.tolist())}


def _directions(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; of 0 where a row is 0."""
    rows = _finite(rows, "rows of the embedding")
    lengths = np.sqrt(np.square(rows).sum(axis=-1, keepdims=True))
    return rows / np.where(lengths > 0, lengths, 1)


def as_json(found: Inspection, spell: Callable[[int], str]) -> dict[str, Any]:
    """Tokens one by one with all that belongs to one; neighbors by id; attention by layer, head and token."""

    def listed(ids: np.ndarray, values: np.ndarray, name: str) -> list[dict[str, Any]]:
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [{"id": i, "token": spell(i), name: value} for i, value in pairs]

    scored = [False] * found.given + [True] * (len(found.ids) - found.given)
    positions = [
        {
            "id": i,
            "token": spell(i),
            "loss": float(found.losses[t]) if scored[t] else None,
            "rank": int(found.ranks[t]) if scored[t] else None,
            "entropy": float(found.entropies[t]),
            "next": listed(found.following.ids[t], found.following.values[t], "probability"),
            "lens": listed(found.lens.ids[:, t], found.lens.values[:, t], "probability"),
            "lens_target": found.lens_targets[:, t].tolist() if t + 1 < len(found.ids) else None,
            "norms": {"stream": found.stream[:, t].tolist()}
            | {part: norms[:, t].tolist() for part, norms in found.branches.items()},
        }
        for t, i in enumerate(found.ids.tolist())
    ]
    return {
        "loss": found.loss,
        "positions": positions,
        "neighbors": {str(i): listed(each.ids, each.values, "cosine") for i, each in found.neighbors.items()},
        "attention": {
            str(layer): [[_short(row[: t + 1]) for t, row in enumerate(head)] for head in heads]
            for layer, heads in found.attention.items()
        },
    }


def _short(row: np.ndarray) -> list[float]:
    """Attention weights with seven digits after the point, a third of what float32 would spell."""
    return [round(value, 7) for value in row.astype(np.float64).tolist()]
