"""Ctrl-C and SIGTERM as requests that the loop reads between steps."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Signals:
    """While entered, the first SIGINT or SIGTERM is kept in ``received``; a second Ctrl-C ends the process at once.

    The operating system handles the second one, so it works inside a long step too. It cannot harm a run: what is
    being written at that moment is a hidden file beside the complete ones.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        # only the main thread may set handlers, and only it receives signals
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if os.isatty(1):
                # a live display hides the cursor, and the second Ctrl-C could not restore it
                os.write(1, b"\x1b[?25h")

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, 0 without either."""
        return 128 + self.received if self.received else 0
