"""The choices that no weight says, found by evidence: candidates are run until one gives the sample's numbers.

The order makes it short. A token that sees itself alone has an attention weight of 1, so the logits of position 0
depend on neither heads, rope, attention's scale nor on q and k: norms, activation, placement and the layout of v are
found there first, then attention on all tokens. Hidden states, where given, let embeddings and one block come before.
At each of these views all combinations of the options that show there are tried, likeliest first, up to a limit; then
the best few are changed one choice at a time. Small differences (an eps, erf or tanh) come last, in that way.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from convert.adopt.candidate import NONE, Bench, Candidate, Forward, Gather, Limit, Score, View, distance
from convert.adopt.evidence import Sample
from convert.adopt.rules import Map, Proposal
from convert.adopt.verdicts import Verdict, judge
from mlxgpt.common.config import ModelConfig

GATE = 1e-5  # of the largest logit
_COMBINATIONS = 2500  # of coarse options at one view
_FINE = 0.02  # a choice whose options move the numbers by less waits until the others are found
_BEST = 6  # candidates that are improved one choice at a time
_SHOWS = 1e-7  # a smaller change is no change
_SAME = 1e-12
FIRST = "the first token"


@dataclass
class Found:
    """What the search says. ``error`` is of the largest logit, ``gate`` what it must be below, ``floor`` rounding's."""

    map: Map
    config: ModelConfig
    fits: bool
    error: float
    gate: float
    floor: float
    values: tuple[str, ...]  # the option that is taken, of each choice
    verdicts: list[Verdict]
    candidates: int
    runs: int
    seconds: float
    departs: str = ""  # where no candidate fits: the first place where the best one is off
    notes: tuple[str, ...] = ()


def views(sample: Sample) -> list[View]:
    """What candidates are compared at, in order; the last is what decides."""
    found: list[View] = []
    several = sample.ids.shape[1] > 1
    if sample.hidden:
        found.append(View("the embeddings", 0, 1))
        found += [View("block 0 at the first token", 1, 1, 1)] if several else []
        found.append(View("block 0", 1, 1))
    if several and not sample.last:
        found.append(View(FIRST, tokens=1))
    return [*found, View("all tokens")]


def search(
    proposal: Proposal,
    gather: Gather,
    sample: Sample,
    forward: Forward,
    given: Sequence[str] = (),
    tolerance: float | None = None,
    limit: Limit | None = None,
) -> Found:
    """The options with which a decoder gives the sample's logits, and how sure each is.

    Args:
        proposal: the map, and its choices with their options.
        gather: a map -> weights by our names.
        sample: ids, logits, and hidden states if there are any.
        forward: runs a decoder, see mlxgpt/trial.py.
        given: names of choices that the user made: kept, and said to be given.
        tolerance: what logits may be off, of the largest; default: 1e-5, or what the sample's dtype allows.
        limit: of runs and seconds.
    """
    bench = Bench(proposal, gather, sample, forward, limit or Limit())
    gate, notes = tolerance or max(GATE, 8 * sample.step if sample.step > 1e-6 else 0.0), list[str]()
    best, settled, failed = (0,) * len(proposal.choices), set[int](), list[View]()
    for view in views(sample):
        if view.place >= 0 and failed:  # what comes later than a place that differs differs, too
            continue
        allowed = gate if view.place < 0 else 4 * gate
        best, score = fit(bench, best, view, settled, allowed)
        if score.worst <= allowed:
            settled |= shown(bench, best, view, score, allowed)
        else:
            failed.append(view)
            if view.name == FIRST:  # its logits are among those of all tokens
                break
    view = views(sample)[-1]
    if view in failed and settled and not bench.over:  # a view that fits by chance must not decide
        best, score = fit(bench, best, view, set(), gate)
    best = polish(bench, best, view)
    score, floor = bench.score(best, view), rounding(bench, best, view)
    allowed = gate if tolerance else max(gate, 4 * floor.worst)
    fits = score.worst <= allowed
    if fits and allowed > gate >= score.worst:
        allowed = gate
    verdicts, best = judge(bench, best, view, floor, given) if fits else ([], best)
    made = bench.made(best)
    assert made, "the best candidate is one that ran"
    departs = "" if fits else departure(bench, best, failed, gate)
    if fits and sample.hidden and any(one.place >= 0 for one in failed):
        notes.append("the logits agree, but the hidden states are not those that enter and leave the blocks here")
    if bench.over:
        notes.append(f"stopped at the limit of {bench.limit.runs} runs or {bench.limit.seconds:g} s")
    score = bench.score(best, view)
    return Found(
        bench.map(best), made[0], fits, score.worst, allowed, floor.worst, bench.labels(best), verdicts,
        bench.candidates, bench.runs, bench.seconds, departs, tuple(notes),
    )  # fmt: skip


def rounding(bench: Bench, best: Candidate, view: View) -> Score:
    """How far the numbers move when each weight moves by half a unit of float32: what no comparison can tell."""
    plain, moved = bench.output(best, view), bench.output(best, view, noise=2.0**-24)
    return NONE if plain is None or moved is None else distance(moved, plain)


def fit(bench: Bench, start: Candidate, view: View, settled: set[int], gate: float) -> tuple[Candidate, Score]:
    """The first candidate that agrees at a view, else the best of those that were tried; ``settled`` choices stay."""
    tried = {start: bench.score(start, view)}
    if tried[start].worst <= gate:
        return start, tried[start]
    free = [n for n in range(len(bench.choices)) if n not in settled and len(bench.choices[n].options) > 1]

    def take(candidate: Candidate) -> bool:
        """Whether to stop: it agrees, or there is no time."""
        tried[candidate] = bench.score(candidate, view)
        return tried[candidate].worst <= gate or bench.over

    def best() -> Candidate:
        return min(tried, key=lambda each: (tried[each].rms, sum(each)))

    base = start
    for _ in range(3):  # an option may make another choice matter
        coarse, fine = _relevant(bench, base, view, free, tried)
        if any(take(each) for each in combinations(bench, base, coarse, _COMBINATIONS)):
            break
        ranked = sorted(tried, key=lambda each: (tried[each].rms, sum(each)))[:_BEST]
        if any(take(each) for one in ranked[:2] for each in combinations(bench, one, fine, 200)):
            break
        if any(_descend(bench, one, free, take, tried) for one in ranked):
            break
        if best() == base:
            break
        base = best()
    return best(), tried[best()]


def _relevant(
    bench: Bench, base: Candidate, view: View, free: Sequence[int], tried: dict[Candidate, Score]
) -> tuple[list[int], list[int]]:
    """The choices that show at a view, from ``base``: those that move it much, and those that move it little."""
    plain, coarse, fine = bench.look(base, view), list[int](), list[int]()
    if plain is None:
        return list(free), []
    for n in free:
        change = 0.0
        for option in range(len(bench.choices[n].options)):
            other = _with(base, n, option)
            if other == base:
                continue
            output = bench.look(other, view) if bench.key(other) != bench.key(base) else plain
            tried[other] = bench.score(other, view)
            change = max(change, distance(output, plain).rms if output is not None else 0.0)
        if change > _FINE:
            coarse.append(n)
        elif change > _SHOWS:
            fine.append(n)
    return _with_heads(bench, coarse, free), fine


def _with_heads(bench: Bench, chosen: list[int], free: Sequence[int]) -> list[int]:
    """The number of heads too, where an option lays tensors out by head: it shows with that option alone."""
    by_head = any(
        set(rule.axes) & set("hg")
        for n in chosen
        for option in bench.choices[n].options
        for rule in option.rules.values()
    )
    sizes = {"n_head", "n_kv_head", "head_dim"}
    more = [n for n in free if any(sizes & set(option.model) for option in bench.choices[n].options)]
    return chosen + [n for n in more if n not in chosen] if by_head else chosen


def _with(candidate: Candidate, n: int, option: int) -> Candidate:
    return (*candidate[:n], option, *candidate[n + 1 :])


def combinations(bench: Bench, base: Candidate, chosen: Sequence[int], limit: int) -> Iterator[Candidate]:
    """All combinations of the options of some choices, the likeliest first, the others as in ``base``."""
    sizes = [len(bench.choices[n].options) for n in chosen]

    def of_sum(total: int, rest: Sequence[int]) -> Iterator[tuple[int, ...]]:
        if not rest:
            yield from [()] if total == 0 else []
            return
        for first in range(min(total, rest[0] - 1) + 1):
            yield from ((first, *more) for more in of_sum(total - first, rest[1:]))

    levels = (of_sum(total, sizes) for total in range(sum(sizes) - len(sizes) + 1))
    for options in itertools.islice(itertools.chain.from_iterable(levels), limit):
        made = list(base)
        for n, option in zip(chosen, options, strict=True):
            made[n] = option
        yield tuple(made)


def _descend(bench: Bench, start: Candidate, free: Sequence[int], take, tried: dict[Candidate, Score]) -> bool:
    """Improves a candidate one choice at a time, then two at once; whether ``take`` said to stop."""
    now = start
    for _ in range(4):
        before = now
        for n in free:
            others = [_with(now, n, option) for option in range(len(bench.choices[n].options))]
            if any(take(each) for each in others if each not in tried):
                return True
            now = min([now, *others], key=lambda each: tried.get(each, NONE).rms)
        if now == before:
            break
    return False


def shown(bench: Bench, best: Candidate, view: View, score: Score, gate: float) -> set[int]:
    """The choices of which no other option agrees at a view."""
    made = set()
    for n, choice in enumerate(bench.choices):
        others = [_with(best, n, option) for option in range(len(choice.options)) if option != best[n]]
        far = max(gate, 4 * score.worst)
        if others and all(bench.score(each, view).worst > far for each in others):
            made.add(n)
    return made


def polish(bench: Bench, best: Candidate, view: View) -> Candidate:
    """Takes what is clearly better though ``best`` agrees already: an eps or a kind of GELU, within the gate."""
    for _ in range(3):
        before = best
        for n, choice in enumerate(bench.choices):
            for option in range(len(choice.options)):
                other = _with(best, n, option)
                if bench.score(other, view).rms < 0.7 * bench.score(best, view).rms:
                    best = other
        if best == before:
            break
    return best


def departure(bench: Bench, best: Candidate, failed: Sequence[View], gate: float) -> str:
    """The first place where the best candidate is off."""
    sample = bench.sample
    if not sample.hidden:
        if not any(view.tokens == 1 for view in failed):
            what = "the first token's logits agree: heads, positions or the layout of q and k are others"
            return what if sample.ids.shape[1] > 1 and not sample.last else ""
        what = "the first token's logits already depart, which neither heads nor rope nor q and k change"
        return f"{what}; hidden states by layer would tell the first layer that departs"
    places = ["the embeddings", *(f"block {n}" for n in range(len(sample.hidden) - 1))]
    for place, name in enumerate(places):
        score = bench.score(best, View(name, place))
        if score.worst > 4 * gate:
            return f"{name} is the first that departs: off by {score.worst:.1e} of its largest number"
    return "every hidden state agrees: the last norm or the head is another"
