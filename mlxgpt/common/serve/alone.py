"""The engine without a server, in the thread that calls it: for one command, or one conversation."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mlxgpt.common import backend as backends
from mlxgpt.common.backend import Backend
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError
from mlxgpt.common.inference import generation, sampling
from mlxgpt.common.inference.choosing import Chosen
from mlxgpt.common.inference.drafts import drafters
from mlxgpt.common.inference.drafts.drafters import Make, n_vocab_of
from mlxgpt.common.inference.drafts.lookup import Lookup
from mlxgpt.common.inference.generation import OnText, Result, Row
from mlxgpt.common.serve.engine import Engine
from mlxgpt.common.serve.work import Begun, Constraint, Counts, Piece, Served, Work
from mlxgpt.common.tokenizers.protocol import Tokenizer


def served_alone(
    model: Any,
    tokenizer: Tokenizer | None,
    ends: Collection[int | None],
    drafter: Make | None = None,
) -> Served:
    """A model that nobody asks for by name; ``ends``: every token that ends a text."""
    n_vocab = n_vocab_of(model.config, tokenizer)
    known = frozenset(end for end in ends if end is not None)
    return Served("", model, tokenizer, None, known, n_vocab, "", drafter=drafter)


def generate(
    name: str,
    model: Any,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str | Sequence[int]],
    sample: SampleConfig,
    stop: Sequence[str],
    on_text: OnText | None,
    bias: Mapping[int, float],
    draft: Any,
) -> list[Result]:
    """What generate of the backend ``name`` gives, with drafts: from the model ``draft``, or of None from the text.

    Raises:
        UserError: as generate's; or ``draft`` has other token ids.
        RunError: the model's logits are not finite.
    """
    backend, config = backends.load(name), model.config
    make: Make = Lookup
    if draft is not None:
        drafters.check_ids(draft.config, (config, tokenizer), "draft")
        make = drafters.of(backend, draft, (config, tokenizer))
    rows = generation.start_rows(config, tokenizer, prompts, stop)
    sampling.biases(bias, n_vocab_of(config, tokenizer))
    if not rows:
        return []
    models = [each for each in (model, draft) if each is not None]
    before = [each.training for each in models]
    for each in models:
        each.eval()
    try:
        served = served_alone(model, tokenizer, rows[0].ends, make)
        return Alone(backend, served, len(rows)).generate(rows, sample, on_text, bias)
    finally:
        for each, training in zip(models, before, strict=True):
            each.train(training)


class Alone:
    """An engine of one model.

    Args:
        backend: of the model.
        served: in evaluation mode, and prepared.
        rows: answers that are drawn together.
        cache_bytes: as the Engine's.
        kv_bits: of the cache: 8 or 4; 0 holds keys and values as they are.
    """

    def __init__(self, backend: Backend, served: Served, rows: int, cache_bytes: int = 0, kv_bits: int = 0) -> None:
        self._engine = Engine(
            backend, lambda: [served], max_batch=rows, max_queue=rows, cache_bytes=cache_bytes, kv_bits=kv_bits
        )
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
