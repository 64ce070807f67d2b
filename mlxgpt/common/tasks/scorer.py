"""A model that tasks ask: texts become the ids that lm-evaluation-harness makes of them, and a backend scores those."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.tasks import reading
from mlxgpt.common.tasks.task import Continued
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.protocol import Tokenizer

BOS = ("auto", "yes", "no")
_END = 40  # characters of a text that an error shows


def _quiet(text: str) -> None:
    pass


class ModelScorer:
    """See ``Scorer`` in task.py. What the tokenizer puts after a text, if anything, is left out.

    Args:
        backend: whose model it is.
        model: what ``load`` gave, adapters included.
        tokenizer: of the model.
        bos: ``yes`` and ``no`` are what lm-evaluation-harness does with add_bos_token; ``auto``: as the tokenizer does.
        render: makes of each context the text that the model reads, such as a chat template; None: as it is.
        rows: that pass through the model at once; no number depends on it.
        kv_bits: of keys and values, as a cache of 8 or 4 bits gives them; 0: as they are.

    Raises:
        UserError: ``bos`` is ``yes``, and the tokenizer names no BOS.
    """

    def __init__(
        self,
        backend: Backend,
        model: Any,
        tokenizer: Tokenizer,
        bos: str = "auto",
        render: Callable[[str], str] | None = None,
        rows: int = reading.ROWS,
        kv_bits: int = 0,
    ):
        self.context, self.cut, self._kv_bits = model.config.block_size, 0, kv_bits
        self.chat = render is not None
        self._backend, self._model, self._tokenizer, self._render, self._rows = backend, model, tokenizer, render, rows
        ids = [tokenizer.id_of(tokenizer.named.get(name, "")) for name in ("bos_token", "eos_token")]
        self.prefix = next((each for each in (*ids, tokenizer.eos_id) if each is not None), None)
        """What stands before a text that is scored from its first token: BOS, else the end-of-text token, else None."""
        self.begins_with = {"auto": beginning.begins_with(tokenizer), "no": []}.get(bos, [])
        """The ids before every context."""
        if bos == "yes":
            if ids[0] is None:
                raise UserError("--bos yes: the tokenizer names no BOS: expected auto or no")
            self.begins_with = beginning.begins_with(tokenizer) or [ids[0]]

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both. The whole is encoded, then split where the context's ids end; white space moves as in the class
        TemplateLM of lm-evaluation-harness 0.4.13.

        Raises:
            UserError: a character that the tokenizer does not have; nothing is left of the continuation; no context,
                and no token that stands for one; a continuation longer than the model's context.
        """
        text = self._render(context) if self._render else context
        before: list[int] = []
        if text:
            before = self._ids(text.rstrip())
            ids = self._ids(text + continuation)[len(before) :]
        else:
            ids = self._tokenizer.encode(continuation)
        if not before:  # their own first token stands for the context where it is the prefix, or there is none
            alone = ids[:1] == [self.prefix]
            before, ids = (ids[:1], ids[1:]) if alone or self.prefix is None else ([self.prefix], ids)
        if not before or not ids:
            missing = "the answer" if before else "the context"
            raise UserError(
                f"{missing} has no token of its own: found ...{context[-_END:]!r} and {continuation[:_END]!r}"
            )
        self._expect_fits(ids)
        return before, ids

    def continuations(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], say: Callable[[str], None] = _quiet
    ) -> list[Continued]:
        """What the model says of (context, continuation) in ids; equal ones are asked once.

        Raises:
            UserError: an id that the vocabulary lacks, or a continuation longer than the context.
            RunError: the model's logits are not finite.
        """
        groups: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        places = []
        for context, continuation in pairs:
            left = self._fitting(context, continuation)
            found = groups.setdefault(left, {})
            places.append((left, found.setdefault(tuple(continuation), len(found))))
        asked = [reading.Group(context, list(found)) for context, found in groups.items()]
        told = self._backend.scoring.continuations(self._model, asked, self._rows, say, self._kv_bits)
        made = dict(zip(groups, told, strict=True))
        result = [made[context][number] for context, number in places]
        wrong = next((n for n, each in enumerate(result) if not math.isfinite(each.logprob)), None)
        if wrong is not None:
            raise RunError(f"answer {wrong + 1}: the model's logits are not finite")
        return result

    def texts(self, texts: Sequence[str], say: Callable[[str], None] = _quiet) -> list[float]:
        """Log-probability of each text behind ``prefix``, in windows of the context that overlap by a token.

        As loglikelihood_rolling of lm-evaluation-harness: a BOS of the text is a token of it. Where there is no
        prefix, the first token is given.
        """
        pairs, counts = [], []
        for text in texts:
            made = self._windows(self._ids(text))
            pairs += made
            counts.append(len(made))
        told = iter(self.continuations(pairs, say))
        return [sum((next(told).logprob for _ in range(count)), 0.0) for count in counts]

    def answers(
        self, contexts: Sequence[str], stop: Sequence[str], sample: SampleConfig, say: Callable[[str], None] = _quiet
    ) -> list[str]:
        """What the model writes behind each context, without a stop string; equal contexts get equal answers.

        A context loses its first tokens where ``sample.max_tokens`` would not fit behind it.

        Raises:
            UserError: ``sample.max_tokens`` leaves no room for a context.
            RunError: the model's logits are not finite.
        """
        room = self.context - sample.max_tokens
        if room < 1:
            raise UserError(
                f"max_tokens = {sample.max_tokens}: expected less than {self.context}, the model's context: a question "
                "must fit before the answer"
            )
        prompts = []
        for context in contexts:
            ids = self._ids(self._render(context) if self._render else context)
            ids = ids or ([] if self.prefix is None else [self.prefix])
            self.cut += len(ids) > room
            prompts.append(tuple(ids[-room:]))
        order = sorted(set(prompts), key=lambda ids: (len(ids), ids), reverse=True)
        made: dict[tuple[int, ...], str] = {}
        for start in range(0, len(order), self._rows):
            part = order[start : start + self._rows]
            found = self._backend.generate.generate(
                self._model, self._tokenizer, part, sample, stop, kv_bits=self._kv_bits
            )
            made |= {prompt: each.text for prompt, each in zip(part, found, strict=True)}
            say(f"{len(made)} of {len(order)} answers")
        return [made[prompt] for prompt in prompts]

    def _ids(self, text: str) -> list[int]:
        return beginning.begin(self.begins_with, self._tokenizer.encode(text)).tolist()

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """(context, continuation) of every token but a given one, once: the last window is as full as the first."""
        context, rest = (ids[:1], ids[1:]) if self.prefix is None else ([self.prefix], ids)
        made = [(context, rest[: self.context])] if rest else []
        all_ids = [*context, *rest]
        for start in range(self.context, len(rest), self.context):
            end = min(start + self.context, len(rest))
            first = end - self.context  # of the window's input, counted in all_ids
            made.append((all_ids[first : start + 1], rest[start:end]))
        return made

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """The end of a context that fits before all of the continuation but its last token."""
        size = self._model.config.vocab_size
        largest = max(*context, *continuation)
        if largest >= size:
            raise UserError(f"token id {largest}: expected below {size}, the model's vocabulary")
        self._expect_fits(continuation)
        room = self.context + 1 - len(continuation)
        self.cut += len(context) > room
        return tuple(context[-room:])

    def _expect_fits(self, continuation: Sequence[int]) -> None:
        if len(continuation) > self.context:
            raise UserError(f"an answer of {len(continuation)} tokens: the model's context holds {self.context}")
