"""What the server asks of the engine, and what the engine says back: plain values, which threads may pass on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.inference.drafting import Drafter
from mlxgpt.common.sft.template import Template
from mlxgpt.common.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Served:
    """A model under the name that requests give: the base, or the base with an adapter."""

    name: str
    model: Any  # of the backend; the engine's thread alone touches it
    tokenizer: Tokenizer | None
    template: Template | None  # of the tokenizer, or --template; None: no chat
    ends: frozenset[int]  # every token that ends a text: the tokenizer's, the folder's, the template's, --stop-token's
    n_vocab: int  # tokens that may be drawn: the tokenizer's, at most the model's
    digest: str  # sha256 of weights, adapter and template
    parent: str | None = None  # the name of the base that it adapts; None: it is the base
    drafter: Callable[[], Drafter] | None = None  # made in the engine's thread; None: tokens are drawn one by one

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have."""
        return self.model.config.block_size


class Constraint(Protocol):
    """What an answer may look like, of one choice; the text so far decides what comes next."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next: (n_vocab,) bool, at least one; tokens that end the text where it may end."""
        ...

    def take(self, token: int) -> None:
        """Goes on behind a token that was allowed."""
        ...

    @property
    def over(self) -> bool:
        """Whether nothing may follow but an end: the choice ends there, reason stop, also where no token says so."""
        ...


@dataclass(frozen=True)
class Drawn:
    """A token with its natural log-probability under the model alone: before penalties, temperature and top-p."""

    token: int
    logprob: float | None = None  # None: not asked for, or the first token of a prompt
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens at this place, likeliest first


@dataclass(frozen=True)
class Begun:
    """The prompt was read, and the first token comes next."""

    cached: int  # tokens of the prompt that an earlier request had left
    scores: tuple[Drawn, ...] = ()  # the prompt's tokens, if Work.score_prompt


@dataclass(frozen=True)
class Piece:
    """What a step made of one choice; ``reason`` or ``error`` is said once, and is the last of a choice."""

    choice: int  # index into Work.copies
    text: str  # certain now: no half characters, no beginning of a stop string
    drawn: tuple[Drawn, ...] = ()  # without the token that ends the text
    reason: str = ""  # eos, stop, length, context, cancelled (the engine is told to end)
    error: str = ""  # one line: the model's logits are not finite, memory ran out, ...
    end: Drawn | None = None  # the token that ended the text (reason eos), if log-probabilities were asked for


@dataclass(eq=False)
class Work:
    """One prompt and the choices drawn behind it, a row of the batch each.

    ``say`` is called in the engine's thread and must not block: Begun first, then Pieces; or Pieces alone if the
    prompt could not be read.
    """

    served: Served
    prompt: Sequence[int]
    sample: SampleConfig  # seed and max_tokens are final; max_tokens 0 reads the prompt only, and ends with length
    say: Callable[["Begun | Piece"], None]
    copies: Sequence[int] = (0,)  # which repetition of an equal prompt a choice is: the noise's address has it
    stop: Sequence[str] = ()
    bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))  # is added to logits
    constrain: Callable[[], Constraint] | None = None  # a new one for each choice
    logprobs: int | None = None  # how many of the likeliest tokens to name, 0 to 20; None: no log-probabilities
    score_prompt: bool = False  # log-probabilities of the prompt's tokens, too


class Busy(Exception):
    """As many requests wait as may; ``seconds`` is a guess of when one fits."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Stopped(Exception):
    """The engine takes nothing more: it is told to end, or died."""


@dataclass
class Counts:
    """What /metrics shows; the engine's thread writes, others read."""

    running: int = 0  # choices in the batch
    waiting: int = 0  # requests in the queue
    requests: int = 0
    finished: int = 0  # choices that ended by themselves
    cancelled: int = 0  # choices whose client left
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0  # of prompts, that were not read again
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bytes: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of those that were drafted
    first_token_seconds: list[float] = field(default_factory=list)  # of the latest 1,024 requests
    first_token_total: float = 0.0
    first_token_count: int = 0


class Worker(Protocol):
    """The engine as the web half knows it; mlxgpt/common/serve/engine has the one that computes."""

    counts: Counts

    @property
    def served(self) -> Mapping[str, Served]:
        """By name, the base first."""
        ...

    @property
    def death(self) -> BaseException | None:
        """What ended the engine's thread, if it died."""
        ...

    def submit(self, work: Work) -> None:
        """Queues it.

        Raises:
            Busy: the queue is full.
            Stopped: the engine has ended, or died.
        """
        ...

    def cancel(self, work: Work) -> None:
        """Its rows leave before the next step; nothing more is said of it."""
        ...
