"""A reward model as a reward: the score of a prompt and its completion, as mlxgpt score gives it."""

from collections.abc import Callable, Sequence

from mlxgpt.common.align import scoring
from mlxgpt.common.align.rl.prompts import Prompt
from mlxgpt.common.align.scoring import Item
from mlxgpt.common.backend import Backend
from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.inference import last_token
from mlxgpt.common.rows.row import Row


def open_scorer(backend: Backend, place: str, device: str) -> Callable[[Sequence[Prompt], Sequence[str]], list[float]]:
    """What scores (prompts, completions) with the reward model at ``place``.

    Raises:
        UserError: no reward model, or one without a tokenizer.
    """
    model, found = backend.load.load(place, device=device)
    if not model.config.scores:
        raise UserError(f"--reward {place}: {model.config.kind}: expected a reward model, of finetune --task reward")
    tokenizer = base_and_adapters.expect_tokenizer(found, place)
    pad = last_token.passed_over(base_and_adapters.find_base(place)[0], tokenizer)

    def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        items = [_item(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        texts, _ = scoring.encode(items, TuneConfig(), tokenizer, model.config, pad)
        return scoring.score(backend, model, texts).tolist()

    return score


def _item(prompt: Prompt, text: str) -> Item:
    """A prompt and what answered it."""
    if prompt.messages is None:
        return Item(prompt.where, "completion", (Row(prompt.where, text=prompt.text, answer=text),))
    messages = (*map(dict, prompt.messages), {"role": "assistant", "content": text})
    train = (*(False for _ in prompt.messages), True)
    return Item(prompt.where, "chat", (Row(prompt.where, messages=messages, train=train),))
