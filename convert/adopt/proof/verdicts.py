"""How sure each choice is: what the nearest candidate with another option of it gives."""

from collections.abc import Sequence
from dataclasses import dataclass

from convert.adopt.proof.candidate import Bench, Candidate, Score, View

_NEAR = 0.1  # a candidate that is farther off than this is not brought near by another choice
CLEAR = 4.0  # times rounding: a candidate that is off by more is another model

# what would tell options apart that a sample does not
_LONGER = "a longer sample would tell"
_TELLS = {
    "rope": _LONGER,
    "rope_theta": f"{_LONGER}: the slow frequencies have hardly turned by its last token",
    "rotary_dim": _LONGER,
    "rope_scaling": f"{_LONGER}: it stretches frequencies that have hardly turned by its last token",
    "window": "a sample longer than the window would tell",
    "block_size": "no result depends on it: set it with --set block_size=N",
    "norm_eps": "float32 cannot tell at these sizes of activations, nor does it matter there",
}
_ELSE = "a longer sample of different tokens, or hidden states, would tell"


@dataclass(frozen=True)
class Verdict:
    """One choice: the option taken, and why.

    ``proved``: the nearest candidate with another option is ``margin`` times as far off as rounding. ``undetermined``:
    ``options`` all give the sample's numbers, and ``tell`` says what would not. ``given`` by the user; ``known``, as
    there is one option; ``idle``, as it does nothing in this model.
    """

    name: str
    value: str
    verdict: str
    margin: float | None = None
    options: tuple[str, ...] = ()
    tell: str = ""


def judge(
    bench: Bench, best: Candidate, view: View, floor: Score, given: Sequence[str]
) -> tuple[list[Verdict], Candidate]:
    """A verdict a choice, and the candidate with the likeliest of the options that agree."""
    unit = max(bench.score(best, view).rms, floor.rms)
    best = _likeliest(bench, best, view, unit)
    made = []
    for n, choice in enumerate(bench.choices):
        value = choice.options[best[n]].label
        others = [each for each in _others(bench, best, n) if bench.key(each) is not None]
        if choice.name in given or len(choice.options) < 2:
            made.append(Verdict(choice.name, value, "given" if choice.name in given else "known"))
        elif all(bench.key(each) == bench.key(best) for each in others):
            made.append(Verdict(choice.name, value, "idle", options=tuple(each.label for each in choice.options)))
        else:
            made.append(
                _verdict(bench, best, view, n, [each for each in others if bench.key(each) != bench.key(best)], unit)
            )
    return made, best


def _verdict(bench: Bench, best: Candidate, view: View, n: int, others: Sequence[Candidate], unit: float) -> Verdict:
    choice = bench.choices[n]
    scores = {each: bench.score(each, view) for each in others}
    alike = {each[n] for each in others if scores[each].rms <= CLEAR * unit}
    nearest = min(scores, key=lambda each: scores[each].rms)
    if not alike and scores[nearest].rms < _NEAR and not bench.over:
        nearest = _adapted(bench, nearest, view, n, scores)
        if scores[nearest].rms <= CLEAR * unit:
            alike.add(nearest[n])
    margin = scores[nearest].rms / unit
    value = choice.options[best[n]].label
    if not alike:
        return Verdict(choice.name, value, "proved", margin)
    labels = tuple(choice.options[option].label for option in sorted({best[n], *alike}))
    tell = next((text for name, text in _TELLS.items() if choice.name == name), _ELSE)
    return Verdict(choice.name, value, "undetermined", margin, labels, tell)


def _others(bench: Bench, best: Candidate, n: int) -> list[Candidate]:
    """The candidates with another option of choice ``n``."""
    options = range(len(bench.choices[n].options))
    return [(*best[:n], option, *best[n + 1 :]) for option in options if option != best[n]]


def _adapted(bench: Bench, start: Candidate, view: View, n: int, scores: dict[Candidate, Score]) -> Candidate:
    """The nearest candidate once the other choices could adapt to that option, one after the other."""
    now = start
    for other in range(len(bench.choices)):
        if other == n or bench.over:
            continue
        for each in _others(bench, now, other):
            scores[each] = bench.score(each, view)
            if scores[each].rms < scores[now].rms:
                now = each
    return now


def _likeliest(bench: Bench, best: Candidate, view: View, unit: float) -> Candidate:
    """``best`` with an earlier option wherever that agrees as well."""
    for n in range(len(bench.choices)):
        for option in range(best[n]):
            other = (*best[:n], option, *best[n + 1 :])
            if bench.score(other, view).rms <= 1.5 * unit:
                best = other
                break
    return best
