"""What mlxgpt serve answers is what generate writes, in both backends: tokens, text, reasons and probabilities."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from decoding import BACKENDS, GENERATE, logits_of, make_config
from serving import running, served_model

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.serve.api.service import Service
from mlxgpt.common.serve.engine import Engine
from mlxgpt.common.serve.web.settings import Settings
from mlxgpt.common.sft.template import CHATML, Template, with_chatml
from mlxgpt.common.tokenizers.hf import made_of_bytes

TOKENIZER = with_chatml(made_of_bytes())
END = TOKENIZER.eos_id
ASK = [{"role": "user", "content": "Hi"}]


def model_of(backend: str) -> Any:
    template = Template({"default": CHATML}, TOKENIZER, TOKENIZER.named, "chatml")
    config = make_config("llama", TOKENIZER.n_vocab)
    return served_model(backend, config, "tiny", TOKENIZER, template=template, ends=[END])


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with running(request.param, lambda: model_of(request.param), max_batch=4, cache_bytes=1 << 20) as made:
        yield made


def ask(engine: Engine, kind: str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to requests that come at once."""

    async def every() -> list[dict[str, Any]]:
        service = Service(engine)
        answers = await asyncio.gather(*(getattr(service, kind)(given) for given in requests))
        made = []
        for answer in answers:
            if answer.streams:
                text = b"".join([part async for part in answer.body]).decode()
                events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: {")]
                made.append({"events": [json.loads(event) for event in events]})
            else:
                made.append(json.loads(answer.body))
        return made

    return asyncio.run(every())


def expected(engine: Engine, prompts: list[Any], sample: SampleConfig, stop: tuple[str, ...] = ()) -> list[Any]:
    backend = engine._backend.name
    model = model_of(backend).model
    return GENERATE[backend].generate(model, TOKENIZER, prompts, sample, stop)


REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 12},
    {"temperature": 1.3, "max_tokens": 9, "seed": 5},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 2**63, "max_tokens": 30},
    {"temperature": 1, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25, "seed": 9},
]


def test_a_seeded_request_is_what_generate_writes(engine: Engine) -> None:
    prompts = ["Once", "hä", "x" * 20, "Once"]
    given = [{"prompt": prompt, "model": "tiny", **more} for prompt in prompts for more in SETTINGS]
    answers = ask(engine, "completions", *given)
    reasons = set()
    for one, answer in zip(given, answers, strict=True):
        sample = SampleConfig(**{"max_tokens": 99, **{key: one[key] for key in one if key not in ("prompt", "model")}})
        alone = expected(engine, [one["prompt"]], sample)[0]
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (alone.text, REASONS[alone.finish_reason])
        assert answer["usage"]["completion_tokens"] == len(alone.tokens)
        reasons.add(alone.finish_reason)
    assert reasons >= {"length", "context"}


def test_choices_are_equal_prompts_of_generate(engine: Engine) -> None:
    sample = SampleConfig(max_tokens=8, temperature=1.0, seed=7)
    alone = [one.text for one in expected(engine, ["ab"] * 4, sample)]
    given = {"prompt": "ab", "seed": 7, "max_tokens": 8}
    three, four, two = ask(
        engine,
        "completions",
        {**given, "n": 3},
        {**given, "prompt": ["ab"] * 4},
        {**given, "prompt": [[97, 98], [97, 98]], "n": 2},
    )
    assert len(set(alone)) == 4
    assert [one["text"] for one in three["choices"]] == alone[:3]
    assert [one["text"] for one in four["choices"]] == [one["text"] for one in two["choices"]] == alone


def test_a_stream_is_the_whole_in_pieces(engine: Engine) -> None:
    given = {"messages": ASK, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 1, "max_tokens": 14}
    whole, streamed = ask(engine, "chat", given, {**given, "stream": True})
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    alone = expected(engine, [TOKENIZER.encode(prompt)] * 2, SampleConfig(max_tokens=14, temperature=1, seed=3))
    for index, choice in enumerate(whole["choices"]):
        own = [event["choices"][0] for event in streamed["events"] if event["choices"][0]["index"] == index]
        assert choice["message"]["content"] == alone[index].text
        assert "".join(one["delta"].get("content", "") for one in own) == alone[index].text
        entries = [entry for one in own if one["logprobs"] for entry in one["logprobs"]["content"]]
        said = choice["logprobs"]["content"]
        assert [one["token"] for one in entries] == [one["token"] for one in said]
        scores = [[one["logprob"] for one in kind] for kind in (entries, said)]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)  # rounding: the width of the batch decides it
        assert [byte for entry in entries for byte in entry["bytes"]] == [
            byte for token in alone[index].tokens for byte in TOKENIZER.bytes_of(token)
        ]


def test_a_stop_string_ends_the_text_and_its_tokens(engine: Engine) -> None:
    sample = SampleConfig(max_tokens=20, temperature=1.0, seed=11)
    free = expected(engine, ["ab"], sample)[0].text
    stop = free[4:6]
    alone = expected(engine, ["ab"], sample, (stop,))[0]
    given = {"prompt": "ab", "seed": 11, "max_tokens": 20, "stop": ["never here", stop], "logprobs": 0}
    choice = ask(engine, "completions", given)[0]["choices"][0]
    assert (choice["text"], choice["finish_reason"], alone.finish_reason) == (alone.text, "stop", "stop")
    assert stop not in choice["text"]
    assert all(start < len(choice["text"]) for start in choice["logprobs"]["text_offset"])


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    """Of prompt and answer, whatever bias and temperature; the likeliest first."""
    backend, bias = engine._backend.name, {"65": 100}
    given = {"prompt": [104, 105], "echo": True, "logprobs": 3, "max_tokens": 3, "logit_bias": bias, "temperature": 0}
    choice = ask(engine, "completions", given)[0]["choices"][0]
    assert choice["text"] == "hiAAA"
    ids = [104, 105, 65, 65, 65]
    logits = logits_of(backend, model_of(backend).model, [ids])[0].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1:], scores[np.arange(4), ids[1:]], atol=1e-4)
    for place, top in enumerate(found["top_logprobs"][1:]):
        best = sorted(top.values(), reverse=True)[:3]
        np.testing.assert_allclose(best, np.sort(scores[place])[::-1][:3], atol=1e-4)


def test_a_request_after_another_reads_only_what_is_new(engine: Engine) -> None:
    first = ask(engine, "completions", {"prompt": "abcdefghijkl", "max_tokens": 4, "seed": 1})[0]
    second = ask(engine, "completions", {"prompt": "abcdefghijklmn", "max_tokens": 4, "seed": 1})[0]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 12
    alone = expected(engine, ["abcdefghijklmn"], SampleConfig(max_tokens=4, temperature=1, seed=1))[0]
    assert second["choices"][0]["text"] == alone.text


def test_nothing_is_drawn_for_a_prompt_that_is_only_scored(engine: Engine) -> None:
    before = dataclasses.replace(engine.counts)
    answer = ask(engine, "completions", {"prompt": "hi", "echo": True, "logprobs": 1, "max_tokens": 0})[0]
    assert answer["choices"][0]["text"] == "hi" and len(answer["choices"][0]["logprobs"]["tokens"]) == 2
    assert engine.counts.generated_tokens == before.generated_tokens


def test_as_many_prompts_as_may_be_asked_fit_into_the_queue(engine: Engine) -> None:
    answer = ask(engine, "completions", {"prompt": ["ab"] * Settings.max_prompts, "max_tokens": 1, "seed": 2})[0]
    alone = expected(engine, ["ab"] * Settings.max_prompts, SampleConfig(max_tokens=1, temperature=1, seed=2))
    assert [one["text"] for one in answer["choices"]] == [one.text for one in alone]
