"""What requests to mlxgpt serve may say, and what is said of those that may not."""

from typing import Any

import pytest

from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.api.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from mlxgpt.common.serve.api.values import Body

ASK = [{"role": "user", "content": "Hello"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def refused(kind: type[Body], /, **given: Any) -> tuple[str | None, str | None, str]:
    with pytest.raises(ApiError) as caught:
        parse(kind, given)
    assert caught.value.status == 400 and "\n" not in caught.value.message
    return caught.value.param, caught.value.code, caught.value.message


def chat(**given: Any) -> ChatRequest:
    return parse(ChatRequest, {"messages": ASK, **given})[0]


NUMBERS = [
    ("max_tokens", 1, 1 << 40, (0, -1, 1.5, "5", True, [1], {})),
    ("max_completion_tokens", 1, 7, (0, "7", False)),
    ("temperature", 0, 2, (-0.1, 2.01, "1", True, [])),
    ("temperature", 5e-324, 2.0, ("0",)),
    ("top_p", 0.01, 1, (0, 1.1, "1", True)),
    ("top_k", -1, 1000, (-2, 0.5, "1", True)),
    ("min_p", 0, 1, (-0.1, 1.1, "0")),
    ("repetition_penalty", 0.01, 100, (0, -1, "1", 1e300)),
    ("presence_penalty", -2, 2, (-2.1, 2.1, "0", True)),
    ("frequency_penalty", -2.0, 2.0, (-2.1, 2.1, "0")),
    ("n", 1, 16, (0, 17, 1.5, "1", True)),
    ("seed", -(2**63), 2**64 - 1, (-(2**63) - 1, 2**64, 0.5, "1", True)),
]


@pytest.mark.parametrize(
    ("name", "least", "most", "wrong"), NUMBERS, ids=lambda one: one if isinstance(one, str) else ""
)
def test_numbers_have_bounds_and_one_type(name: str, least: float, most: float, wrong: tuple[Any, ...]) -> None:
    for value in (least, most):
        assert getattr(chat(**{name: value}), name) == value
    for value in wrong:
        param, code, message = refused(ChatRequest, messages=ASK, **{name: value})
        assert (param, code) == (name, "invalid_value")
        assert message.startswith(f"{name}: ") and f"found {value!r}" in message
    assert getattr(chat(**{name: None}), name) is None


@pytest.mark.parametrize("value", [5.0, 5])
def test_json_has_one_kind_of_number(value: float) -> None:
    found = chat(max_tokens=value, temperature=1).max_tokens
    assert found == 5 and isinstance(found, int)


@pytest.mark.parametrize("name", sorted(ChatRequest.model_fields.keys() - {"messages"}))
def test_null_means_default(name: str) -> None:
    found, unknown = parse(ChatRequest, {"messages": ASK, name: None})
    assert found == chat() and not unknown


def test_null_means_default_within_messages_and_options() -> None:
    nothing = dict.fromkeys(("refusal", "audio", "annotations", "function_call", "name", "tool_call_id"))
    messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": [CALL], **nothing}]
    found, unknown = parse(
        ChatRequest, {"messages": messages, "stream": True, "stream_options": {"include_usage": None}}
    )
    assert not unknown and found.messages[1].content is None
    schema = {"enum": [None, 1]}  # a null of a schema is a value
    given = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": None}}
    assert chat(response_format=given).response_format.json_schema.schema_ == schema  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        ([], "messages", "at least 1"),
        ("Hello", "messages", "list"),
        ([None], "messages[0]", "dictionary"),
        ([{"content": "a"}], "messages[0].role", "required"),
        ([{"role": "robot", "content": "a"}], "messages[0].role", "'user'"),
        ([{"role": "function", "name": "f", "content": "a"}], "messages[0].role", "'tool'"),
        ([*ASK, {"role": "user"}], "messages[1].content", "text"),
        ([{"role": "user", "content": 5}], "messages[0].content", "text"),
        ([{"role": "user", "content": []}], "messages[0].content", "parts"),
        ([{"role": "user", "content": [IMAGE]}], "messages[0].content", "image_url is none"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content", "parts"),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "messages[0].tool_calls", "role user"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0].content", "assistant"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages[0].tool_calls[0].function", "required"),
    ],
)
def test_messages_that_are_none_are_refused_by_name(messages: Any, param: str, said: str) -> None:
    found = refused(ChatRequest, messages=messages)
    assert found[0] == param and said in found[2]


def test_parts_and_roles_are_read() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}]
    roles = ["system", "developer", "user", "assistant", "tool"]
    found, _ = parse(ChatRequest, {"messages": [{"role": role, "content": parts} for role in roles]})
    assert [one.role for one in found.messages] == roles
    assert found.messages[0].content == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("stop", "found"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([], []), (["a"] * 16, ["a"] * 16)]
)
def test_a_stop_is_a_text_or_up_to_sixteen(stop: Any, found: list[str]) -> None:
    assert chat(stop=stop).stop == found


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ([1], "not with token ids"),
        (1, "a text"),
        ("", "1 to 1024"),
        (["a", ""], "1 to 1024"),
        ([None], "a text"),
        (["a"] * 17, "found 17"),
        ("a" * 1025, "1024"),
        ({"a": 1}, "a text"),
    ],
)
def test_a_stop_that_is_no_text_is_refused(stop: Any, said: str) -> None:
    param, _, message = refused(CompletionRequest, prompt="a", stop=stop)
    assert param == "stop" and said in message


def test_a_bias_has_ids_as_text() -> None:
    assert chat(logit_bias={"5": -100, "7": 1.5}).logit_bias == {5: -100.0, 7: 1.5}
    assert chat(logit_bias={}).logit_bias == {}
    for wrong in ({"a": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}, {"5": True}, {"5": None}, {"\u0665": 1}, [[5, 1]], "5"):
        assert refused(ChatRequest, messages=ASK, logit_bias=wrong)[0] == "logit_bias"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}, "tools": [TOOL]}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"user": 5}, "user"),
        ({"model": 5}, "model"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(given: dict[str, Any], param: str) -> None:
    assert refused(ChatRequest, messages=ASK, **given)[0] == param


def test_a_schema_that_is_missing_is_asked_for() -> None:
    said = refused(ChatRequest, messages=ASK, response_format={"type": "json_schema"})[2]
    assert '"schema": ...' in said and "found none" in said


def test_what_goes_together_is_taken() -> None:
    assert chat(max_tokens=2, max_completion_tokens=2).limit == chat(max_completion_tokens=2).limit == 2
    assert (chat(logprobs=True).likeliest, chat(logprobs=True, top_logprobs=3).likeliest, chat().likeliest) == (
        0,
        3,
        None,
    )
    assert chat(logprobs=False).likeliest is None
    named = {"type": "function", "function": {"name": "add"}}
    assert chat(tools=[TOOL], tool_choice=named).tool_choice == ("add",)
    assert chat(tools=[], tool_choice="none").tools == []


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [
        ("audio", {"voice": "a"}, None),
        ("modalities", ["text", "audio"], ["text"]),
        ("functions", [{"name": "a"}], []),
        ("function_call", "auto", "none"),
        ("store", True, False),
        ("service_tier", "flex", "auto"),
        ("prediction", {"type": "content", "content": "a"}, None),
        ("verbosity", "low", "medium"),
        ("web_search_options", {}, None),
        ("best_of", 2, 1),
        ("stop_token_ids", [1], []),
        ("ignore_eos", True, False),
        ("min_tokens", 5, 0),
        ("guided_json", {}, None),
        ("adapters", "/etc", None),
        ("continue_final_message", True, False),
    ],
)
def test_a_known_field_is_not_honored_in_silence(name: str, value: Any, harmless: Any) -> None:
    param, code, message = refused(ChatRequest, messages=ASK, **{name: value})
    assert (param, code) == (name, "unsupported_parameter") and message.startswith(f"{name} is not honored: ")
    assert parse(ChatRequest, {"messages": ASK, name: harmless}) == (chat(), [])


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"suffix": "b"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"messages": ASK}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_completions_refuse_what_they_do_not_do(given: dict[str, Any], param: str) -> None:
    assert refused(CompletionRequest, prompt="a", **given)[0] == param
    assert parse(CompletionRequest, {"prompt": "a", "n": 2, "best_of": 2, "max_tokens": 0, "logprobs": 20})[1] == []


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("a", ["a"]), ("", [""]), (["a", ""], ["a", ""]), ([1, 2.0], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_is_text_ids_or_a_list_of_either(prompt: Any, found: Any) -> None:
    assert parse(CompletionRequest, {"prompt": prompt})[0].prompt == found


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], 5, {}, ["a", 1], ["a", [1]], [True], [-1], [1.5], [2**31], [[1], []]]
)
def test_another_prompt_is_refused(prompt: Any) -> None:
    assert refused(CompletionRequest, prompt=prompt)[0] == "prompt"


def test_a_harmless_value_has_its_type() -> None:
    assert refused(ChatRequest, messages=ASK, store=0)[0] == "store"


def test_unknown_fields_are_named_and_harmless_ones_are_not() -> None:
    message = {"role": "user", "content": "a", "cache_control": {}, "reasoning": None}
    given = {"messages": [message, message], "chat_id": 1, "metadata": {"a": "b"}, "user": "me", "foo": None}
    _, unknown = parse(ChatRequest, {**given, "stream": True, "stream_options": {"include_usage": True, "x": 1}})
    assert unknown == ["chat_id", "messages.cache_control", "stream_options.x"]


def test_tokens_are_asked_of_one_thing() -> None:
    for name in ("text", "prompt", "content"):
        assert getattr(parse(TokenizeRequest, {name: "a"})[0], name) == "a"
    assert "neither" in refused(TokenizeRequest)[2]
    assert "text and messages" in refused(TokenizeRequest, text="a", messages=ASK)[2]
    assert refused(TokenizeRequest, text="a", tools=[TOOL])[0] == "tools"
    assert refused(DetokenizeRequest, tokens="a")[0] == refused(DetokenizeRequest, tokens=[True])[0] == "tokens"
