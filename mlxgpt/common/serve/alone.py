"""The engine without a server, in the thread that calls it: for one command, or one conversation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.config import ModelConfig, SampleConfig
from mlxgpt.common.errors import RunError
from mlxgpt.common.inference import draft_model
from mlxgpt.common.inference.choosing import Chosen
from mlxgpt.common.inference.draft_model import DraftModel
from mlxgpt.common.inference.drafting import Drafter
from mlxgpt.common.inference.generation import OnText, Result, Row
from mlxgpt.common.inference.lookup import Lookup
from mlxgpt.common.serve.engine import Engine
from mlxgpt.common.serve.work import Begun, Constraint, Counts, Piece, Served, Work
from mlxgpt.common.tokenizers.protocol import Tokenizer


def n_vocab_of(config: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """How many tokens may be drawn."""
    return min(tokenizer.n_vocab, config.vocab_size) if tokenizer else config.vocab_size


def served_alone(
    model: Any,
    tokenizer: Tokenizer | None,
    ends: Sequence[int | None] | set[int | None],
    drafter: Callable[[], Drafter] | None = None,
) -> Served:
    """A model that nobody asks for by name; ``ends``: every token that ends a text."""
    n_vocab = n_vocab_of(model.config, tokenizer)
    known = frozenset(end for end in ends if end is not None)
    return Served("", model, tokenizer, None, known, n_vocab, "", drafter=drafter)


def drafter_of(
    lookup: bool, draft: str | None, backend: Backend, config: ModelConfig, tokenizer: Tokenizer | None, device: str
) -> Callable[[], Drafter] | None:
    """What --lookup and --draft make: drafts for a model of ``config`` and ``tokenizer``.

    Raises:
        UserError: the model of --draft cannot draft for it.
    """
    if draft:
        model = draft_model.load(backend, draft, config, tokenizer, device)
        return lambda: DraftModel(backend, model, n_vocab_of(config, tokenizer), config)
    return Lookup if lookup else None


class Alone:
    """An engine of one model.

    Args:
        backend: of the model.
        served: in evaluation mode, and prepared.
        rows: answers that are drawn together.
        cache_bytes: as the Engine's.
    """

    def __init__(self, backend: Backend, served: Served, rows: int, cache_bytes: int = 0) -> None:
        self._engine = Engine(backend, lambda: [served], max_batch=rows, max_queue=rows, cache_bytes=cache_bytes)
        self._served = served
        self._engine.open()

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return self._engine.counts

    def generate(
        self,
        rows: Sequence[Row],
        sample: SampleConfig,
        on_text: OnText | None,
        bias: Mapping[int, float],
        logprobs: int | None = None,
        constrain: Callable[[], Constraint] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Result]:
        """What generate gives for rows; with ``constrain`` answers that follow it, or are cut where max_tokens or the
        context end. Where ``stopped``, what was drawn till then, reason cancelled.

        Raises:
            RunError: the model's logits are not finite.
        """
        answers = [_Answer(row.index, on_text) for row in rows]
        works = [
            Work(self._served, row.prompt, sample, answer.say, (row.copy,), row.stop, bias, constrain, logprobs)
            for row, answer in zip(rows, answers, strict=True)
        ]
        for work in works:
            self._engine.submit(work)
        while not all(answer.done for answer in answers):
            if stopped() or any(answer.raised for answer in answers):
                for work in works:
                    self._engine.cancel(work)
                self._engine.turn()
                break
            self._engine.turn()
        return [answer.result(len(row.prompt)) for row, answer in zip(rows, answers, strict=True)]


class _Answer:
    """What is said of a Work of one choice."""

    def __init__(self, index: int, on_text: OnText | None) -> None:
        self._index, self._on_text = index, on_text
        self._pieces: list[Piece] = []
        self.done = False
        self.raised: Exception | None = None

    def say(self, said: Begun | Piece) -> None:
        """A piece of the answer."""
        if isinstance(said, Begun):
            return
        self._pieces.append(said)
        self.done = bool(said.reason or said.error)
        try:
            if said.text and self._on_text:
                self._on_text(self._index, said.text)
        except Exception as error:  # which the engine would take for a client that left
            self.raised = error

    def result(self, prompt_tokens: int) -> Result:
        """The whole answer."""
        if self.raised:
            raise self.raised
        last = self._pieces[-1] if self._pieces else Piece(0, "", ())
        if last.error:
            raise RunError(f"prompt {self._index + 1}: {last.error}")
        drawn = [each for piece in self._pieces for each in piece.drawn]
        asked = [Chosen(each.token, each.logprob, each.top) for each in drawn if each.logprob is not None]
        text = "".join(piece.text for piece in self._pieces)
        return Result(text, [each.token for each in drawn], prompt_tokens, last.reason or "cancelled", asked)
