"""The chat page in a browser: what its buttons, fields and keys do, and what it asks the server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_server import MARKUP, Fake, Tab, browsed, browser, chunks, event, opened, running

from mlxgpt.common.inference.conversation import Conversation


@pytest.fixture(scope="module")
def fake() -> Fake:
    return Fake()


@pytest.fixture(scope="module")
def address(fake: Fake) -> Iterator[str]:
    with running(fake.app()) as url:
        yield url


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


@pytest.fixture
def tab(fake: Fake, address: str, started: Any) -> Iterator[Tab]:
    fake.reset()
    with opened(started, address) as made:
        yield made


@browsed
def test_a_message_is_sent_with_the_system_prompt_and_the_settings(tab: Tab, fake: Fake) -> None:
    tab.click("Settings")
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
    given |= {"presence_penalty": 0.25, "frequency_penalty": -0.25, "max_tokens": 50}
    for name, value in given.items():
        tab.page.fill(f"[name={name}]", str(value))
    tab.page.fill("[name=system]", "Be brief.")
    tab.page.fill("[name=stop]", "\\n\\n\nEND")
    tab.page.fill("[name=seed]", str(2**64 - 1))
    tab.page.fill("[name=further]", '{"logit_bias": {"5": -100}}')
    tab.send("Hello")
    tab.send("Again")
    assert tab.texts() == [f"I am base with seed {2**64 - 1}."] * 2
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    messages += [
        {"role": "assistant", "content": f"I am base with seed {2**64 - 1}."},
        {"role": "user", "content": "Again"},
    ]
    asks = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 5}
    more = {"stop": ["\n\n", "END"], "seed": 2**64 - 1, "logit_bias": {"5": -100}, "model": "base"}
    assert fake.bodies[1] == given | asks | more | {"messages": messages}
    tab.page.fill("[name=temperature]", "3")
    tab.send("No")
    assert len(fake.bodies) == 2 and "Temperature" in tab.page.inner_text("#notice")
    assert tab.page.input_value("#say") == "No"


@browsed
def test_fields_that_are_empty_are_not_sent_and_each_answer_has_a_seed(tab: Tab, fake: Fake) -> None:
    tab.send("One")
    tab.click("Regenerate")
    tab.wait()
    first, second = fake.bodies
    names = {"messages", "model", "stream", "stream_options", "seed", "logprobs", "top_logprobs"}
    assert set(first) == names and first["messages"] == second["messages"] == [{"role": "user", "content": "One"}]
    assert first["seed"] != second["seed"]
    assert tab.texts() == [f"I am base with seed {second['seed']}."]
    tab.click(f"seed {second['seed']}")
    tab.click("Regenerate")
    tab.wait()
    assert fake.bodies[2] == second


@browsed
def test_stop_ends_the_request_and_keeps_the_text_so_far(tab: Tab, fake: Fake) -> None:
    fake.pause, fake.say = 0.05, lambda _: "word " * 200
    for way in ("button", "key"):
        tab.page.fill("#say", "Go")
        tab.page.press("#say", "Enter")
        tab.page.wait_for_selector(".message:last-child .text:has-text('word word')")
        if way == "button":
            tab.click("Stop")
        else:
            tab.page.keyboard.press("Escape")
        tab.wait()
        assert "stopped" in tab.texts(".meta")[-1] and tab.texts()[-1].startswith("word word")
    for _ in range(1000):
        if fake.left == 2:
            break
        tab.page.wait_for_timeout(20)
    assert fake.left == 2  # the server saw both go


@browsed
def test_an_edited_message_cuts_what_follows_and_can_be_undone(tab: Tab, fake: Fake) -> None:
    tab.send("One")
    tab.send("Two")
    tab.click("Edit", 0)
    tab.page.fill(".edit", "Other")
    tab.page.press(".edit", "Enter")
    tab.wait()
    assert fake.bodies[-1]["messages"] == [{"role": "user", "content": "Other"}]
    assert tab.texts(".bubble") == ["Other"]
    tab.click("Undo")
    assert tab.texts(".bubble") == ["One", "Two"]
    tab.click("Edit", 1)  # an answer
    tab.page.fill(".edit", "I said this.")
    tab.click("Save", 1)
    tab.send("Next")
    assert [m["content"] for m in fake.bodies[-1]["messages"]] == ["One", "I said this.", "Next"]


@browsed
def test_two_models_get_the_same_messages_and_seed_at_the_same_time(tab: Tab, fake: Fake) -> None:
    fake.together = 2
    tab.page.select_option("#other", "tuned")
    tab.send("Who?")
    assert fake.most == 2
    base, tuned = sorted(fake.bodies, key=lambda body: body["model"])
    assert (base.pop("model"), tuned.pop("model")) == ("base", "tuned") and base == tuned
    assert [text.split(" with")[0] for text in tab.texts()] == ["I am base", "I am tuned"]
    tab.click("Go on from this", 1)
    tab.send("And?")
    for body in fake.bodies[2:]:
        assert [m["content"][:10] for m in body["messages"]] == ["Who?", "I am tuned", "And?"]
    boxes = [side.bounding_box() for side in tab.page.locator(".side").all()[:2]]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]


@browsed
def test_a_token_shows_its_probability_when_pointed_at(tab: Tab, fake: Fake) -> None:
    fake.say = lambda _: MARKUP
    tab.send("Show")
    shown = tab.page.inner_text(".text")
    tab.page.hover(".text")
    assert tab.page.inner_text(".text") == shown  # wrapping changes nothing that is read
    tab.page.hover(".text strong .token >> text=strong")
    tip = tab.page.inner_text("#tip")
    assert "8.2 %" in tip and "-2.500" in tip and "60.7 %" in tip and "cat" in tip
    assert tab.page.locator("#tip .drawn").count() == 1
    wrapped = tab.page.evaluate("""() => [...document.querySelectorAll('.text .token')].map(one => {
        const token = talk.messages[1].sides[0].tokens[one.dataset.place];
        return new TextDecoder().decode(new Uint8Array(token.bytes)).includes(one.textContent.trim())})""")
    assert all(wrapped) and len(wrapped) > 20


@browsed
def test_tokens_are_read_with_keys(tab: Tab, fake: Fake) -> None:
    halves = [b"A", "é".encode()[:1], "é".encode()[1:], " 🙂".encode()]
    said = [{"token": "", "logprob": -0.7, "bytes": [*half], "top_logprobs": []} for half in halves]
    piece = {"choices": [{"index": 0, "delta": {"content": "Aé 🙂"}, "logprobs": {"content": said}}]}
    fake.say = lambda _: [
        event(piece),
        event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
        event("[DONE]"),
    ]
    tab.send("Show")
    tab.click("Tokens")
    assert tab.page.evaluate("document.activeElement.textContent") == "Tokens"
    assert tab.page.locator(".tokens .token").all_text_contents() == ["A", "\\xc3", "é", " 🙂"]
    tab.page.focus(".tokens .token")
    names = []
    for _ in halves:
        names.append(tab.page.inner_text("#tip b"))
        tab.page.keyboard.press("ArrowRight")
    assert names == ["A", "\\xc3", "\\xa9", "·🙂"]
    assert "49.7 %" in tab.page.inner_text("#tip")
    tab.page.keyboard.press("Escape")
    assert tab.page.locator("#tip").is_hidden()


@browsed
def test_a_conversation_is_saved_for_chat_and_loaded_again(tab: Tab, fake: Fake, tmp_path: Path) -> None:
    tab.click("Settings")
    tab.page.fill("[name=system]", "Be brief.")
    tab.page.fill("[name=temperature]", "0.5")
    tab.send("One")
    fake.say = lambda _: (503, "the server is told to end")
    tab.send("Two")  # gets no answer, and so is no part of the conversation
    fake.say = lambda _: "Yes."
    tab.send("Three")
    said = [message["content"] for message in fake.bodies[-1]["messages"]]
    assert len(said) == 4 and said[:2] == ["Be brief.", "One"] and said[3] == "Three"
    with tab.page.expect_download() as download:
        tab.click("Save")
    path = tmp_path / "talk.json"
    download.value.save_as(path)
    row = json.loads(path.read_text())
    talk = Conversation.__new__(Conversation)
    talk.restore(row, "talk.json")
    assert (talk.system, [m["content"] for m in talk.messages]) == (said[0], [*said[1:], "Yes."])
    tab.click("New")
    tab.page.fill("[name=system]", "")
    tab.page.fill("[name=temperature]", "")
    tab.page.set_input_files("#file", path)
    tab.page.wait_for_selector(".bubble")
    assert tab.texts(".bubble") == ["One", "Three"] and tab.page.input_value("[name=temperature]") == "0.5"
    tab.send("Four")
    assert [m["content"] for m in fake.bodies[-1]["messages"]] == [*said, "Yes.", "Four"]
    path.write_text('{"messages": [{"role": "user"}]}')
    tab.page.set_input_files("#file", path)
    tab.page.wait_for_selector("#notice:has-text('Message 1')")
    tab.page.reload()
    tab.ready()
    assert tab.texts(".bubble") == ["One", "Three", "Four"]


@browsed
def test_a_key_is_asked_for_once_and_kept_in_the_tab(tab: Tab, fake: Fake) -> None:
    fake.key = "secret"
    tab.page.reload()
    for key in ("wrong", "secret"):
        tab.page.wait_for_selector("#ask[open]")
        assert "asks for a key" in tab.page.inner_text("#askwords")
        tab.page.fill("#key", key)
        tab.page.keyboard.press("Enter")
    tab.ready()
    tab.send("Hello")
    tab.page.reload()
    tab.ready()
    tab.send("Hello")
    fake.key = "other"
    tab.page.fill("#say", "Hello")
    tab.page.press("#say", "Enter")
    tab.page.wait_for_selector("#ask[open]")
    tab.page.fill("#key", "other")
    tab.page.keyboard.press("Enter")
    tab.wait()
    assert tab.texts()[-1].startswith("I am base")
    assert len(fake.bodies) == 3 and "secret" not in json.dumps(tab.context.storage_state())


@browsed
def test_an_error_is_said_beside_the_message_and_tried_again(tab: Tab, fake: Fake) -> None:
    fake.say = lambda _: (429, "the queue is full")
    tab.send("Hello")
    assert tab.texts(".error p") == ["The queue is full. Try again in 7 s."]
    whole = [event(one) for one in chunks({"messages": []}, "Half of it")]
    fake.say = lambda _: [*whole[:3], event({"error": {"message": "the logits are not finite"}})]
    tab.click("Try again")
    tab.wait()
    assert tab.texts(".error p") == ["The logits are not finite."] and tab.texts() == ["Half of"]
    fake.say = lambda _: whole[:3]
    tab.click("Try again")
    tab.wait()
    assert "ended before the answer was complete" in tab.texts(".error p")[0]
    fake.say = lambda _: "There."
    tab.click("Try again")
    tab.wait()
    assert tab.texts() == ["There."] and not tab.texts(".error p")
    assert len({body["seed"] for body in fake.bodies}) == 1


@browsed
def test_a_stream_is_read_wherever_it_is_cut(tab: Tab, fake: Fake) -> None:
    halves = 'data: {"choices": [{"index": 0,', 'data: "delta": {"content": "é🙂"}}]}'
    sent = b"\xef\xbb\xbf: keep-alive\r\n\r\nevent: x\r" + "\r".join(halves).encode() + b"\r\r"
    sent += b'id: 1\ndata:{"choices": [{"index": 0, "delta": {"content": " end"}}]}\n\ndata: [DONE]\r\r'
    middle = sent.index("🙂".encode()) + 2
    fake.pause, fake.say = 0.05, lambda _: [sent[: middle - 3], sent[middle - 3 : middle], sent[middle:]]
    tab.send("Bytes")
    assert tab.texts() == ["é🙂 end"] and not tab.texts(".error p")
    cut = tab.page.evaluate(
        """text => [...Array(text.length).keys()].every(at => {
        const events = new Events();
        const found = [...events.push(text.slice(0, at)), ...events.push(text.slice(at) + '\\n')];
        return JSON.stringify(found) === JSON.stringify(['a\\nb', 'c']);
    })""",
        "data: a\r\ndata: b\r\n\r\n:x\n\ndata:c\r\r",
    )
    assert cut


@browsed
def test_reasoning_is_folded_and_calls_are_answered(tab: Tab, fake: Fake) -> None:
    def piece(**delta: Any) -> bytes:
        return event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": '}}
    rest = {"index": 0, "function": {"arguments": "1}"}}
    end = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    fake.say = lambda _: [
        piece(reasoning_content="I must add."),
        piece(tool_calls=[call]),
        piece(tool_calls=[rest]),
        end,
        event("[DONE]"),
    ]
    tab.send("Add")
    assert not tab.page.locator(".thought").is_visible()
    tab.page.click(".reasoning summary")
    assert tab.texts(".thought") == ["I must add."]
    assert tab.texts(".call")[0].split() == ["Calls", "add", "{", '"a":', "1", "}"]
    fake.say = lambda _: "Two."
    tab.page.fill(".results textarea", "2")
    tab.click("Send results")
    tab.wait()
    user, calls, result = fake.bodies[-1]["messages"]
    assert calls["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'} and user["content"] == "Add"
    assert calls["reasoning_content"] == "I must add."
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "2"}


@browsed
def test_a_model_without_a_template_continues_text(tab: Tab, fake: Fake) -> None:
    tab.page.select_option("#model", "plain")
    fake.say = lambda _: " was a *girl*."
    tab.send("Once there")
    tab.send("")
    tab.send(" And so")
    prompts = ["Once there", "Once there was a *girl*.", "Once there was a *girl*. was a *girl*. And so"]
    assert [body["prompt"] for body in fake.bodies] == prompts
    assert all(body["logprobs"] == 5 and body["max_tokens"] == 256 for body in fake.bodies)
    assert tab.page.locator("#talk").inner_text().count("was a *girl*.") == 3  # no markdown
    tab.page.hover(".message:last-child .text")
    tab.page.hover(".message:last-child .text .token >> nth=1")
    assert "30.1 %" in tab.page.inner_text("#tip") and "·or" in tab.page.inner_text("#tip")
    tab.page.select_option("#other", "base")
    tab.send(" then")
    assert {body["model"] for body in fake.bodies[3:]} == {"plain", "base"}
    assert len({body["prompt"] for body in fake.bodies[3:]}) == 1
    tab.page.select_option("#other", "")
    tab.page.select_option("#model", "base")
    tab.click("New")
    tab.send("Hello")
    assert fake.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]  # it chats again
