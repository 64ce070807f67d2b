"""Ctrl-C and SIGTERM as requests that the loop reads between steps; and what they must not reach.

A terminal sends Ctrl-C to every process of a command, so also to the compiler that MLX starts on a CPU (g++, in a
step) or PyTorch on any device. Killed, it takes the step with it. A process inherits the signals that the thread which
starts it blocks, so while a framework computes, the main thread blocks both, and another one takes them.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

ASKED = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes that the main thread starts in the block do not receive Ctrl-C and SIGTERM; Python's handlers do.

    Python runs handlers on the main thread whichever thread the system chose, so they run as they would without.
    Not for blocks that wait for input or for processes that a signal should end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    done = threading.Event()
    # started before the signals are blocked, so that it can receive them
    threading.Thread(target=done.wait, name="signals", daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()


class Signals:
    """While entered, the first SIGINT or SIGTERM is kept in ``received``; a second Ctrl-C ends the process at once.

    Without ``ends`` it does what it did before: KeyboardInterrupt, which a notebook survives.

    The operating system handles the second one, from the moment that the call into the framework which the first one
    met has returned. It cannot harm a run: what is being written then is a hidden file beside the complete ones.
    """

    def __init__(self, ends: bool = True) -> None:
        self.received, self._ends = 0, ends
        self._before: dict[int, Any] = {}
        self._shield = contextlib.ExitStack()

    def __enter__(self) -> "Signals":
        # only the main thread may set handlers, and only it receives signals
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in ASKED}
        self._shield.enter_context(shielded())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shield.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            before = self._before[signal.SIGINT] or signal.default_int_handler  # None: not set from Python
            signal.signal(signal.SIGINT, signal.SIG_DFL if self._ends else before)
            if os.isatty(1):
                # a live display hides the cursor, and the second Ctrl-C could not restore it
                os.write(1, b"\x1b[?25h")

    def came(self, seconds: float = 0.5) -> bool:
        """Whether one came; waits for one that another thread is just taking."""
        end = time.monotonic() + seconds
        while not self.received and time.monotonic() < end:
            time.sleep(0.01)
        return bool(self.received)

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, 0 without either."""
        return 128 + self.received if self.received else 0
