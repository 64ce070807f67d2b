"""A conversation with a model: its messages, their tokens, and a cache, so that a turn costs its new tokens only.

What is held in the cache is compared with the conversation as the template renders it: what both begin with stays,
the rest is cut off and read again. Templates that rewrite what was said (Qwen3 drops its thinking) so stay exact.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.inference import generation
from mlxgpt.common.model import rotary
from mlxgpt.common.sft.template import Template
from mlxgpt.common.tokenizers.protocol import Tokenizer

RESERVE = 0.25  # of the context, at the most, that is kept free for an answer


@dataclasses.dataclass
class Answer:
    """What came of a turn."""

    text: str
    reason: str  # eos, length, context, or interrupted
    tokens: int  # drawn
    read: int  # tokens of the prompt that passed through the model
    held: int  # tokens of the prompt that the cache had
    dropped: int  # oldest messages left out of the prompt, for the context is full


class Conversation:
    """Messages and the model that answers them; ``system`` is the first message, if any; ``kv_bits`` of the cache."""

    def __init__(
        self,
        backend: Backend,
        model: Any,
        tokenizer: Tokenizer,
        template: Template,
        ends: set[int],
        system: str = "",
        kv_bits: int = 0,
    ) -> None:
        self._backend, self._model, self._tokenizer, self._template = backend, model, tokenizer, template
        self._ends = ends | {template.end_id}
        self._cache = backend.generate.make_cache(model, 1, model.config.block_size, kv_bits=kv_bits)
        self._held: list[int] = []  # ids whose keys and values are in the cache
        self._n_vocab = min(tokenizer.n_vocab, model.config.vocab_size)
        self.system = system
        self.messages: list[dict[str, Any]] = []  # user and assistant in turns

    def all(self) -> list[dict[str, Any]]:
        """The messages with the system prompt."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.messages

    def answer(
        self, text: str, sample: SampleConfig, on_text: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Answer:
        """The model's answer to ``text``; both join the messages, an interrupted answer as far as it came.

        Raises:
            UserError: ``text`` alone does not fit into the context, or the template refuses it.
            RunError: the logits are not finite.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids, dropped = self._prompt(sample)
            row = generation.start_rows(self._model.config, self._tokenizer, [ids], ())[0]
            row.ends |= self._ends
            # the seed moves on with the turns, so that a question asked twice draws anew
            turn = dataclasses.replace(sample, seed=sample.seed + len(self.messages) // 2)
            held = self._cut(ids)
            reason = self._draw(row, turn, on_text, stopped)
        except (UserError, RunError):
            self.messages = before
            raise
        self.messages.append({"role": "assistant", "content": row.text})
        return Answer(row.text, reason, len(row.tokens), len(ids) - held, held, dropped)

    def _prompt(self, sample: SampleConfig) -> tuple[list[int], int]:
        """The ids to answer, and how many of the oldest messages were dropped so that an answer has room."""
        size = self._model.config.block_size
        room = size - min(sample.max_tokens, int(RESERVE * size))
        dropped = 0
        ids = self._template.encode(self.all(), generation=True, typed=True)
        while len(ids) > room and len(self.messages) > 2:
            del self.messages[:2]
            dropped += 2
            ids = self._template.encode(self.all(), generation=True, typed=True)
        if len(ids) > size:
            raise UserError(f"{len(ids)} tokens with the system prompt: the model's context holds {size}")
        return ids, dropped

    def _cut(self, ids: list[int]) -> int:
        """Keeps of the cache what ``ids`` begin with; one token at least is read, for its logits."""
        pairs = zip(self._held, ids[:-1], strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self._held), len(ids) - 1))
        config = self._model.config
        if rotary.by_length(config) and max(len(self._held), len(ids) - 1) >= config.rope_original:
            same = 0  # keys of another length turn at other frequencies
        same = same if all(layer.reaches(same) for layer in self._cache) else 0  # a window has passed what it needs
        for layer in self._cache:
            layer.cut(same)
        del self._held[same:]
        return same

    def _draw(
        self, row: generation.Row, sample: SampleConfig, on_text: Callable[[str], None], stopped: Callable[[], bool]
    ) -> str:
        """Draws until the answer ends, and why it did."""
        config, drawn = self._model.config, list(row.prompt)
        steps = self._backend.generate.decode(self._model, [row], sample, self._n_vocab, self._cache)
        try:
            for tokens, _ in steps:
                drawn += tokens
                if generation.advance(config, [row], tokens, sample, lambda _, piece: on_text(piece)) or stopped():
                    break
        finally:
            steps.close()
            self._held = drawn[: self._cache[0].offset]
            for layer in self._cache:
                layer.cut(len(self._held))  # a step that was queued ahead does not count
        return row.reason or "interrupted"

    def save(self) -> dict[str, Any]:
        """The conversation as a row of chat data."""
        return {"messages": self.all()}

    def restore(self, row: Any, where: str) -> None:
        """Goes on from what ``save`` gave.

        Raises:
            UserError: it is no list of messages in turns.
        """
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise UserError(f"{where}: expected messages, each with role and content, as /save writes them")
        first = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        rest = messages[bool(first) :]
        if [m["role"] for m in rest] != ["user", "assistant"] * (len(rest) // 2):
            raise UserError(f"{where}: expected user and assistant in turns after the system prompt")
        self.system, self.messages = first, [{"role": m["role"], "content": m["content"]} for m in rest]
