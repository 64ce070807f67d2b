"""The engine of mlxgpt serve: what a request gets alone it gets in any company, in both frameworks."""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from decoding import BACKENDS, GENERATE, P, V, make_config, some_tokens
from serving import WAIT, Answer, asked, running, served_model, submit

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.engine import Engine
from mlxgpt.common.serve.engine.prefixes import Prefixes
from mlxgpt.common.serve.work import Busy, Stopped

ENDS = (7,)
MANY = 1 << 20  # bytes


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with running(request.param, lambda: served_model(request.param, ends=ENDS), max_batch=6) as made:
        yield made


def requests(count: int, seed: int = 0) -> list[tuple[list[int], SampleConfig, dict[str, Any]]]:
    """Prompts of all lengths, each with settings of its own."""
    rng, made = np.random.default_rng(seed), []
    for number in range(count):
        sample = SampleConfig(
            max_tokens=int(rng.integers(1, 30)),
            temperature=float(rng.choice([0, 0.7, 1.3])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1, 0.9])),
            min_p=float(rng.choice([0, 0.05])),
            repetition_penalty=float(rng.choice([1, 1.2])),
            presence_penalty=float(rng.choice([0, 0.5])),
            frequency_penalty=float(rng.choice([0, -0.3])),
            seed=int(rng.integers(1000)),
        )
        bias = {int(rng.integers(V)): 2.5} if number % 4 == 0 else {}
        made.append((some_tokens(int(rng.integers(1, P)), number), sample, {"bias": bias}))
    return made


def alone(backend: str, engine: Engine, prompt: list[int], sample: SampleConfig, bias: dict[int, float]) -> Any:
    served = next(iter(engine.served.values()))
    model = served_model(backend, served.model.config, ends=ENDS).model
    return GENERATE[backend].generate(model, None, [prompt], sample, ends=ENDS, bias=bias)[0]


def name_of(engine: Engine) -> str:
    return engine._backend.name


def test_a_request_gets_in_any_batch_what_it_gets_alone(engine: Engine) -> None:
    served, cases = engine.served["tiny"], requests(24)
    answers = [submit(engine, served, prompt, sample, **more) for prompt, sample, more in cases]
    reasons = set()
    for (prompt, sample, more), answer in zip(cases, answers, strict=True):
        found = alone(name_of(engine), engine, prompt, sample, more["bias"])
        assert answer.wait().tokens == [found.tokens]
        assert answer.reasons == [found.finish_reason]
        reasons.add(found.finish_reason)
    assert reasons == {"eos", "length", "context"}
    assert engine.counts.running == engine.counts.waiting == 0
