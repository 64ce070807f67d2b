"""An engine with tiny models, and a client of it that waits."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from decoding import make_config, make_model

from mlxgpt.common import backend as backends
from mlxgpt.common.config import ModelConfig, SampleConfig
from mlxgpt.common.serve.engine import Engine
from mlxgpt.common.serve.work import Begun, Piece, Served, Work

WAIT = 60  # seconds after which a test gives up


class Answer:
    """What came of a Work; ``text``, ``tokens`` and ``reasons`` a choice each."""

    def __init__(self, count: int) -> None:
        self.begun: Begun | None = None
        self.pieces: list[Piece] = []
        self.done = threading.Event()
        self.texts, self.tokens = [""] * count, [[] for _ in range(count)]
        self.reasons, self.errors = [""] * count, [""] * count
        self.heard: Callable[[Any], None] = lambda said: None

    def say(self, said: Begun | Piece) -> None:
        self.heard(said)
        if isinstance(said, Begun):
            assert self.begun is None and not self.pieces
            self.begun = said
            return
        self.pieces.append(said)
        assert not self.reasons[said.choice] and not self.errors[said.choice], "something after the last word"
        self.texts[said.choice] += said.text
        self.tokens[said.choice] += [drawn.token for drawn in said.drawn]
        self.reasons[said.choice], self.errors[said.choice] = said.reason, said.error
        if all(map(any, zip(self.reasons, self.errors, strict=True))):
            self.done.set()

    def wait(self) -> "Answer":
        assert self.done.wait(WAIT), "no answer"
        return self


def asked(served: Served, prompt: Sequence[int], sample: SampleConfig, **more: Any) -> tuple[Work, Answer]:
    answer = Answer(len(more.get("copies", (0,))))
    return Work(served, prompt, sample, answer.say, **more), answer


def submit(engine: Engine, served: Served, prompt: Sequence[int], sample: SampleConfig, **more: Any) -> Answer:
    work, answer = asked(served, prompt, sample, **more)
    engine.submit(work)
    return answer


def served_model(
    backend: str, config: ModelConfig | None = None, name: str = "tiny", tokenizer: Any = None, **more: Any
) -> Served:
    model = make_model(backend, config or make_config("llama"))
    model.eval()
    n_vocab = min(tokenizer.n_vocab, model.config.vocab_size) if tokenizer else model.config.vocab_size
    ends = frozenset(more.pop("ends", ()))
    return Served(name, model, tokenizer, more.pop("template", None), ends, n_vocab, "0" * 64)


@contextmanager
def running(backend: str, *makers: Callable[[], Served], **more: Any) -> Iterator[Engine]:
    engine = Engine(backends.load(backend), lambda: [make() for make in makers], **more)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(drain=False)
        assert engine.join(WAIT)
