"""mlxgpt serve as other people's clients use it: openai, langchain-openai and llm, on a socket."""

import asyncio
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
import templates
from decoding import BACKENDS, GENERATE, make_config
from serve_fakes import FakeWorker
from serve_site import Site, serving_site
from serving import running, served_model

from book.page import ROOT
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.serve.web.settings import Settings
from mlxgpt.common.serve.work import Busy, Served, Stopped
from mlxgpt.common.sft.template import template_of

KEY = "sk-of-the-test"
CONTEXT = 1024
ASK: list[Any] = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hi"}]
CITIES = ["Rome", "Oslo", "Lima"]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": CITIES}, "days": {"type": "integer", "enum": [1, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class City(pydantic.BaseModel):
    """A city."""

    name: Literal["Rome", "Oslo", "Lima"]
    large: bool
    tags: list[Literal["old", "new"]] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """A model of each framework with the same weights, and a template that has tools."""
    tokenizer = templates.made(tmp_path_factory.mktemp("t"), templates.QWEN25, ["<|im_start|>", "<|im_end|>"])
    template = template_of(tokenizer, "the template")
    assert template
    config = make_config("llama", tokenizer.n_vocab, block_size=CONTEXT)
    ends = frozenset(tokenizer.ends | {template.end_id})
    return {name: served_model(name, config, "tiny", tokenizer, template=template, ends=ends) for name in BACKENDS}


@pytest.fixture(scope="module", params=BACKENDS)
def site(request: pytest.FixtureRequest, made: dict[str, Served]) -> Iterator[Site]:
    def load() -> Served:
        return served_model(
            request.param, made[request.param].model.config, "tiny", made[request.param].tokenizer,
            template=made[request.param].template, ends=made[request.param].ends,
        )  # fmt: skip

    with (
        running(request.param, load, max_batch=4, cache_bytes=1 << 20) as engine,
        serving_site(engine, Settings(keys=(KEY,), backend=request.param)) as one,
    ):
        yield one


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url(site), api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


ONE = pytest.mark.parametrize("site", ["mlx"], indirect=True)  # clients whose requests are those of openai's


def url(site: Site) -> str:
    return f"http://127.0.0.1:{site.port}/v1"


def alone(made: dict[str, Served], site: Site, messages: list[Any], **sample: Any) -> str:
    """What `generate` says to the same."""
    served = made[site.settings.backend]
    assert served.template and served.tokenizer
    ids = served.template.encode(messages, [], generation=True, typed=True)
    generate = GENERATE[site.settings.backend].generate
    return generate(served.model, served.tokenizer, [ids], SampleConfig(**sample), (), None, served.ends)[0].text


def test_chat_and_stream_say_what_generate_says(client: Any, made: dict[str, Served], site: Site) -> None:
    given: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 12, "max_tokens": 24, "temperature": 0.8}
    expected = alone(made, site, ASK, seed=12, max_tokens=24, temperature=0.8)
    answer = client.chat.completions.create(**given)
    assert expected and answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length" and answer.object == "chat.completion"
    assert answer.usage and answer.usage.completion_tokens == 24
    with client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    *said, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == expected
    assert [chunk.choices[0].delta.role for chunk in said if chunk.choices[0].delta.role] == ["assistant"]
    assert [chunk.choices[0].finish_reason for chunk in said if chunk.choices[0].finish_reason] == ["length"]
    assert not last.choices and last.usage == answer.usage.model_copy(
        update={"prompt_tokens_details": last.usage and last.usage.prompt_tokens_details}
    )
    assert last.usage and last.usage.prompt_tokens_details and last.usage.prompt_tokens_details.cached_tokens
    raw = client.chat.completions.with_raw_response.create(**given | {"seed": None})
    again = client.chat.completions.create(**given | {"seed": int(raw.headers["x-seed"])})
    assert again.choices[0].message.content == raw.parse().choices[0].message.content


def test_many_at_once_from_an_async_client(made: dict[str, Served], site: Site) -> None:
    async def every() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url(site), api_key=KEY, max_retries=0) as client:

            async def one(seed: int) -> str:
                given: Any = {"model": "tiny", "messages": ASK, "seed": seed, "max_tokens": 12}
                if seed % 2:
                    return (await client.chat.completions.create(**given)).choices[0].message.content or ""
                chunks = await client.chat.completions.create(**given, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*map(one, range(8)))

    assert asyncio.run(every()) == [
        alone(made, site, ASK, seed=seed, max_tokens=12, temperature=1) for seed in range(8)
    ]


def test_logprobs_have_their_bytes(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, seed=3, max_tokens=16, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found and found.content and len(found.content) == 16
    text = b"".join(bytes(one.bytes or ()) for one in found.content)
    assert text.decode("utf-8", "replace").startswith((answer.choices[0].message.content or "")[:4])
    for one in found.content:
        assert one.logprob <= 0 and len(one.top_logprobs) == 3
        assert [top.logprob for top in one.top_logprobs] == sorted(top.logprob for top in one.top_logprobs)[::-1]


def test_completions_echo_and_score_the_prompt(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt="It is 45 km", echo=True, logprobs=2, max_tokens=0)
    found, choice = answer.choices[0].logprobs, answer.choices[0]
    assert choice.text == "It is 45 km" and found and found.tokens and found.token_logprobs and found.text_offset
    assert "".join(found.tokens) == choice.text and found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)
    many = client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=3, seed=1, temperature=1.5)
    assert [one.index for one in many.choices] == [0, 1, 2, 3]
    ids = client.completions.create(model="tiny", prompt=[[5, 6, 7], [8]], max_tokens=2)
    assert len(ids.choices) == 2 and ids.usage and ids.usage.prompt_tokens == 4
    with client.completions.create(model="tiny", prompt="a", max_tokens=6, seed=1, stream=True) as stream:
        streamed = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert streamed == client.completions.create(model="tiny", prompt="a", max_tokens=6, seed=1).choices[0].text


@ONE
def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_an_answer_is_parsed_into_a_model(client: Any) -> None:
    given: Any = {"model": "tiny", "messages": ASK, "seed": 5, "response_format": City}
    answer = client.chat.completions.parse(**given)
    assert isinstance(answer.choices[0].message.parsed, City)
    with client.chat.completions.stream(**given) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed
    free = client.chat.completions.create(
        model="tiny", messages=ASK, seed=5, max_tokens=200, response_format={"type": "json_object"}
    )
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(free.choices[0].message.content or ""), dict)


def test_tools_are_called_and_their_results_read(client: Any) -> None:
    given: Any = {"model": "tiny", "messages": ASK, "tools": [WEATHER], "tool_choice": "required", "seed": 2,
                  "parallel_tool_calls": False}  # fmt: skip
    message = client.chat.completions.create(**given).choices[0]
    assert message.finish_reason == "tool_calls" and message.message.tool_calls and not message.message.content
    (call,) = message.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments).keys() == {"city", "days"}
    with client.chat.completions.create(**given, stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    calls = [one for delta in deltas for one in delta.tool_calls or []]
    assert "".join(one.function.arguments or "" for one in calls if one.function) == call.function.arguments
    assert [one.function.name for one in calls if one.function and one.function.name] == ["get_weather"]
    assert not any(delta.content for delta in deltas)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    more = [*ASK, message.message.model_dump(exclude_none=True), result]
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    assert client.chat.completions.create(model="tiny", messages=more, tools=[WEATHER], max_tokens=4).choices
    assert client.chat.completions.create(**given | {"tool_choice": named}).choices[0].message.tool_calls
    none = client.chat.completions.create(**given | {"tool_choice": "none"}, max_tokens=8)
    assert not none.choices[0].message.tool_calls


@ONE
def test_errors_are_the_clients_own_classes(client: Any, site: Site) -> None:
    chat: Any = client.chat.completions
    with pytest.raises(openai.BadRequestError) as bad:
        chat.create(model="tiny", messages=ASK, temperature=3)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error" and bad.value.code
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
    with pytest.raises(openai.NotFoundError) as missing:
        chat.create(model="gpt-5", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.AuthenticationError) as wrong:
        client.with_options(api_key="sk-wrong").models.list()
    assert wrong.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError, match=str(CONTEXT)):
        chat.create(model="tiny", messages=[{"role": "user", "content": "It is. " * CONTEXT}])


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [(Busy(7), openai.RateLimitError), (Stopped("the server is ending"), openai.InternalServerError)],
)
def test_a_server_that_takes_no_more_says_so(refusal: Exception, kind: type[openai.APIStatusError]) -> None:
    worker = FakeWorker()
    worker.refusal = refusal
    with serving_site(worker) as site, openai.OpenAI(base_url=url(site), api_key="any", max_retries=0) as client:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(model="tiny", messages=ASK)
        if isinstance(refusal, Busy):
            assert caught.value.response.headers["retry-after"] == "7"


@pytest.fixture
def chain(site: Site) -> Any:
    """LangChain's chat model."""
    langchain_openai = pytest.importorskip("langchain_openai")
    return langchain_openai.ChatOpenAI(
        model="tiny", base_url=url(site), api_key=KEY, seed=4, temperature=0.8, max_retries=0, max_tokens=200
    )


@ONE
def test_langchain_chats_and_streams(chain: Any, made: dict[str, Served], site: Site) -> None:
    short = chain.model_copy(update={"max_tokens": 12})
    expected = alone(made, site, [{"role": "user", "content": "Hi"}], seed=4, max_tokens=12, temperature=0.8)
    answer = short.invoke("Hi")
    assert answer.content == expected and answer.usage_metadata["output_tokens"] == 12
    assert answer.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in short.stream("Hi")) == expected
    assert len(short.batch(["Hi", "It is."])) == 2


@ONE
def test_langchain_binds_tools_and_structures_output(chain: Any) -> None:
    answer = chain.bind_tools([WEATHER], tool_choice="any").invoke("Rome?")
    assert answer.tool_calls and all(call["name"] == "get_weather" for call in answer.tool_calls)
    for method in ("json_schema", "function_calling"):
        assert isinstance(chain.with_structured_output(City, method=method).invoke("Rome?"), City), method


@ONE
def test_langchain_completes(site: Site) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.OpenAI(model="tiny", base_url=url(site), api_key=KEY, seed=4, max_tokens=6, max_retries=0)
    assert model.invoke("It is") == "".join(model.stream("It is")) != ""


@ONE
def test_llm_prompts_streams_and_follows_a_schema(
    site: Site, made: dict[str, Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    llm = pytest.importorskip("llm")
    entry = {"model_id": "mine", "model_name": "tiny", "api_base": url(site), "api_key_name": "ours",
             "supports_schema": True}  # fmt: skip
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    (tmp_path / "keys.json").write_text(json.dumps({"ours": KEY}))
    model = llm.get_model("mine")
    given = {"seed": 9, "max_tokens": 10, "temperature": 0.7}
    expected = alone(made, site, [{"role": "user", "content": "Hi"}], seed=9, max_tokens=10, temperature=0.7)
    assert model.prompt("Hi", stream=False, **given).text() == expected
    streamed = model.prompt("Hi", stream=True, **given)
    assert "".join(streamed) == expected and streamed.usage().output == 10
    found = model.prompt("Rome?", schema=City, **given | {"max_tokens": 200}).text()
    City.model_validate_json(found)
    chat = model.conversation()
    assert chat.prompt("Hi", **given).text() == expected and chat.prompt("It is.", **given).text()


@ONE
@pytest.mark.parametrize("client", ("Python", "LangChain", "curl"))
def test_the_clients_of_the_page_about_serving_get_answers(client: str, site: Site, capsys: Any) -> None:
    page = (ROOT / "docs" / "serve.md").read_text()
    shown = textwrap.dedent(re.findall(rf'=== "{client}"\n\n    ```\n(.*?)\n    ```', page, re.DOTALL)[0])
    if client == "curl":
        body = json.loads(shlex.split(shown)[-1])
        with openai.OpenAI(base_url=url(site), api_key=KEY) as asked:
            assert asked.chat.completions.create(**body | {"model": "tiny", "max_tokens": 8}).choices[0].message.content
        return
    if client == "LangChain":
        pytest.importorskip("langchain_openai")
    for written, here in (("http://127.0.0.1:8000/v1", url(site)), ('"none"', repr(KEY)), ('"qa"', '"tiny"')):
        assert written in shown
        shown = shown.replace(written, here)
    names: dict[str, Any] = {"__name__": "docs"}
    exec(shown.replace("seed=7", "seed=7, max_tokens=8"), names)
    assert capsys.readouterr().out.strip()
    if client == "Python":
        (parsed,) = re.findall(r"```\n(from typing import Literal\n.*?)\n```", page, re.DOTALL)
        exec(parsed.replace('"qa"', '"tiny"'), names)
        assert re.fullmatch(r"kind='(rain|snow|sun)' cold=(True|False)\n", capsys.readouterr().out)
