"""The chat page on the server that mlxgpt serve runs, with tiny models."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from decoding import BACKENDS, make_config
from page_server import Tab, browsed, browser, opened
from serve_site import Site, serving_site
from serving import running, served_model

from mlxgpt.common.serve.web.settings import Settings
from mlxgpt.common.serve.work import Served
from mlxgpt.common.sft.template import CHATML, Template, with_chatml
from mlxgpt.common.tokenizers.hf import made_of_bytes

TOKENIZER = with_chatml(made_of_bytes())
ROOM = 4096


def model_of(name: str, chats: bool) -> Served:
    template = Template({"default": CHATML}, TOKENIZER, TOKENIZER.named, "chatml") if chats else None
    config = dataclasses.replace(make_config("llama", TOKENIZER.n_vocab), block_size=ROOM)
    return served_model(BACKENDS[0], config, name, TOKENIZER, template=template, ends=[TOKENIZER.eos_id])


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    makers = (lambda: model_of("first", True), lambda: model_of("twin", True), lambda: model_of("plain", False))
    with (
        running(BACKENDS[0], *makers, max_batch=4, cache_bytes=1 << 20) as engine,
        serving_site(engine, Settings(keys=("a-key",))) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


@pytest.fixture
def tab(site: Site, started: Any) -> Iterator[Tab]:
    with opened(started, f"http://127.0.0.1:{site.port}", "a-key") as made:
        yield made


@browsed
def test_the_page_shows_what_the_server_answers(tab: Tab, site: Site) -> None:
    def answers(path: str, **body: Any) -> dict[str, Any]:
        reply = site.post(path, body, Authorization="Bearer a-key")
        assert reply.status == 200, reply.body
        return reply.json["choices"][0]

    def shown() -> list[dict[str, Any]]:
        return json.loads(tab.page.evaluate("JSON.stringify(talk.messages.at(-1).sides)"))

    tab.page.select_option("#other", "twin")
    tab.page.click("#adjust")
    for name, value in {"max_tokens": "40", "temperature": "0.9", "top_k": "100", "stop": "~~\\n"}.items():
        tab.page.fill(f"[name={name}]", value)
    tab.send("Hi")
    first, twin = shown()
    assert first["model"] == "first" and twin["model"] == "twin" and first["seed"] == twin["seed"]
    assert first["content"] == twin["content"] and first["tokens"] == twin["tokens"]  # the same weights, the same seed
    asked = {"seed": int(first["seed"]), "temperature": 0.9, "top_k": 100, "max_tokens": 40, "stop": ["~~\n"]}
    messages = [{"role": "user", "content": "Hi"}]
    said = answers("/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=5, **asked)
    assert first["content"] == said["message"]["content"] and first["reason"] == said["finish_reason"] == "length"
    for mine, given in zip(first["tokens"], said["logprobs"]["content"], strict=True):
        assert mine["bytes"] == given["bytes"] and abs(mine["logprob"] - given["logprob"]) < 1e-4
        assert [other["bytes"] for other in given["top_logprobs"]] == [name for name, _ in mine["top"]]
    tab.page.click("#other")
    tab.page.select_option("#other", "")
    tab.page.select_option("#model", "plain")
    tab.click("New")
    tab.send("Once")
    (plain,) = shown()
    said = answers("/v1/completions", prompt="Once", model="plain", logprobs=5, **asked | {"seed": int(plain["seed"])})
    assert plain["content"] == said["text"] and len(plain["tokens"]) == len(said["logprobs"]["tokens"])
    tab.page.click("button:has-text('Tokens')")
    tab.page.focus(".tokens .token")
    assert f"{said['logprobs']['token_logprobs'][0]:.3f}" in tab.page.inner_text("#tip")


@browsed
def test_a_stopped_answer_frees_the_engine(tab: Tab, site: Site) -> None:
    tab.page.fill("#say", "Hi")
    tab.page.press("#say", "Enter")
    tab.page.wait_for_selector(".text:not(.waits)")
    tab.page.keyboard.press("Escape")
    tab.wait()
    assert "stopped" in tab.texts(".meta")[0]
    site.until(lambda: site.worker.counts.running == 0 and site.worker.counts.cancelled == 1)
    tab.page.click("#adjust")
    tab.page.fill("[name=further]", '{"tools": 5}')
    tab.send("Hi")
    assert "ools" in tab.texts(".error p")[0]
