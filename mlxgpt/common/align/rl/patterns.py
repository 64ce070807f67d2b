"""What the worker calls for the reward ``regex``."""

import re
from collections.abc import Sequence


def search(patterns: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 where the pattern is found in the completion."""
    pairs = zip(patterns, completions, strict=True)
    return [float(re.search(pattern, text) is not None) for pattern, text in pairs]
