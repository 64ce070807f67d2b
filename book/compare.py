"""Whether a program printed what its page says.

Words and whole numbers must be the same. A number with a decimal point may differ by one in its last digit, since other
processors round differently. ``...`` in the page stands for anything; on a line of its own, for any lines, or none.
"""

import re

NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
PIECE = re.compile(
    rf"(?P<lines>^\.\.\.\n)|(?P<any>\.\.\.)|(?P<space>[ \t]+)|(?P<number>{NUMBER.pattern})", re.MULTILINE
)


def same(expected: str, found: str) -> bool:
    """Whether the output on the page describes the one found; spaces at the ends of lines do not count."""
    expected, found = (
        "\n".join(re.sub(r"[ \t]+", " ", line).rstrip() for line in text.strip("\n").splitlines())
        for text in (expected, found)
    )
    pattern, place, numbers = "", 0, []
    for match in PIECE.finditer(expected):
        pattern += re.escape(expected[place : match.start()])
        place = match.end()
        if match["lines"]:
            pattern += r"(?:[^\n]*\n)*?"
        elif match["any"]:
            pattern += r"[\s\S]*?"
        elif match["space"]:
            pattern += " "
        else:
            pattern += rf" ?({NUMBER.pattern})"
            numbers.append(match["number"])
    got = re.fullmatch(pattern + re.escape(expected[place:]), found)
    return got is not None and all(near(a, b) for a, b in zip(numbers, got.groups(), strict=True))


def near(expected: str, found: str) -> bool:
    """Whether two printed numbers differ by at most one in the last digit that the page has."""
    mantissa, _, exponent = expected.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(expected) - float(found)) <= 1.001 * last
