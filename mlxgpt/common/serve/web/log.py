"""One line on stderr for each request: no body, no text of a prompt or an answer, no key, no query."""

import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

LOG = logging.getLogger("mlxgpt.serve")
MAX_PATH, MAX_NOTE = 200, 300  # characters of what a client chose


@dataclass
class Line:
    """What is said of a request."""

    client: str = "-"
    method: str = "-"
    path: str = "-"
    status: int = 0  # 499: the client left before an answer
    id: str = "-"  # of the header X-Request-Id
    tokens: tuple[int, int] | None = None  # of the prompt, and generated; None: nothing was computed
    note: str = ""  # why it was refused, or what broke
    began: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        milliseconds = (time.monotonic() - self.began) * 1000
        words = [self.client, self.method, plain(self.path, MAX_PATH), str(self.status), f"{milliseconds:.0f} ms"]
        if self.tokens:
            words.append(f"{self.tokens[0]}+{self.tokens[1]} tokens")
        words.append(self.id)
        return " ".join(words) + (f": {plain(self.note, MAX_NOTE)}" if self.note else "")


def plain(text: str, most: int) -> str:
    """Text that cannot look like another line, or move a terminal's cursor."""
    cut = text if len(text) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in cut)


class Log:
    """Writes the lines of requests, and counts them by status for /metrics."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()

    def __call__(self, line: Line) -> None:
        """Writes a line."""
        self.statuses[line.status] += 1
        LOG.info("%s", line)


def to_stderr() -> None:
    """Shows the log; uvicorn's own, which would say things twice, is silent."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
    LOG.setLevel(logging.INFO)
    if not LOG.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
        LOG.addHandler(handler)
