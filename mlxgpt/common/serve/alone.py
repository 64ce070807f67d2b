"""The engine without a server: prompts whose answers follow a JSON Schema, for one command."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError
from mlxgpt.common.inference.choosing import Chosen
from mlxgpt.common.inference.generation import OnText, Result, Row
from mlxgpt.common.serve.engine import Engine
from mlxgpt.common.serve.guided.guide import Guide
from mlxgpt.common.serve.work import Begun, Piece, Served, Work


class Alone:
    """An engine that is asked once.

    Args:
        backend: of the model.
        load: makes the model, in the engine's thread, and prepares it.
        rows: answers that are drawn together.
        kv_bits: of the cache: 8 or 4; 0 holds keys and values as they are.
    """

    def __init__(self, backend: Backend, load: Callable[[], Served], rows: int, kv_bits: int = 0) -> None:
        self._engine = Engine(backend, lambda: [load()], max_batch=rows, max_queue=rows, kv_bits=kv_bits)

    def __enter__(self) -> Served:
        self._engine.start()
        return next(iter(self._engine.served.values()))

    def __exit__(self, *_: object) -> None:
        self._engine.stop(drain=False)
        self._engine.join()

    def generate(
        self,
        served: Served,
        rows: Sequence[Row],
        sample: SampleConfig,
        schema: Any,
        on_text: OnText,
        bias: Mapping[int, float],
        logprobs: int | None = None,
    ) -> list[Result]:
        """What generate gives for rows, each answer JSON of the schema, or cut where max_tokens or the context end.

        Raises:
            UserError: no schema, or none that can be enforced.
            RunError: the model's logits are not finite.
        """
        constrain, answers = Guide(served).schema(schema), [_Answer(row.index, on_text) for row in rows]
        for row, answer in zip(rows, answers, strict=True):
            work = Work(served, row.prompt, sample, answer.say, (row.copy,), row.stop, bias, constrain, logprobs)
            self._engine.submit(work)
        return [answer.wait(len(row.prompt)) for row, answer in zip(rows, answers, strict=True)]


class _Answer:
    """What is said of a Work of one choice."""

    def __init__(self, index: int, on_text: OnText) -> None:
        self._index, self._on_text = index, on_text
        self._pieces: list[Piece] = []
        self._done = threading.Event()

    def say(self, said: Begun | Piece) -> None:
        """Called in the engine's thread."""
        if isinstance(said, Begun):
            return
        self._pieces.append(said)
        if said.text:
            self._on_text(self._index, said.text)
        if said.reason or said.error:
            self._done.set()

    def wait(self, prompt_tokens: int) -> Result:
        """The whole answer."""
        self._done.wait()
        last, drawn = self._pieces[-1], [each for piece in self._pieces for each in piece.drawn]
        if last.error:
            raise RunError(f"prompt {self._index + 1}: {last.error}")
        asked = [Chosen(each.token, each.logprob, each.top) for each in drawn if each.logprob is not None]
        text = "".join(piece.text for piece in self._pieces)
        return Result(text, [each.token for each in drawn], prompt_tokens, last.reason, asked)
