"""One view of the search: which combination of options gives the numbers that the sample has there.

First the options that move the numbers much, in all combinations, likeliest first; options that come to nearly the
same are one there. Then the best for each option of each choice are improved one choice at a time, and then what moves
little is told apart. What is done to the logits last (their scale, their cap) is computed from one run.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from convert.adopt.proof.candidate import NONE, Bench, Candidate, Score, View, distance

_FIRST, _ALL = 400, 3000  # combinations before and after single changes are tried
_ALIKE = 0.02  # options of which the numbers differ by less are one at first
_SHOWS = 1e-7  # a smaller change is no change
_STARTS = 24
_RUNS = 3000  # at one view
_LAST_RUNS = 1000  # of these, for what is small and for pairs


class Fit:
    """A search at one view; ``settled`` choices stay as they are in ``start``."""

    def __init__(self, bench: Bench, start: Candidate, view: View, settled: set[int], gate: float):
        self.bench, self.start, self.view, self.gate = bench, start, view, gate
        self.free = [n for n in range(len(bench.choices)) if n not in settled and len(bench.choices[n].options) > 1]
        self.tried: dict[Candidate, Score] = {}
        self.done = False
        self.until = bench.runs + _RUNS

    def take(self, candidate: Candidate) -> bool:
        """Tries a candidate, also with the best scale and cap of logits; whether to stop: it agrees, or time is up."""
        self.tried[candidate] = self.bench.score(candidate, self.view)
        for each in {candidate, self.bench.finished(candidate, self.view)}:
            self.tried[each] = self.bench.score(each, self.view)
            self.done = self.done or self.tried[each].worst <= self.gate or self._over
        return self.done

    @property
    def _over(self) -> bool:
        return self.bench.over or self.bench.runs > self.until

    def ranked(self) -> list[Candidate]:
        """What was tried, the nearest first, of equal ones the likeliest."""
        return sorted(self.tried, key=lambda each: (self.tried[each].rms, sum(each)))

    def run(self) -> tuple[Candidate, Score]:
        """The first candidate that agrees, else the nearest of those that were tried."""
        base = self.start
        if not self.take(base):
            for _ in range(3):  # an option may make another choice matter
                if self._round(base) or self.ranked()[0] == base:
                    break
                base = self.ranked()[0]
        agree = [each for each in self.tried if self.tried[each].worst <= self.gate]
        best = min(agree, key=lambda each: (sum(each), self.tried[each].rms)) if agree else self.ranked()[0]
        return best, self.tried[best]

    def _round(self, base: Candidate) -> bool:
        coarse, fine = self.moving(base)
        every = combinations(base, coarse)
        if any(self.take(each) for each in itertools.islice(every, _FIRST)):
            return True
        if any(self.descend(each) for each in self.starts(coarse)):
            return True
        for each in itertools.islice(every, _ALL - _FIRST):
            if self.take(each):
                return True
            if self.bench.runs > self.until - _LAST_RUNS:
                break
        near = self.ranked()[:2]
        if any(self.take(each) for one in near for each in itertools.islice(combinations(one, fine), 100)):
            return True
        if any(self.descend(each) for each in self.ranked()[:2]):
            return True
        return self.pairs(self.ranked()[0], sorted({*coarse, *fine})) or self.descend(self.ranked()[0])

    def pairs(self, start: Candidate, chosen: Sequence[int]) -> bool:
        """Changes two choices at once, which one at a time may not come by; whether to stop."""
        for m, n in itertools.combinations(chosen, 2):
            sizes = (range(len(self.bench.choices[each].options)) for each in (m, n))
            for a, b in itertools.product(*sizes):
                if start[m] != a and start[n] != b and self.take(swapped(swapped(start, m, a), n, b)):
                    return True
        return False

    def moving(self, base: Candidate) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """The options that move the numbers much from ``base``, one of those that are alike; and all that move them."""
        plain, coarse, fine = self.bench.look(base, self.view), dict[int, list[int]](), dict[int, list[int]]()
        every = {n: list(range(len(self.bench.choices[n].options))) for n in self.free}
        if plain is None:
            return every, every
        for n in self.free:
            kept = [(base[n], plain)]
            moved = 0.0
            for option in every[n]:
                other = swapped(base, n, option)
                if other == base or self.bench.key(other) == self.bench.key(base):
                    continue
                output = self.bench.look(other, self.view)
                self.take(other)
                if output is None:
                    continue
                near = min(distance(output, each).rms for _, each in kept)
                moved = max(moved, distance(output, plain).rms)
                if near > _ALIKE:
                    kept.append((option, output))
            if len(kept) > 1 and not self.bench.is_last(n):
                coarse[n] = sorted(option for option, _ in kept)
            if moved > _SHOWS:
                fine[n] = every[n]
        coarse |= {n: every[n] for n in self._heads(coarse) if n not in coarse}
        small = {n: options for n, options in fine.items() if len(coarse.get(n, ())) < len(options)}
        return coarse, small

    def _heads(self, coarse: Mapping[int, Sequence[int]]) -> list[int]:
        """The number of heads, where an option lays tensors out by head: it shows with that option alone."""
        options = [self.bench.choices[n].options[option] for n in coarse for option in coarse[n]]
        by_head = any(set(rule.axes) & set("hg") for option in options for rule in option.rules.values())
        sizes = {"n_head", "n_kv_head", "head_dim"}
        found = [n for n in self.free if any(sizes & set(option.model) for option in self.bench.choices[n].options)]
        return found if by_head else []

    def starts(self, coarse: Mapping[int, Sequence[int]]) -> list[Candidate]:
        """Of what was tried, the nearest for each option of each choice."""
        ranked = self.ranked()
        found = [next((each for each in ranked if each[n] == option), None) for n in coarse for option in coarse[n]]
        return sorted({each for each in found if each}, key=ranked.index)[:_STARTS]

    def descend(self, start: Candidate) -> bool:
        """Improves a candidate one choice at a time; whether to stop."""
        now = start
        for _ in range(4):
            before = now
            for n in self.free:
                others = [swapped(now, n, option) for option in range(len(self.bench.choices[n].options))]
                if any(self.take(each) for each in others if each not in self.tried):
                    return True
                now = min([now, *others], key=lambda each: self.tried.get(each, NONE).rms)
            if now == before:
                break
        return False


def fit(bench: Bench, start: Candidate, view: View, settled: set[int], gate: float) -> tuple[Candidate, Score]:
    """The first candidate that agrees at a view, else the nearest of those that were tried."""
    return Fit(bench, start, view, settled, gate).run()


def swapped(candidate: Candidate, n: int, option: int) -> Candidate:
    """The candidate with another option of choice ``n``."""
    return (*candidate[:n], option, *candidate[n + 1 :])


def combinations(base: Candidate, chosen: Mapping[int, Sequence[int]]) -> Iterator[Candidate]:
    """All combinations of some options, the likeliest first, the other choices as in ``base``."""
    sizes = [len(options) for options in chosen.values()]

    def of_sum(total: int, rest: Sequence[int]) -> Iterator[tuple[int, ...]]:
        if not rest:
            yield from [()] if total == 0 else []
            return
        for first in range(min(total, rest[0] - 1) + 1):
            yield from ((first, *more) for more in of_sum(total - first, rest[1:]))

    for total in range(sum(sizes) - len(sizes) + 1):
        for places in of_sum(total, sizes):
            made = list(base)
            for n, place in zip(chosen, places, strict=True):
                made[n] = chosen[n][place]
            yield tuple(made)
