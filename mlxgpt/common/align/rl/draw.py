"""Completions of prompts: drawn by addressed sampling, all rows together, each prompt read once for its whole group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.common.align_config import RLConfig
from mlxgpt.common.backend import Backend
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError
from mlxgpt.common.inference import choosing, sampling
from mlxgpt.common.inference.choosing import Choice
from mlxgpt.common.inference.generation import Row
from mlxgpt.common.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Drawn:
    """One completion."""

    ids: tuple[int, ...]  # with the token that ended it
    ended: bool  # by such a token; else it was cut at max_tokens
    text: str  # without that token


def settings(config: RLConfig, seed: int) -> SampleConfig:
    """How completions are drawn: from the whole distribution at rl.temperature."""
    return SampleConfig(prompt="", max_tokens=config.max_tokens, temperature=config.temperature, seed=seed)


def vocabulary(model: Any, tokenizer: Tokenizer) -> int:
    """Tokens that may be drawn: the tokenizer's, at most the model's."""
    return min(tokenizer.n_vocab, model.config.vocab_size)


def copies(prompts: Sequence[Sequence[int]], each: int) -> list[list[int]]:
    """Of each prompt's ``each`` completions, which repetition of an equal prompt it is: the noise's address has it."""
    found, seen = [], {}
    for prompt in map(tuple, prompts):
        start = seen.get(prompt, 0)
        found.append(list(range(start, start + each)))
        seen[prompt] = start + each
    return found


def draw(
    backend: Backend,
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    each: int,
    sample: SampleConfig,
    rows: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[Drawn]:
    """``each`` completions of every prompt, a prompt's behind each other; ``rows``: groups drawn at once, 0 = all.

    A completion is what backend.generate draws with this seed for that repetition of the prompt.

    Raises:
        RunError: the model's logits are not finite.
    """
    training = model.training
    model.eval()
    try:
        found: list[Drawn] = []
        numbers, step = copies(prompts, each), rows or max(1, len(prompts))
        for start in range(0, len(prompts), step):
            say(f"drawing for prompt {start + 1} of {len(prompts)}")
            piece = slice(start, start + step)
            found += _together(backend, model, tokenizer, prompts[piece], numbers[piece], sample)
        return found
    finally:
        model.train(training)


def _together(
    backend: Backend,
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    copies: Sequence[Sequence[int]],
    sample: SampleConfig,
) -> list[Drawn]:
    n_vocab, width = vocabulary(model, tokenizer), backend.generate.PREFILL
    batch, rows = backend.batching.Batch(model, n_vocab), []
    for index, (prompt, numbers) in enumerate(zip(prompts, copies, strict=True)):
        read = backend.batching.Prompt(model, prompt, n_vocab)
        while read.left:
            read.read(width)
        batch.join(read, len(numbers))
        rows += [Row(index, list(prompt), number, tokenizer, ()) for number in numbers]
    settings = choosing.settings(sample)
    keys = sampling.each_step_keys(sample.seed, [row.copy for row in rows], sample.max_tokens)
    going = list(range(len(rows)))  # rows of the batch, in its order
    for _ in range(sample.max_tokens):
        now = next(keys)
        drawn = batch.draw([Choice(settings, int(now[row])) for row in going])
        for row, chosen in zip(going, drawn.read(), strict=True):
            if chosen.token < 0:
                raise RunError(
                    f"the model's logits are not finite behind {len(rows[row].tokens)} tokens of a completion"
                )
            rows[row].add(chosen.token, sample.max_tokens, sample.max_tokens)
        kept = [place for place, row in enumerate(going) if not rows[row].reason]
        going = [going[place] for place in kept]
        if not going:
            break
        batch.go_on(drawn, kept)
    return [_drawn(row) for row in rows]


def _drawn(row: Row) -> Drawn:
    end = () if row.end is None else (row.end,)
    return Drawn((*row.tokens, *end), row.end is not None, row.text)


def noise(seed: int, copy: int, step: int, size: int) -> np.ndarray:
    """The noise (size,) float32 on the logits of one draw."""
    return sampling.gumbel(sampling.keys(seed, copy, step, 1), size)[0]
