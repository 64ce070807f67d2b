"""A reward model as a reward: the score of a prompt and its completion, by the text's last token."""

from collections.abc import Callable, Sequence

import numpy as np

from mlxgpt.common.align.rl.prompts import Prompt
from mlxgpt.common.backend import Backend
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.sft.pack import bucket
from mlxgpt.common.sft.template import Template, template_of
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.protocol import Tokenizer

ROWS = 16  # texts that are scored at once


def open_scorer(
    backend: Backend, place: str, device: str, raw: bool
) -> Callable[[Sequence[Prompt], Sequence[str]], list[float]]:
    """What scores (prompts, completions) with the reward model at ``place``.

    Raises:
        UserError: no reward model, or one without a tokenizer.
    """
    model, found = backend.load.load(place, device=device)
    tokenizer = base_and_adapters.expect_tokenizer(found, place)
    if len(model.config.labels) != 1:
        what = f"a classifier of {len(model.config.labels)} labels" if model.config.labels else "a language model"
        raise UserError(f"--reward {place}: {what}: expected a reward model, of mlxgpt finetune --task reward")
    template = None if raw else template_of(tokenizer, f"{place}: chat template")

    def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        rows = [encoded(tokenizer, template, prompt, text, model.config.block_size) for prompt, text in pairs]
        order, made = sorted(range(len(rows)), key=lambda row: len(rows[row])), np.zeros(len(rows))
        for start in range(0, len(order), ROWS):
            piece = order[start : start + ROWS]
            width = bucket(max(len(rows[row]) for row in piece), model.config.block_size)
            tokens = np.zeros((len(piece), width), np.int32)
            for at, row in enumerate(piece):
                tokens[at, : len(rows[row])] = rows[row]
            lengths = np.array([len(rows[row]) for row in piece], np.int32)
            made[piece] = backend.generate.classify(model, tokens, lengths)[:, 0]
        return made.tolist()

    return score


def encoded(tokenizer: Tokenizer, template: Template | None, prompt: Prompt, text: str, most: int) -> list[int]:
    """The tokens of a prompt and its completion, ended; of more than ``most`` the last."""
    if template:
        asked = prompt.messages or ({"role": "user", "content": prompt.text},)
        ids = template.encode([*map(dict, asked), {"role": "assistant", "content": text}], typed=True)
    else:
        ids = beginning.start(tokenizer, prompt.text) + list(tokenizer.encode(text))
        if tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
    return ids[-most:]
