"""Saves beside the loop: one second thread, whose failure is not lost."""

import threading
from collections.abc import Callable


class Writer:
    """Runs saves, on a second thread where ``background``; at most one is in flight, and a failure surfaces."""

    def __init__(self, background: bool):
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Starts ``job`` when the one before is done."""
        self.wait()
        if not self._background:
            job()
            return
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raises what the save that has ended raised; never waits."""
        if self._thread and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is in flight; raises what the save raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error
