"""What the engine says to those who asked, and counts."""

import sys
import time
import traceback
from collections.abc import Callable

from mlxgpt.common import failures
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.inference.choosing import Chosen
from mlxgpt.common.serve.engine.slot import Slot, Task
from mlxgpt.common.serve.work import Begun, Counts, Piece, Work

LATEST = 1024  # requests whose seconds to the first token are kept


class Telling:
    """Everything is said in the engine's thread.

    Args:
        cancel: called with a request that nobody listens to any more.
        short: called where memory ran out, so that what can be forgotten is.
    """

    def __init__(self, cancel: Callable[[Work], None], short: Callable[[], None]) -> None:
        self.counts = Counts()
        self._cancel, self._short = cancel, short
        self._began: dict[Work, float] = {}  # works that have drawn nothing yet

    def arrived(self, task: Task) -> None:
        """Takes the time to a request's first token from here."""
        self._began[task.work] = task.arrived

    def forget(self, work: Work) -> None:
        """A request whose client left."""
        self._began.pop(work, None)

    def say(self, work: Work, said: Begun | Piece) -> None:
        """Says it; who does not listen any more is gone."""
        try:
            work.say(said)
        except Exception:
            self._cancel(work)

    def take(self, slot: Slot, chosen: Chosen) -> bool:
        """Gives a row what it drew, and says it; whether the row goes on."""
        try:
            piece = slot.take(chosen)
        except Exception as error:  # not finite, or of a constraint: of this row alone
            piece = Piece(slot.index, "", (), "", self.meaning(error))
        self.counts.generated_tokens += len(piece.drawn)
        if piece.reason or piece.error:
            slot.end = chosen.token
            self.finish(slot, piece)
            return False
        self._count_first(slot.work)
        self.say(slot.work, piece)
        return True

    def finish(self, slot: Slot, piece: Piece) -> None:
        """A choice's last word."""
        self._count_first(slot.work)
        self.counts.finished += not piece.error
        self.counts.failed += bool(piece.error)
        self.say(slot.work, piece)

    def fail(self, slot: Slot, line: str) -> None:
        """A choice's last word, which is an error."""
        self.finish(slot, Piece(slot.index, "", (), "", line))

    def refuse(self, task: Task, reason: str, error: str) -> None:
        """The last word of a request that did not reach the batch."""
        self.forget(task.work)
        left = [slot.index for slot in task.slots] or range(len(task.work.copies))
        self.counts.failed += len(left) if error else 0
        for index in left:
            self.say(task.work, Piece(index, "", (), reason, error))

    def _count_first(self, work: Work) -> None:
        """Seconds from a request's arrival to its first token."""
        if (arrived := self._began.pop(work, None)) is None:
            return
        seconds, counts = time.monotonic() - arrived, self.counts
        counts.first_token_seconds = [*counts.first_token_seconds[1 - LATEST :], seconds]
        counts.first_token_total += seconds
        counts.first_token_count += 1

    def meaning(self, error: Exception) -> str:
        """An error in one line."""
        if isinstance(error, UserError | RunError):
            return str(error)
        known = failures.meaning(error)
        if known and known.memory:
            self._short()
        if not known:
            traceback.print_exc(file=sys.stderr)
        return known.line if known else f"{type(error).__name__}: {error}"
