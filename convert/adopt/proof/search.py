"""The choices that no weight says, found by evidence: candidates are run until one gives the sample's numbers.

The order makes it short. A token that sees itself alone has an attention weight of 1, so the logits of position 0
depend on neither heads, rope, attention's scale nor on q and k: norms, activation, placement and the layout of v are
found there first, then attention on all tokens. Hidden states, where given, let embeddings and one block come before.
At each of these views all combinations of the options that show there are tried, likeliest first, up to a limit; then
the best few are changed one choice at a time. Small differences (an eps, erf or tanh) come last, in that way.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from convert.adopt.evidence import Sample
from convert.adopt.proof.candidate import Bench, Candidate, Forward, Gather, Limit, Score, View, distance
from convert.adopt.proof.fitting import fit, swapped
from convert.adopt.proof.verdicts import Verdict, judge
from convert.adopt.rules import Map, Proposal
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError

GATE = 1e-5  # of the largest logit
_CLOSE = 1000  # times the gate: what is farther off is no rounding of a small choice
_SMALL = 0.03  # a choice that moves the numbers by less may hide behind another
_PAIRS = 24
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

    Raises:
        UserError: no candidate is a model at all.
    """
    bench = Bench(proposal, gather, sample, forward, limit or Limit())
    gate, notes = tolerance or max(GATE, 8 * sample.step if sample.step > 1e-6 else 0.0), list[str]()
    best = seen = (0,) * len(proposal.choices)  # ``seen`` gives the hidden states that were looked at
    settled, failed = set[int](), list[View]()
    for view in views(sample):
        if view.place >= 0 and failed:  # what comes later than a place that differs differs, too
            continue
        allowed = gate if view.place < 0 else 4 * gate
        best, score = fit(bench, best, view, settled, allowed)
        if score.worst <= allowed:
            settled |= shown(bench, best, view, score, allowed)
            seen = best if view.place >= 0 else seen
        else:
            failed.append(view)
            if view.name == FIRST:  # its logits are among those of all tokens
                break
    if not bench.runs:
        raise UserError(bench.refused or "no combination of the options is a model")
    view = views(sample)[-1]
    deep = bool(sample.hidden) and failed == [view]  # a whole block agrees: what departs is further up
    if view in failed and settled and not deep and not bench.over:  # a view that fits by chance must not decide
        best, score = fit(bench, best, view, set(), gate)
    elif deep:
        best = seen
    if bench.score(best, view).worst <= _CLOSE * gate:
        best = polish(bench, best, view, rounding(bench, best, view))
    score, floor = bench.score(best, view), rounding(bench, best, view)
    allowed = gate if tolerance else max(gate, 4 * floor.worst)
    fits = score.worst <= allowed < float("inf")
    if fits and allowed > gate >= score.worst:
        allowed = gate
    verdicts, best = judge(bench, best, view, floor, given) if fits else ([], best)
    if not fits and sample.hidden:  # logits that are nearer by chance say nothing of where it departs
        best = max(best, seen, key=lambda each: departing(bench, each, gate)[0])
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
    return Score(0.0, 0.0) if plain is None or moved is None else distance(moved, plain)


def shown(bench: Bench, best: Candidate, view: View, score: Score, gate: float) -> set[int]:
    """The choices of which no other option agrees at a view."""
    made = set()
    for n, choice in enumerate(bench.choices):
        others = [swapped(best, n, option) for option in range(len(choice.options)) if option != best[n]]
        far = max(gate, 4 * score.worst)
        if others and all(bench.score(each, view).worst > far for each in others):
            made.add(n)
    return made


def polish(bench: Bench, best: Candidate, view: View, floor: Score) -> Candidate:
    """Takes what is clearly better though ``best`` agrees already: an eps or a kind of GELU, within the gate.

    Where ``best`` is still off by more than rounding, two choices at once: one small error may hide another.
    """
    for _ in range(4):
        near = {best: bench.score(best, view)}
        for n, choice in enumerate(bench.choices):
            for option in range(len(choice.options)):
                other = swapped(best, n, option)
                near[other] = bench.score(other, view)
        if near[best].rms > 2 * floor.rms:
            small = [each for each in near if near[each].rms < _SMALL][:_PAIRS]
            for one, two in itertools.combinations(small, 2):
                other = tuple(b if a == best[n] else a for n, (a, b) in enumerate(zip(one, two, strict=True)))
                if not bench.over:
                    near[other] = bench.score(other, view)
        found = min(near, key=lambda each: near[each].rms)
        if near[found].rms >= 0.7 * near[best].rms:
            break
        best = found
    return best


def departure(bench: Bench, best: Candidate, failed: Sequence[View], gate: float) -> str:
    """The first place where the best candidate is off."""
    sample = bench.sample
    if not sample.hidden:
        if not any(view.tokens == 1 for view in failed):
            what = "the first token's logits agree: heads, positions, a window or the layout of q and k are others"
            return what if sample.ids.shape[1] > 1 and not sample.last else ""
        what = "the first token's logits already depart, which neither heads nor rope nor q and k change"
        return f"{what}; hidden states by layer would tell the first layer that departs"
    place, score = departing(bench, best, gate)
    if place == len(sample.hidden):
        return "every hidden state agrees: the last norm or the head is another"
    name = f"block {place - 1}" if place else "the embeddings"
    return f"{name} is the first that departs: off by {score.worst:.1e} of its largest number"


def departing(bench: Bench, candidate: Candidate, gate: float) -> tuple[int, Score]:
    """(the first hidden state that is off, by how much); their number where all agree."""
    hidden, score = bench.sample.hidden or (), Score(0.0, 0.0)
    for place in range(len(hidden)):
        score = bench.score(candidate, View("a hidden state", place))
        if score.worst > 4 * gate:
            return place, score
    return len(hidden), score
