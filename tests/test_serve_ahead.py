"""Drafts in the engine of mlxgpt serve: whatever they say, a request gets what it gets without them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from decoding import BACKENDS, GENERATE, P, V, make_config, some_tokens
from serving import running, served_model, submit

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.inference import drafting
from mlxgpt.common.inference.drafting import Drawing

ENDS = (7,)
POSITIONS: dict[str, dict[str, Any]] = {
    "rope": {},
    "longrope": {"rope_scaling": "longrope", "rope_original": 20, "rope_long": [4.0] * 4, "rope_short": [1.0] * 4},
    "dynamic": {"rope_scaling": "dynamic", "rope_original": 20, "rope_factor": 2.0},
    "window": {"window": 6, "window_layers": [0]},
    "alibi": {"position": "alibi", "family": "mlxgpt"},
    "learned": {"position": "learned", "family": "mlxgpt"},
}


class Knowing:
    """Drafts what each row will draw, and lies now and then; checks what it is told."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], seed: int) -> None:
        self.texts, self.rng, self.known = texts, np.random.default_rng(seed), list[list[int]]()
        self.right = 0

    @property
    def hot(self) -> bool:
        return bool(self.rng.random() < 0.8)

    def join(self, rows: Sequence[Drawing]) -> None:
        self.known += [list(row.ids) for row in rows]

    def keep(self, rows: Sequence[int]) -> None:
        self.known = [self.known[row] for row in rows]

    def take(self, row: int, tokens: Sequence[int]) -> None:
        self.known[row] += tokens

    def propose(self, rows: Sequence[Drawing], most: Sequence[int]) -> list[list[int]]:
        assert [list(row.ids) for row in rows] == self.known
        made = []
        for row, limit in zip(rows, most, strict=True):
            text = next(text for text in self.texts.values() if text[: len(row.ids)] == list(row.ids))
            rest = text[len(row.ids) :][: min(limit, int(self.rng.integers(0, 6)))]
            wrong = int(self.rng.integers(2 * len(rest) + 1))
            self.right += min(wrong, len(rest))
            if wrong < len(rest):
                rest[wrong] = (rest[wrong] + 1) % V
            made.append(rest)
        return made


def cases(count: int) -> list[tuple[list[int], SampleConfig, dict[str, Any]]]:
    rng, made = np.random.default_rng(1), []
    for number in range(count):
        sample = SampleConfig(
            max_tokens=int(rng.integers(1, 30)),
            temperature=float(rng.choice([0, 0.7, 1.3])),
            top_p=float(rng.choice([1, 0.9])),
            repetition_penalty=float(rng.choice([1, 1.2])),
            presence_penalty=float(rng.choice([0, 1.5])),
            frequency_penalty=float(rng.choice([0, -1.9])),
            seed=int(rng.integers(1000)),
        )
        more = {"bias": {int(rng.integers(V)): 2.5}} if number % 4 == 0 else {}
        made.append(([number, *some_tokens(int(rng.integers(1, P // 2)), number)], sample, more))
    return made


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_change_nothing(backend: str, kind: str) -> None:
    choices = dict(POSITIONS[kind])
    config = make_config(choices.pop("family", "llama"), **choices)
    model, texts, expected = served_model(backend, config).model, {}, []
    for prompt, sample, more in (asked := cases(8)):
        found = GENERATE[backend].generate(model, None, [prompt], sample, ends=ENDS, top=2, **more)[0]
        expected.append(found)
        end = [*ENDS] if found.finish_reason == "eos" else []
        texts[tuple(prompt)] = [*prompt, *found.tokens, *end]
    drafter = Knowing(texts, 5)

    def load() -> Any:
        return dataclasses.replace(served_model(backend, config, ends=ENDS), drafter=lambda: drafter)

    with running(backend, load, max_batch=5, cache_bytes=1 << 20) as engine:
        served = engine.served["tiny"]
        answers = [submit(engine, served, prompt, sample, logprobs=2, **more) for prompt, sample, more in asked]
        for found, answer in zip(expected, answers, strict=True):
            assert (answer.wait().tokens[0], answer.reasons[0]) == (found.tokens, found.finish_reason)
            said = [each.logprob or 0 for piece in answer.pieces for each in piece.drawn]
            # weights are six times the usual, and logits reach 40: 1.4e-4 was seen
            np.testing.assert_allclose(said, [each.logprob or 0 for each in found.logprobs], atol=5e-4)
        once = SampleConfig(max_tokens=1, temperature=0.0)
        for (prompt, _, _), found in zip(asked, expected, strict=True):  # what rows left behind is as if read
            longer = [*prompt, *found.tokens][: P - 1]
            again = submit(engine, served, longer, once).wait()
            assert again.tokens[0] == GENERATE[backend].generate(model, None, [longer], once, ends=ENDS)[0].tokens
        counts = engine.counts
    assert counts.cache_hits >= 3
    assert counts.accepted_tokens == drafter.right > (2 if "rope_original" in choices else 15)
    assert counts.drafted_tokens > counts.accepted_tokens


def test_a_draft_has_room() -> None:
    config = make_config("llama")
    assert drafting.room(config, [P, 3], [9, 9], None) == [0, 0]
    assert drafting.room(config, [P - 2, 3], [9, 1], None) == [2, 1]
    assert drafting.room(config, [5, 3], [9, 0], 7) == [2, 0]
