"""A request while the engine works on it: what the engine's thread says of its choices reaches the request's task."""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from mlxgpt.common.serve.api.errors import ApiError, Gone
from mlxgpt.common.serve.api.tokens import Placed, Placing
from mlxgpt.common.serve.work import Begun, Busy, Drawn, Piece, Stopped, Work, Worker

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
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


class Step(NamedTuple):
    """What a choice got: text that is certain, the tokens that it is made of, and why it ended, if it did."""

    choice: "Choice"
    text: str
    placed: Sequence[Placed] = ()  # if log-probabilities were asked for
    reason: str = ""  # stop or length
    cut: bool = False  # it did not end by itself
    end: Drawn | None = None  # the token that ended the text
    scores: Sequence[Drawn] | None = None  # the prompt was read; its tokens, if they were to be scored


class Choice:
    """One choice of an answer."""

    def __init__(self, index: int, number: int, work: Work) -> None:
        self.index, self.number, self.work = index, number, work
        self.size, self.drawn = 0, 0  # characters, tokens
        self.reason = ""
        named = work.logprobs is not None
        self._placing = Placing(work.served.tokenizer, work.prompt) if named else None

    def take(self, piece: Piece) -> Step:
        """What a piece adds."""
        self.size += len(piece.text)
        self.drawn += len(piece.drawn)
        self.reason = REASONS.get(piece.reason, "")
        cut = bool(piece.reason) and piece.reason != "eos"
        if self._placing is None:
            return Step(self, piece.text, (), self.reason, cut)
        for drawn in piece.drawn:
            self._placing.add(drawn)
        whole = bool(piece.reason) and piece.reason != "stop"  # a stop string cuts tokens away
        return Step(self, piece.text, self._placing.take(self.size, whole), self.reason, cut, piece.end)


class Run:
    """The works of a request, queued.

    Raises:
        ApiError: 429 or 503; or 400, of ``make``.
    """

    def __init__(self, worker: Worker, bridge: Bridge, make: Callable[[Callable[[int], Any]], list[Work]]) -> None:
        self._worker, self._inbox = worker, Inbox(worker, bridge)
        self.works = make(self._inbox.listener)
        pairs = [(number, work) for number, work in enumerate(self.works) for _ in work.copies]
        self.choices = [Choice(index, number, work) for index, (number, work) in enumerate(pairs)]
        self.cached = 0  # tokens of the prompts that an earlier request had left
        self._inbox.submit(self.works)

    @property
    def tokens(self) -> tuple[int, int]:
        """The tokens of prompts and of choices so far, without those that end a text."""
        return sum(len(work.prompt) for work in self.works), sum(choice.drawn for choice in self.choices)

    @property
    def usage(self) -> dict[str, Any]:
        """The same as OpenAI names them."""
        prompt, drawn = self.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def cancel(self, _: object = None) -> None:
        """Ends it in the engine; nothing happens if it has ended."""
        self._inbox.cancel()

    def leave(self, _: object = None) -> None:
        """The client has left: ``steps`` ends with Gone."""
        self._inbox.leave()

    async def steps(self, every: float = 0.0) -> AsyncGenerator[list[Step]]:
        """What came since the last time, until every choice has ended; [] after ``every`` seconds of silence.

        Raises:
            ApiError: a choice failed; the others are cancelled.
            Gone: the client has left.
        """
        left = len(self.choices)
        first = [0, *itertools.accumulate(len(work.copies) for work in self.works)]  # choice of each work
        try:
            async with contextlib.aclosing(self._inbox.batches(every)) as batches:
                async for said in batches:
                    made, error = [], None
                    for number, one in said:
                        if isinstance(one, Begun):
                            self.cached += one.cached
                            own = self.choices[first[number] : first[number + 1]]
                            made += [Step(choice, "", scores=one.scores) for choice in own]
                        elif error := error or failure(self._worker, one):
                            break
                        else:
                            made.append(step := self.choices[first[number] + one.choice].take(one))
                            left -= bool(step.reason)
                    yield made
                    if error:
                        raise error
                    if not left:
                        self._inbox.done()
                        return
        finally:
            self._inbox.cancel()
