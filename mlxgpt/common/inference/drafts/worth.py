"""Whether drafts pay: what a pass over several tokens a row costs, against what it may gain.

Numbers that were measured once, and no clock: so a run that is repeated decides alike. C.f. the walltime improvement of
Leviathan et al. 2023, section 3.3.
"""

import math
from collections.abc import Sequence

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens of a draft
LEAST = 1.05  # times the speed without drafts, below which there are none

# A pass over n rows of one token takes 1. `python -m benchmarks speculate` measures what more tokens add.
ALONE = 0.1  # each further token, of one row: most of a pass is to fetch the weights
CROWD = 0.33  # each further token of each row, of many rows: products are what a pass computes
FIXED = 0.1  # the first further token, whatever the rows: products of matrices begin, nothing is queued ahead


def cost(rows: int, width: int) -> float:
    """What a pass over a token and drafts of ``width`` tokens takes, in passes over a token; of so many rows."""
    if not width:
        return 1.0
    share = 1 - 1 / rows  # of what is computed, in what is fetched and computed
    return 1 + FIXED + width * (ALONE + (CROWD - ALONE) * share)


def drawn(rates: Sequence[float]) -> list[float]:
    """Tokens that a pass gives a row on the average, by the draft's width from 0; ``rates``: each token's chance to be
    right if those before it are."""
    made, still = [1.0], 1.0
    for rate in rates:
        still *= rate
        made.append(made[-1] + still)
    return made


def may(drafting: int, rows: int) -> bool:
    """Whether drafts of so many rows of all pay if every token is right: most batches know by it that theirs do not."""
    return any((1 + width) ** (drafting / rows) > LEAST * cost(rows, width) for width in WIDTHS)


def best(expected: Sequence[Sequence[float]], rows: int, more: float = 0.0) -> tuple[int, float]:
    """The width that pays most, and how many times the speed without drafts it gives; 0 and 1 where none pays.

    The speed is the rows' geometric mean, so that one row's gain does not make up for what all others lose.

    Args:
        expected: ``drawn`` of the rows that have drafts.
        rows: that draw, those without drafts included.
        more: what each token of the drafts costs besides, in passes: a draft model's own.
    """
    found, most = 0, LEAST
    for width in WIDTHS:
        mean = sum(math.log(each[min(width, len(each) - 1)]) for each in expected) / rows
        speed = math.exp(mean) / (cost(rows, width) + more * width)
        if speed > most:
            found, most = width, speed
    return found, most if found else 1.0
