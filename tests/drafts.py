"""Texts that are drawn with drafts beside texts that are drawn without."""

from typing import Any

import pytest
from decoding import GENERATE
from hypothesis import strategies as st

from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.inference import generation
from mlxgpt.common.inference.drafts import worth
from mlxgpt.common.inference.generation import Result
from mlxgpt.common.serve.alone import Alone, served_alone
from mlxgpt.common.serve.work import Counts

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.5, "top_k": 9, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.4, "frequency_penalty": 0.3},
]


class Row:
    """A Drawing of which a test says what it drew."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def after(self, tokens: Any) -> Any:
        raise AssertionError("nothing draws here")


def plain(backend: str, model: Any, tokenizer: Any, prompts: Any, sample: SampleConfig, **more: Any) -> list[Result]:
    """One by one."""
    names = {"bias": {}, "top": None, "ends": (), "stop": ()} | more
    return GENERATE[backend].generate(model, tokenizer, prompts, sample, **names)


def drafted(
    backend: str, model: Any, tokenizer: Any, prompts: Any, sample: SampleConfig, drafter: Any, rows: int, **more: Any
) -> tuple[list[Result], Counts]:
    """With drafts, so many rows at once; and what the engine counted."""
    given = generation.start_rows(model.config, tokenizer, prompts, more.get("stop", ()), more.get("ends", ()))
    served = served_alone(model.eval(), tokenizer, given[0].ends, drafter)
    engine = Alone(backends.load(backend), served, len(given))
    engine._engine._max_batch = rows  # the others wait, and join as rows leave
    return engine.generate(given, sample, None, more.get("bias", {}), more.get("top")), engine.counts


def same(one: list[Result], two: list[Result]) -> None:
    """Token for token, with text, reason and the tokens that were named; log-probabilities as near as rounding."""
    for a, b in zip(one, two, strict=True):
        assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
        assert [each.token for each in a.logprobs] == [each.token for each in b.logprobs]
        for left, right in zip(a.logprobs, b.logprobs, strict=True):
            # weights are six times the usual, and logits reach 40: 1.4e-4 was seen
            assert abs((left.logprob or 0) - (right.logprob or 0)) < 5e-4


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts pay, however seldom they are right."""
    monkeypatch.setattr(worth, "cost", lambda rows, width: 0.1)


def ragged(most: int = 30) -> st.SearchStrategy[list[list[int]]]:
    """Prompts of few different tokens, so that they repeat themselves."""
    return st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=most), min_size=1, max_size=4)
