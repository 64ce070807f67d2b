"""Answers of mlxgpt serve's API, whole and streamed, from an engine that says what a test lets it say."""

import asyncio
import dataclasses
import json
import logging
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serve_fakes import FakeWorker, says, served

from mlxgpt.common.serve.api.answers import checked
from mlxgpt.common.serve.api.errors import ApiError, Gone
from mlxgpt.common.serve.api.openapi import openapi
from mlxgpt.common.serve.api.service import Answer, Service
from mlxgpt.common.serve.api.tokens import Placing
from mlxgpt.common.serve.work import Begun, Busy, Drawn, Piece, Stopped, Work
from mlxgpt.common.sft.template import CHATML
from mlxgpt.common.tokenizers.hf import made_of_bytes

ASK = [{"role": "user", "content": "Hi"}]
BROKEN = {"function": {"name": "f", "arguments": "{"}}
IDS = [256, *b"user\nHi", 257, *b"\n", 256, *b"assistant\n"]


def whole(worker: FakeWorker, kind: str, **given: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The answer and its headers."""
    answer: Answer = asyncio.run(getattr(Service(worker), kind)(given))
    assert isinstance(answer.body, bytes)
    value = json.loads(answer.body)
    name = {"chat": "ChatCompletion", "completions": "Completion", "tokenize": "Tokenized"}.get(kind, "Detokenized")
    checked(name, value)
    return value, answer.headers


def streamed(worker: FakeWorker, kind: str, **given: Any) -> tuple[list[Any], dict[str, str]]:
    """The events' values, [DONE] left out, and the headers."""

    async def read() -> tuple[Any, dict[str, str]]:
        answer = await getattr(Service(worker, keep_alive=600), kind)({**given, "stream": True})
        assert answer.streams
        text = "".join([part.decode() async for part in answer.body])
        assert text.endswith("\n\n")
        return text.removesuffix("\n\n").split("\n\n"), answer.headers

    events, headers = asyncio.run(read())
    assert all(event.startswith("data: ") for event in events)
    values = [event.removeprefix("data: ") for event in events]
    made = [json.loads(value) for value in values if value != "[DONE]"]
    assert ("error" in made[-1]) != (values[-1] == "[DONE]")
    for value in made:
        if "error" not in value:
            checked("ChatCompletionChunk" if kind == "chat" else "CompletionChunk", value)
    return made, headers


def refusal(kind: str, worker: FakeWorker | None = None, **given: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(getattr(Service(worker or FakeWorker()), kind)(given))
    assert set(caught.value.content["error"]) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
    return caught.value


def test_an_answer_is_openais() -> None:
    worker = FakeWorker(script=says("Hello"))
    value, headers = whole(worker, "chat", messages=ASK, n=2, seed=7, model="tiny")
    made = ChatCompletion.model_validate(value, strict=True)
    assert [(one.index, one.message.content, one.finish_reason) for one in made.choices] == [
        (0, "Hello", "stop"),
        (1, "Hello", "stop"),
    ]
    assert made.id.startswith("chatcmpl-") and made.model == "tiny" and made.system_fingerprint == "fp_" + "ab" * 6
    assert made.usage and (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(IDS), 10)
    assert made.usage.prompt_tokens_details and made.usage.prompt_tokens_details.cached_tokens == 0
    assert headers == {"X-Seed": "7"}
    assert worker.cancelled == []


def test_a_stream_says_the_role_once_and_one_reason() -> None:
    worker = FakeWorker(script=says("Hello"))
    events, _ = streamed(worker, "chat", messages=ASK, n=2, stream_options={"include_usage": True})
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    *others, last = chunks
    assert last.choices == [] and last.usage and last.usage.completion_tokens == 10
    assert all(event["usage"] is None for event in events[:-1])
    for index in range(2):
        own = [chunk.choices[0] for chunk in others if chunk.choices[0].index == index]
        assert [one.delta.role for one in own] == ["assistant", *[None] * 6]
        assert [one.delta.content for one in own] == ["", *"Hello", None]
        assert [one.finish_reason for one in own] == [*[None] * 6, "stop"]
    events, _ = streamed(worker, "chat", messages=ASK)
    assert not any("usage" in event for event in events)


def test_the_engine_is_asked_for_what_the_request_says() -> None:
    worker = FakeWorker()
    whole(
        worker, "chat", messages=ASK, n=3, seed=-1, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, stop=["a", "b"],
        repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"5": -100}, max_tokens=9,
        logprobs=True, top_logprobs=4,
    )  # fmt: skip
    work = worker.works[0]
    sample = work.sample
    assert list(work.prompt) == IDS and list(work.copies) == [0, 1, 2] and work.stop == ["a", "b"]
    assert (sample.seed, sample.temperature, sample.top_p, sample.top_k, sample.min_p) == (2**64 - 1, 0.5, 0.9, 0, 0.1)
    assert (sample.repetition_penalty, sample.presence_penalty, sample.frequency_penalty) == (1.1, 0.5, -0.5)
    assert (work.bias, work.logprobs, work.score_prompt, sample.max_tokens) == ({5: -100.0}, 4, False, 9)
    whole(worker, "chat", messages=ASK)
    work = worker.works[1]
    assert (work.sample.temperature, work.sample.top_p, work.logprobs) == (1.0, 1.0, None)
    assert work.sample.max_tokens == 64 - len(IDS) + 1  # the last token drawn need not fit
    whole(worker, "chat", messages=ASK, max_tokens=10**30)
    assert worker.works[2].sample.max_tokens == 64 - len(IDS) + 1


def test_equal_prompts_and_choices_have_noise_of_their_own() -> None:
    worker = FakeWorker()
    value, _ = whole(worker, "completions", prompt=["a", "b", "a"], n=2)
    assert [list(work.copies) for work in worker.works] == [[0, 1], [0, 1], [2, 3]]
    assert [one["index"] for one in value["choices"]] == list(range(6))
    assert value["usage"]["prompt_tokens"] == 3
    whole(worker, "completions", prompt=["a"] * 3)
    assert [list(work.copies) for work in worker.works[3:]] == [[0], [1], [2]]


def test_choices_are_in_the_prompts_order() -> None:
    worker = FakeWorker(script=lambda work: says(chr(work.prompt[0]).upper())(work))
    value, _ = whole(worker, "completions", prompt=["a", "b"], n=2)
    assert [one["text"] for one in value["choices"]] == ["A", "A", "B", "B"]


def test_a_seed_that_is_not_given_is_drawn_and_told() -> None:
    worker = FakeWorker()
    _, one = whole(worker, "chat", messages=ASK)
    _, two = streamed(worker, "completions", prompt="a")
    assert [int(one["X-Seed"]), int(two["X-Seed"])] == [work.sample.seed for work in worker.works]
    assert one != two and all(0 <= work.sample.seed < 2**31 for work in worker.works)


def test_reasons_are_openais() -> None:
    for reason, said in (("eos", "stop"), ("stop", "stop"), ("length", "length"), ("context", "length")):
        value, _ = whole(FakeWorker(script=says("a", reason)), "chat", messages=ASK)
        assert value["choices"][0]["finish_reason"] == said


def test_logprobs_have_bytes_and_half_characters() -> None:
    value, _ = whole(FakeWorker(script=says("hä")), "chat", messages=ASK, logprobs=True, top_logprobs=2)
    made = ChatCompletion.model_validate(value, strict=True).choices[0].logprobs
    assert made and made.content
    assert [(one.token, one.bytes) for one in made.content] == [
        ("h", [0x68]),
        ("bytes:\\xc3", [0xC3]),
        ("bytes:\\xa4", [0xA4]),
    ]
    assert b"".join(bytes(one.bytes or []) for one in made.content).decode() == "hä"
    assert [(top.token, top.logprob, top.bytes) for top in made.content[0].top_logprobs] == [
        ("h", -0.5, [0x68]),
        ("A", -1.5, [65]),
    ]
    value, _ = whole(FakeWorker(), "chat", messages=ASK, logprobs=True)
    assert value["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert whole(FakeWorker(), "chat", messages=ASK)[0]["choices"][0]["logprobs"] is None


def test_streamed_logprobs_are_those_of_the_text_beside_them() -> None:
    def script(work: Work) -> list[Begun | Piece]:
        one, two, three, four = (Drawn(ord(letter), -1.0) for letter in "abcd")
        return [  # "ab" may begin a stop, "cd" is one
            Begun(0),
            Piece(0, "", (one,)),
            Piece(0, "ab", (two,)),
            Piece(0, "", (three,)),
            Piece(0, "", (four,), "stop"),
        ]

    events, _ = streamed(FakeWorker(script=script), "chat", messages=ASK, logprobs=True, stop="cd")
    found = [
        (one["choices"][0]["delta"]["content"], [t["token"] for t in one["choices"][0]["logprobs"]["content"]])
        for one in events
        if one["choices"][0]["logprobs"]
    ]
    assert found == [("ab", ["a", "b"])]  # what a stop cuts away has no entries
    value, _ = whole(FakeWorker(script=script), "completions", prompt="x", logprobs=0, stop="cd")
    assert value["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    assert value["usage"]["completion_tokens"] == 4  # but it was drawn


def test_an_impossible_token_is_still_json() -> None:
    def script(work: Work) -> list[Begun | Piece]:
        return [
            Begun(0),
            Piece(0, "a", (Drawn(97, float("-inf"), ((97, float("-inf")),)),)),
            Piece(0, "", (), "length"),
        ]

    value, _ = whole(FakeWorker(script=script), "completions", prompt="x", logprobs=1)
    assert value["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
    assert value["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -9999.0}]


def test_echo_gives_the_prompt_and_its_logprobs() -> None:
    value, _ = whole(FakeWorker(script=says("yo")), "completions", prompt="hä", echo=True, logprobs=2)
    assert value["choices"][0]["text"] == "häyo"
    logprobs = value["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa4", "y", "o", ""]  # the last ends the text
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.25, -0.5, -0.5, -0.1]
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][3] == {"y": -0.5, "A": -1.5}
    assert logprobs["top_logprobs"][5] == {"": -0.1}
    worker = FakeWorker(script=says("yo"))
    value, _ = whole(worker, "completions", prompt=[104, 105], echo=True, max_tokens=0, logprobs=0)
    assert value["choices"][0] == {
        "index": 0, "text": "hi", "finish_reason": "length",
        "logprobs": {"tokens": ["h", "i"], "token_logprobs": [None, -0.25], "top_logprobs": [None, {"i": -0.25}],
                     "text_offset": [0, 1]},
    }  # fmt: skip
    assert worker.works[0].sample.max_tokens == 0 and worker.works[0].score_prompt
    assert value["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    value, _ = whole(FakeWorker(script=says("yo")), "completions", prompt="hi", echo=True)
    assert (value["choices"][0]["text"], value["choices"][0]["logprobs"]) == ("hiyo", None)
    value, _ = whole(FakeWorker(script=says("yo")), "completions", prompt="hi", logprobs=1)
    made = Completion.model_validate(value, strict=True).choices[0]
    assert made.text == "yo" and made.logprobs and made.logprobs.text_offset == [0, 1]


def test_a_stream_of_completions_adds_up_to_the_whole() -> None:
    given: dict[str, Any] = dict(prompt=["hä", "b"], n=2, echo=True, logprobs=1)
    whole_value, _ = whole(FakeWorker(script=says("yö")), "completions", **given)
    events, _ = streamed(FakeWorker(script=says("yö")), "completions", **given)
    for choice in whole_value["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for one in own for value in one["logprobs"][name]] == values
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == ["stop"]


@pytest.mark.parametrize(
    ("kind", "given", "status", "param", "code"),
    [
        ("chat", {"messages": ASK, "model": "../../etc/passwd"}, 404, "model", "model_not_found"),
        ("completions", {"prompt": "a", "model": ""}, 404, "model", "model_not_found"),
        ("completions", {"prompt": "a" * 65}, 400, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": ["a", "a" * 65]}, 400, "prompt[1]", "context_length_exceeded"),
        ("completions", {"prompt": [5, 900]}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": "a", "logit_bias": {"900": 1}}, 400, "logit_bias", "invalid_value"),
        ("completions", {"prompt": ["a"] * 65}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": ["a"] * 10, "n": 16}, 400, "prompt", "invalid_value"),
        ("chat", {"messages": [{"role": "user", "content": "a" * 65}]}, 400, "messages", "context_length_exceeded"),
        ("chat", {"messages": ASK, "chat_template_kwargs": {"wit": 1}}, 400,
         "chat_template_kwargs", "unsupported_parameter"),
        ("chat", {"messages": ASK, "chat_template_kwargs": {"messages": []}}, 400,
         "chat_template_kwargs", "unsupported_parameter"),
        ("chat", {"messages": ASK, "reasoning_effort": "low"}, 400, "reasoning_effort", "unsupported_parameter"),
        ("chat", {"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "f"}}]}, 400,
         "messages[0].function_call", "unsupported_parameter"),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": [BROKEN]}]}, 400,
         "messages[0].tool_calls", "invalid_value"),
        ("detokenize", {"tokens": [900]}, 400, "tokens", "invalid_value"),
        ("tokenize", {"text": "a", "model": "b"}, 404, "model", "model_not_found"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_is_refused(kind: str, given: Any, status: int, param: str, code: str) -> None:
    worker = FakeWorker()
    error = refusal(kind, worker, **given)
    assert (error.status, error.param, error.code) == (status, param, code)
    assert "\n" not in error.message and worker.works == []
    assert not error.message.startswith(f"{param}: {param}: ")


def test_a_model_without_a_template_has_no_chat() -> None:
    worker = FakeWorker(served(chat=False))
    assert "/v1/completions" in refusal("chat", worker, messages=ASK).message
    assert whole(worker, "completions", prompt="a")[0]["choices"][0]["text"] == "Hello"


def test_a_template_that_refuses_says_why() -> None:
    worker = FakeWorker(
        served(template="{% if messages|length > 1 %}{{ raise_exception('no second message') }}{% endif %}" + CHATML)
    )
    error = refusal("chat", worker, messages=ASK * 2)
    assert (error.status, error.param) == (400, "messages") and "no second message" in error.message


def test_values_reach_the_template_that_reads_them() -> None:
    template = CHATML + "{{ reasoning_effort }}{{ mood }}"
    worker = FakeWorker(served(template=template))
    whole(worker, "chat", messages=ASK, reasoning_effort="low", chat_template_kwargs={"mood": "x"})
    assert worker.works[0].prompt == [*IDS, *b"lowx"]


def test_roles_reach_the_template_and_control_tokens_in_them_are_text() -> None:
    worker = FakeWorker(served(context=512))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b<|im_end|>"}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ]
    whole(worker, "chat", messages=messages)
    tokenizer = next(iter(worker.served.values())).tokenizer
    assert tokenizer is not None
    ids = list(worker.works[0].prompt)
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    expected = [("developer", "d"), ("user", "ab<|im_end|>"), ("assistant", ""), ("tool", "r")]
    assert tokenizer.decode(ids) == "".join(turn.format(*one) for one in expected) + "<|im_start|>assistant\n"
    assert ids.count(257) == 4  # what the user wrote is none


def test_what_nobody_knows_is_named_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    worker = FakeWorker()
    service = Service(worker)
    given = {"prompt": "a", "chat_id": 1, "naïve\r\nX-Evil": 2, "metadata": {}}
    with caplog.at_level(logging.INFO, "mlxgpt.serve"):
        answers = [asyncio.run(service.completions(dict(given))) for _ in range(2)]
    assert answers[1].headers["X-Ignored-Fields"] == "chat_id, na%C3%AFve%0D%0AX-Evil"
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]


def test_a_full_queue_says_when_to_come_again_and_queues_nothing() -> None:
    class OneOnly(FakeWorker):
        def submit(self, work: Work) -> None:
            self.refusal = Busy(12) if self.works else None
            super().submit(work)

    worker = OneOnly()
    error = refusal("completions", worker, prompt=["a", "b"])
    assert (error.status, error.code, error.headers) == (429, "rate_limit_exceeded", {"Retry-After": "12"})
    assert worker.cancelled == worker.works


def test_an_engine_that_takes_nothing_is_503() -> None:
    worker = FakeWorker()
    worker.refusal = Stopped("the engine died")
    assert refusal("chat", worker, messages=ASK).status == 503


@pytest.mark.parametrize(
    ("piece", "dead", "status"),
    [
        (Piece(0, "", error="the model's logits are not finite"), False, 500),
        (Piece(0, "", error="the engine died"), True, 503),
        (Piece(0, "", reason="cancelled"), False, 503),
    ],
)
def test_a_failure_is_an_error_and_ends_the_request(piece: Piece, dead: bool, status: int) -> None:
    def script(work: Work) -> list[Begun | Piece]:
        return [Begun(0), Piece(0, "a", (Drawn(97),)), Piece(1, "b", (Drawn(98),)), piece]

    worker = FakeWorker(script=script)
    worker.death = RuntimeError() if dead else None
    error = refusal("chat", worker, messages=ASK, n=2)
    assert (error.status, error.type) == (status, "server_error")
    assert worker.cancelled == worker.works  # the other choice is not drawn for nobody
    worker = FakeWorker(script=script)
    worker.death = RuntimeError() if dead else None
    events, _ = streamed(worker, "chat", messages=ASK, n=2)
    assert events[-1]["error"] == error.content["error"]
    texts = [one["choices"][0]["delta"].get("content") for one in events[:-1]]
    assert texts == ["", "a", "", "b"]  # what was certain was said
    assert worker.cancelled == worker.works


def test_a_fault_of_the_server_ends_the_stream_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    worker = FakeWorker(script=lambda work: [Begun(0), Piece(0, "a", (Drawn(97),)), Piece(7, "b", (Drawn(98),))])
    events, _ = streamed(worker, "chat", messages=ASK)
    assert events[-1]["error"]["code"] == "internal_error" and worker.cancelled == worker.works
    assert "IndexError" in caplog.text


def test_silence_is_filled_with_comments() -> None:
    async def read() -> list[bytes]:
        worker = FakeWorker()
        worker.held.set()
        answer = await Service(worker, keep_alive=0.01).chat({"messages": ASK, "stream": True})
        made = []
        async for part in answer.body:  # type: ignore[union-attr]
            made.append(part)
            if len(made) == 3:
                worker.speak(worker.works[0])
        return made

    parts = asyncio.run(read())
    assert parts[:3] == [b": keep-alive\n\n"] * 3 and parts[-1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_work(stream: bool) -> None:
    async def leave(started: bool) -> FakeWorker:
        worker = FakeWorker()
        worker.held.set()

        async def ask() -> None:
            answer = await Service(worker).completions({"prompt": ["a", "b"], "stream": stream})
            assert answer.streams
            if started:
                async for _ in answer.body:  # type: ignore[union-attr]
                    pass
            answer.cancel()

        task = asyncio.create_task(ask())
        while not worker.works:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        if started:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return worker

    worker = asyncio.run(leave(True))
    assert worker.cancelled == worker.works and len(worker.works) == 2
    if stream:  # nobody ever read it
        worker = asyncio.run(leave(False))
        assert worker.cancelled == worker.works and len(worker.works) == 2


def test_a_client_that_is_seen_to_leave_ends_its_work() -> None:
    async def leave() -> FakeWorker:
        worker, left = FakeWorker(), asyncio.Event()
        worker.held.set()
        task = asyncio.create_task(Service(worker).chat({"messages": ASK}, left.wait))
        while not worker.works:
            await asyncio.sleep(0)
        left.set()
        with pytest.raises(Gone):
            await task
        return worker

    worker = asyncio.run(leave())
    assert worker.cancelled == worker.works and len(worker.works) == 1


def test_what_a_step_says_of_many_wakes_the_loop_once() -> None:
    async def count() -> tuple[int, list[Any]]:
        worker = FakeWorker()
        worker.held.set()
        service, loop = Service(worker), asyncio.get_running_loop()
        tasks = [asyncio.create_task(service.completions({"prompt": "a"})) for _ in range(8)]
        while len(worker.works) < 8:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        wakes, wake = 0, loop.call_soon_threadsafe

        def counted(*given: Any, **more: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return wake(*given, **more)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        for work in worker.works:
            worker.speak(work)
        answers = await asyncio.gather(*tasks)
        return wakes, [json.loads(bytes(one.body))["choices"][0]["text"] for one in answers]  # type: ignore[arg-type]

    assert asyncio.run(count()) == (1, ["Hello"] * 8)


def test_models_are_the_base_and_each_adapter() -> None:
    service = Service(FakeWorker(served("base"), dataclasses.replace(served("tuned", chat=False), parent="base")))
    checked("Models", listed := service.models())
    assert [(one["id"], one["parent"]) for one in listed["data"]] == [("base", None), ("tuned", "base")]
    checked("Model", service.model("tuned"))
    with pytest.raises(ApiError, match="'nope' is not served: expected base, tuned"):
        service.model("nope")


def test_tokens_and_text_are_each_others_inverse() -> None:
    worker = FakeWorker()
    for name in ("text", "prompt", "content"):
        value, _ = whole(worker, "tokenize", **{name: "hä"}, return_token_strs=True)
        assert (value["tokens"], value["count"], value["max_model_len"]) == ([0x68, 0xC3, 0xA4], 3, 64)
        assert len(value["token_strs"]) == 3
        back, _ = whole(worker, "detokenize", tokens=value["tokens"])
        assert back["text"] == back["prompt"] == back["content"] == "hä"
    assert whole(worker, "tokenize", messages=ASK)[0]["tokens"] == IDS
    assert whole(worker, "detokenize", tokens=[])[0]["text"] == ""


def test_a_long_prompt_is_read_beside_the_loop() -> None:
    """Its tokens are made in another thread, so that other requests go on."""
    import threading

    worker, threads = FakeWorker(served(context=1 << 16)), []
    tokenizer = next(iter(worker.served.values())).tokenizer
    assert tokenizer is not None
    encode = tokenizer.encode

    def watched(text: str) -> list[int]:
        threads.append(threading.current_thread())
        return encode(text)

    tokenizer.encode = watched
    for size in (10, 1 << 15):
        value, _ = whole(worker, "completions", prompt="a" * size)
        assert value["usage"]["prompt_tokens"] == size
    assert {one is threading.main_thread() for one in threads} == {True, False}


def test_the_schema_names_every_field_and_answer() -> None:
    made = openapi(["base", "tuned"])
    schemas = made["components"]["schemas"]
    assert json.loads(json.dumps(made)) == made
    fields = schemas["ChatRequest"]["properties"]
    assert fields["model"]["enum"] == ["base", "tuned", None]
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 16}
    assert fields["store"]["enum"] == [None, False] and "not honored" in fields["store"]["description"]
    post = made["paths"]["/v1/chat/completions"]["post"]
    assert set(post["responses"]) >= {"200", "400", "401", "404", "413", "415", "429", "503"}
    assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    references = json.dumps(made).split('"#/components/schemas/')[1:]
    assert {one.split('"')[0] for one in references} <= schemas.keys()
    assert all("ge" not in one for name in fields for one in fields[name].get("anyOf", ()))


@pytest.mark.parametrize(("tokens", "placed"), [
    (b"\xe2a", [("bytes:\\xe2", 0), ("a", 1)]),
    (b"\xe2\xe2ab", [("bytes:\\xe2", 0), ("bytes:\\xe2", 0), ("a", 2), ("b", 3)]),
    (b"\xc3\xa9a", [("bytes:\\xc3", 0), ("bytes:\\xa9", 0), ("a", 1)]),
])  # fmt: skip
def test_a_token_stands_behind_what_was_no_character(tokens: bytes, placed: list[tuple[str, int]]) -> None:
    placing = Placing(made_of_bytes())
    for token in tokens:
        placing.add(Drawn(token))
    assert [(one.text, one.start) for one in placing.take(0, last=True)] == placed
