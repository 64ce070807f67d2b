"""A request while the engine works on it: its choices, and what each step adds to them."""

import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple

from mlxgpt.common.serve.api.gather import Bridge, Inbox, failure
from mlxgpt.common.serve.api.tokens import Placed, Placing
from mlxgpt.common.serve.work import Begun, Drawn, Piece, Work, Worker

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


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
