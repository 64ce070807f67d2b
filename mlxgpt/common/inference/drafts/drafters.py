"""What --lookup and --draft make, and lookup and draft in Python: drafters for the models that are to draw."""

from collections.abc import Callable, Sequence
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters, model_folder
from mlxgpt.common.inference.drafting import Drafter
from mlxgpt.common.inference.drafts.draft_model import DraftModel
from mlxgpt.common.inference.drafts.lookup import Lookup
from mlxgpt.common.tokenizers import load as tokenizers
from mlxgpt.common.tokenizers.protocol import Tokenizer

Make = Callable[[], Drafter]
"""Makes a drafter in the thread that computes."""
Target = tuple[ModelConfig, Tokenizer | None]
"""A model that drafts are for."""


def n_vocab_of(config: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """How many tokens may be drawn."""
    return min(tokenizer.n_vocab, config.vocab_size) if tokenizer else config.vocab_size


def load(
    backend: Backend, lookup: bool, draft: str | None, targets: Sequence[Target], device: str
) -> list[Make | None]:
    """A drafter for each model: from the text with ``lookup``, from the model in ``draft``, or none.

    Raises:
        UserError: there is no such model, it is an adapter or a classifier, or it has another tokenizer or other token
            ids than one of the models.
    """
    if not draft:
        return [Lookup if lookup else None for _ in targets]
    where = f"--draft {draft}"
    place, adapters = base_and_adapters.find_base(draft)
    if adapters:
        raise UserError(f"{where}: an adapter of {place}; expected a model: mlxgpt fuse makes one of both")
    config, tokenizer = model_folder.read_config(place), tokenizers.load_last([place])
    base_and_adapters.expect_task(config, where)
    for target in targets:
        check((config, tokenizer), target, where)
    model, _ = backend.load.load(draft, device=device)
    backend.generate.prepare(model)
    return [of(backend, model, target) for target in targets]


def of(backend: Backend, model: Any, target: Target) -> Make:
    """A drafter from a model that fits."""
    return lambda: DraftModel(backend, model, n_vocab_of(*target), target[0])


def check(draft: Target, target: Target, where: str) -> None:
    """Raises UserError where a model cannot draft for another: their tokens must be the same."""
    found, expected = (each and f"tokenizer {each.digest[:12]}" for _, each in (draft, target))
    if found != expected:
        raise UserError(f"{where}: {found or 'no tokenizer'}; expected the model's own, {expected or 'none'}")
    check_ids(draft[0], target, where)


def check_ids(draft: ModelConfig, target: Target, where: str) -> None:
    """Raises UserError where a draft could not draw all tokens, or others; without a tokenizer ids must be as many."""
    drawn = n_vocab_of(*target)
    if draft.vocab_size < drawn or (target[1] is None and draft.vocab_size != drawn):
        raise UserError(f"{where}: {draft.vocab_size} token ids; expected the model's {drawn}")
