"""From the engine's thread to a request's task: what the engine says of its choices, as it says it."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from mlxgpt.common.serve.api.errors import ApiError, Gone
from mlxgpt.common.serve.work import Begun, Busy, Piece, Stopped, Work, Worker

Said = tuple[int, Begun | Piece]
Disconnected = Callable[[], Awaitable[Any]]
"""Returns once the client has left."""


class Bridge:
    """Carries what the engine says to the event loop: one wake-up for all that a step says."""

    def __init__(self) -> None:
        self._said: deque[tuple[Inbox, Said]] = deque()
        self._woken = False

    def post(self, inbox: "Inbox", said: Said) -> None:
        """In the engine's thread; does not block."""
        self._said.append((inbox, said))
        if not self._woken:
            self._woken = True
            try:
                inbox.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop has ended, and nobody listens
                self._woken = False

    def _deliver(self) -> None:
        self._woken = False
        while self._said:
            inbox, said = self._said.popleft()
            inbox.said.append(said)
            inbox.event.set()


class Inbox:
    """What is said of the works of one request; made in its task."""

    def __init__(self, worker: Worker, bridge: Bridge) -> None:
        self.loop, self.event = asyncio.get_running_loop(), asyncio.Event()
        self.said: list[Said] = []
        self._worker, self._bridge = worker, bridge
        self._works: list[Work] = []
        self._gone = False

    def listener(self, number: int) -> Callable[[Begun | Piece], None]:
        """The ``say`` of the request's work ``number``."""
        return lambda said: self._bridge.post(self, (number, said))

    def submit(self, works: Sequence[Work]) -> None:
        """Queues all of them, or none.

        Raises:
            ApiError: 429, the queue is full; 503, the engine takes nothing more.
        """
        try:
            for work in works:
                self._worker.submit(work)
                self._works.append(work)
        except Busy as error:
            self.cancel()
            seconds = str(max(1, error.seconds))
            raise ApiError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": seconds}) from None
        except Stopped as error:
            self.cancel()
            raise ApiError(503, f"no request is taken: {error}", code="service_unavailable") from None

    def cancel(self) -> None:
        """Takes the request out of the engine; what has ended has left by itself."""
        works, self._works = self._works, []
        for work in works:
            self._worker.cancel(work)

    def done(self) -> None:
        """Everything was said: there is nothing to cancel."""
        self._works = []

    def leave(self, _: object = None) -> None:
        """The client has left."""
        self._gone = True
        self.event.set()

    async def batches(self, every: float = 0.0) -> AsyncGenerator[list[Said]]:
        """What was said since the last time; [] after ``every`` seconds of silence, if that is not 0.

        Raises:
            Gone: the client has left.
        """
        silent, timer = False, None

        def tick() -> None:
            nonlocal silent, timer
            silent, timer = True, self.loop.call_later(every, tick)
            self.event.set()

        try:
            timer = self.loop.call_later(every, tick) if every else None
            spoke = False  # since the last tick
            while True:
                await self.event.wait()
                self.event.clear()
                if self._gone:
                    raise Gone
                said, self.said = self.said, []
                if said:
                    spoke = True
                    yield said
                if silent:
                    silent = False
                    if not spoke:
                        yield []
                    spoke = False
        finally:
            if timer:
                timer.cancel()


def failure(worker: Worker, piece: Piece) -> ApiError | None:
    """The error that a choice's last word is, if it is one."""
    if piece.reason == "cancelled":
        return ApiError(503, "the server is ending", code="service_unavailable")
    if piece.error:
        dead = worker.death is not None
        return ApiError(503 if dead else 500, piece.error, code="service_unavailable" if dead else "generation_failed")
    return None
