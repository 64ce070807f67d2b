"""One line on stderr for each request: no body, no text of a prompt or an answer, no key, no query."""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TextIO

MAX_PATH, MAX_NOTE = 200, 300  # characters of what a client chose


@dataclass
class Line:
    """What is said of a request."""

    client: str = "-"
    method: str = "-"
    path: str = "-"
    status: int = 0  # 499: the client left before an answer
    id: str = "-"  # of the header X-Request-Id
    prompt_tokens: int | None = None  # None: nothing was computed
    generated_tokens: int = 0
    note: str = ""  # why it was refused, or what broke
    began: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        milliseconds = (time.monotonic() - self.began) * 1000
        words = [time.strftime("%Y-%m-%dT%H:%M:%S"), self.client, self.method, plain(self.path, MAX_PATH)]
        words += [str(self.status), f"{milliseconds:.0f} ms"]
        if self.prompt_tokens is not None:
            words.append(f"{self.prompt_tokens}+{self.generated_tokens} tokens")
        words.append(self.id)
        return " ".join(words) + (f": {plain(self.note, MAX_NOTE)}" if self.note else "")


def plain(text: str, most: int) -> str:
    """Text that cannot look like another line, or move a terminal's cursor."""
    cut = text if len(text) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in cut)


class Log:
    """Writes lines, and counts them by status and kind of route for /metrics."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self.statuses: Counter[int] = Counter()

    def __call__(self, line: Line) -> None:
        """Writes a line; a stream that is gone takes nothing down."""
        self.statuses[line.status] += 1
        self.say(str(line))

    def say(self, text: str) -> None:
        """Writes a line that is no request's."""
        stream = self._stream or sys.stderr
        try:
            stream.write(text + "\n")
            stream.flush()
        except (OSError, ValueError):
            pass
