"""Tools, reasoning and JSON through the API of mlxgpt serve: what a template writes is what a client gets."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from decoding import BACKENDS, make_config
from openai.types.chat import ChatCompletion
from serve_fakes import FakeWorker, says, served
from serving import running, served_model
from templates import QWEN3, QWEN25
from test_serve_api import refusal, streamed, whole

from mlxgpt.common.serve.api.service import Service
from mlxgpt.common.serve.engine import Engine
from mlxgpt.common.sft.template import CHATML, Template, with_chatml
from mlxgpt.common.tokenizers.hf import made_of_bytes

ASK = [{"role": "user", "content": "Add one and two"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def worker(text: str, template: str = QWEN25, reason: str = "eos") -> FakeWorker:
    return FakeWorker(served(context=2048, template=template), script=says(text, reason))


def test_a_call_is_a_call_and_no_markup_is_content() -> None:
    text = f"I add.\n{CALL}\n{CALL.replace('1', '5')}"
    value, _ = whole(worker(text), "chat", messages=ASK, tools=[ADD, NOW], seed=1)
    made = ChatCompletion.model_validate(value, strict=True).choices[0]
    assert (made.message.content, made.finish_reason) == ("I add.", "tool_calls")
    calls = made.message.tool_calls or []
    found = [(one.function.name, json.loads(one.function.arguments)) for one in calls if one.type == "function"]
    assert found == [("add", {"a": 1, "b": 2}), ("add", {"a": 5, "b": 2})]
    assert len({one.id for one in calls}) == 2
    again, _ = whole(worker(text), "chat", messages=ASK, tools=[ADD, NOW], seed=1)
    assert again["choices"] == value["choices"]  # the ids, too

    events, _ = streamed(worker(text), "chat", messages=ASK, tools=[ADD, NOW], seed=1)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I add."
    said = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["id"], call["function"]["arguments"]) for call in said] == [
        (n, call.id, call.function.arguments) for n, call in enumerate(calls) if call.type == "function"
    ]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_calls_alone_have_no_content_and_only_one_where_only_one_may_be() -> None:
    value, _ = whole(worker(f"{CALL}\n{CALL}"), "chat", messages=ASK, tools=[ADD], parallel_tool_calls=False)
    message = value["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1
    value, _ = whole(worker("No."), "chat", messages=ASK, tools=[ADD])
    assert "tool_calls" not in value["choices"][0]["message"]
    assert (value["choices"][0]["message"]["content"], value["choices"][0]["finish_reason"]) == ("No.", "stop")
    value, _ = whole(worker(CALL[:40], reason="length"), "chat", messages=ASK, tools=[ADD])
    assert value["choices"][0]["finish_reason"] == "length"


def test_the_prompt_has_the_tools_as_they_were_given_and_none_with_none() -> None:
    own = worker("a")
    tool = {"function": {"parameters": None, "name": "now", "strict": True}, "type": "function"}  # an order of its own
    whole(own, "chat", messages=ASK, tools=[tool])
    whole(own, "chat", messages=ASK, tools=[tool], tool_choice="none")
    tokenizer = next(iter(own.served.values())).tokenizer
    assert tokenizer is not None
    shown, hidden = (tokenizer.decode(list(work.prompt)) for work in own.works)
    assert '<tools>\n{"function": {"name": "now", "strict": true}, "type": "function"}\n</tools>' in shown
    assert "now" not in hidden
    assert own.works[0].constrain is not None  # auto: the model chooses, but a strict function's arguments fit
    whole(own, "chat", messages=ASK, tools=[{"type": "function", "function": {"name": "now"}}])
    assert own.works[2].constrain is None


def test_an_answer_of_calls_ends_where_the_template_ends_it() -> None:
    own = FakeWorker(dataclasses.replace(served(context=2048, template=QWEN25), ends=frozenset()), script=says("a"))
    whole(own, "chat", messages=ASK, tools=[ADD])
    whole(own, "chat", messages=ASK)
    assert [work.served.ends for work in own.works] == [{257}, frozenset()]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_is_asked_for_is_enforced(choice: Any) -> None:
    own = worker(CALL)
    whole(own, "chat", messages=ASK, tools=[ADD, NOW], tool_choice=choice)
    constrain = own.works[0].constrain
    assert constrain is not None
    guided = constrain()
    for byte in CALL.encode():
        assert guided.allowed()[byte]
        guided.take(byte)
    named = constrain()
    for byte in b'<tool_call>\n{"name": "':
        named.take(byte)
    assert named.allowed()[ord("n")] == (choice == "required")


@pytest.mark.parametrize("text", [CALL, '{"city": "Oslo"}'])
def test_tools_and_json_together_are_calls_or_json(text: str) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "it", "schema": {"properties": {"city": {"enum": ["Oslo"]}}}},
    }
    own = worker(text)
    message = whole(own, "chat", messages=ASK, tools=[ADD], response_format=form)[0]["choices"][0]["message"]
    assert (message["content"], "tool_calls" in message) == ((None, True) if text == CALL else (text, False))
    constrain = own.works[0].constrain
    assert constrain is not None
    guided = constrain()
    for byte in text.encode():
        assert guided.allowed()[byte]
        guided.take(byte)
    assert guided.allowed()[257]
    assert not constrain().allowed()[ord("I")]


def test_reasoning_is_apart_from_content() -> None:
    text = "<think>\nhm\n</think>\n\nThree."
    value, _ = whole(worker(text, QWEN3), "chat", messages=ASK)
    message = value["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Three.")
    events, _ = streamed(worker(text, QWEN3), "chat", messages=ASK)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content") or "" for delta in deltas) == "Three."


def test_results_of_tools_follow_their_calls() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "c1", "content": "3"}
    own = worker("Three.")
    whole(own, "chat", messages=[*messages, result], tools=[ADD])
    tokenizer = next(iter(own.served.values())).tokenizer
    assert tokenizer is not None and "<tool_response>\n3\n" in tokenizer.decode(list(own.works[0].prompt))
    assert refusal("chat", own, messages=[*ASK, result]).param == "messages"
    assert refusal("chat", own, messages=[*messages, {**result, "tool_call_id": "c2"}]).status == 400


@pytest.mark.parametrize(
    ("template", "given", "param"),
    [
        (CHATML, {"tools": [ADD]}, "tools"),
        (QWEN25, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
         "response_format.json_schema.schema"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(template: str, given: dict[str, Any], param: str) -> None:
    assert refusal("chat", worker("a", template), messages=ASK, **given).param == param


TOKENIZER = with_chatml(made_of_bytes())


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    template = Template({"default": QWEN25}, TOKENIZER, TOKENIZER.named, "qwen")
    config = make_config("llama", TOKENIZER.n_vocab, block_size=512)
    ends = [TOKENIZER.eos_id]

    def make() -> Any:
        return served_model(request.param, config, "tiny", TOKENIZER, template=template, ends=ends)

    with running(request.param, make) as made:
        yield made


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "old": {"type": "boolean"}},
    "required": ["city", "old"],
    "additionalProperties": False,
}
_SEEN: dict[str, str] = {}


def test_a_random_model_writes_the_schema_and_the_calls(engine: Engine) -> None:
    """At temperature 2, as the same text in both backends."""
    strict = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
    more = {"messages": ASK, "temperature": 2, "seed": 5, "n": 3}

    async def ask() -> list[Any]:
        service = Service(engine)
        one = service.chat({**more, "response_format": strict})
        two = service.chat({**more, "tools": [ADD], "tool_choice": "required", "max_tokens": 120})
        return [json.loads(answer.body) for answer in await asyncio.gather(one, two)]  # type: ignore[arg-type]

    formed, called = asyncio.run(ask())
    for choice in formed["choices"]:
        found = json.loads(choice["message"]["content"])
        assert found["city"] in ("Rome", "Oslo") and isinstance(found["old"], bool) and len(found) == 2
        assert choice["finish_reason"] == "stop"
    for choice in called["choices"]:
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"
    texts = json.dumps([formed["choices"], called["choices"]])
    assert texts == _SEEN.setdefault("texts", texts)
