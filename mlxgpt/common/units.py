"""Numbers as people read and write them."""

import re

from mlxgpt.common.errors import UserError


def duration(seconds: float) -> str:
    """``0:07``, ``12:34`` or ``1:02:03``; days run on as hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def short(number: float) -> str:
    """``950``, ``23.4k`` or ``1.2M``."""
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M")):
        if number < limit:
            return f"{number * 1e3 / limit:.3g}{unit}" if number < limit * 0.9995 else f"1{'kMG'[len(unit)]}"
    return f"{number / 1e9:.3g}G"


def size(count: float) -> str:
    """Bytes as text: ``1.50 GiB``, ``74.4 MiB``, ``20.3 KiB``."""
    if 0 < count < 2**20 / 10:
        return f"{count / 2**10:,.1f} KiB"
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def counted(number: int, what: str) -> str:
    """``1 document``, ``1,200 documents``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def read_size(text: str, flag: str) -> int:
    """``16GB`` -> bytes.

    Raises:
        UserError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(KB|KiB|MB|MiB|GB|GiB)\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"{flag} {text}: expected a size, such as 16GB or 800MB")
    unit = {"kb": 10**3, "kib": 2**10, "mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30}[found[2].lower()]
    return int(float(found[1]) * unit)
