"""For tests of the chat page: a server that says what a test tells it to, and a browser that shows its page."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from book.pdf import browser as chromium
from mlxgpt.common.serve.page.page import page

browsed = pytest.mark.skipif(chromium() is None, reason="no Chromium here (Debian: apt install chromium)")
MARKUP = """A *first* line with **strong** words and `code`, 5 < 6 &amp; 7.

1. One
2. Two

| a | b |
|---|---|
| 1 | 2 |

```
x = 1
```
See [here](https://example.com/a)."""
MODELS = (("base", True), ("tuned", True), ("plain", False))


def event(said: dict[str, Any] | str) -> bytes:
    return f"data: {said if isinstance(said, str) else json.dumps(said)}\n\n".encode()


def pieces(text: str) -> list[str]:
    """The text cut as a tokenizer might: words with the space before them."""
    words = text.replace("\n", " \n").split(" ")
    return [words[0], *(word if word.startswith("\n") else f" {word}" for word in words[1:])]


def scores(token: str) -> dict[str, Any]:
    """Log-probabilities of a token as a chat's stream has them; the first letter decides how likely it is."""
    logprob = -0.01 if token.strip()[:1].isupper() else -2.5
    others = [("the", -0.5), (token, logprob), (" cat", -4.0)]
    top = [{"token": name, "logprob": value, "bytes": [*name.encode()]} for name, value in others]
    return {"token": token, "logprob": logprob, "bytes": [*token.encode()], "top_logprobs": top}


def chunks(body: dict[str, Any], text: str) -> Iterator[dict[str, Any]]:
    """The text as a stream of either endpoint."""
    tokens = pieces(text)
    chat = "messages" in body
    if chat:
        yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    for token in tokens:
        if chat:
            logprobs = {"content": [scores(token)]} if body.get("logprobs") else None
            yield {"choices": [{"index": 0, "delta": {"content": token}, "logprobs": logprobs, "finish_reason": None}]}
        else:
            one = {"tokens": [token], "token_logprobs": [-1.2], "top_logprobs": [{token: -1.2, " or": -1.5}]}
            yield {"choices": [{"index": 0, "text": token, "logprobs": one, "finish_reason": None}]}
    yield {"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "stop"}]}
    usage = {"prompt_tokens": 10, "completion_tokens": len(tokens), "total_tokens": 10 + len(tokens)}
    yield {"choices": [], "usage": usage}


class Fake:
    """``say(body)`` gives a text, an error (status, message), or the bytes of a stream."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.left = 0  # clients that went before the end
        self.open, self.most = 0, 0  # streams, and the most at once
        self.key = ""
        self.pause = 0.0  # seconds between two pieces
        self.together = 1  # streams that must be open before any goes on, if they come within seconds
        self.say: Callable[[dict[str, Any]], Any] = lambda body: f"I am {body['model']} with seed {body['seed']}."
        self.reset()

    def reset(self) -> None:
        """As it was made."""
        self.bodies.clear()
        self.left, self.most, self.key, self.pause, self.together = 0, 0, "", 0.0, 1
        self.say = lambda body: f"I am {body['model']} with seed {body['seed']}."

    def _refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "this server asks for a key: found none that it knows"}}, 401)
        return None

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        data = [{"id": name, "object": "model", "chat": chat, "max_model_len": 512} for name, chat in MODELS]
        return self._refused(request) or JSONResponse({"object": "list", "data": data})

    async def answer(self, request: Request) -> Response:
        """POST of either endpoint."""
        if refused := self._refused(request):
            return refused
        body = json.loads(await request.body())
        self.bodies.append(body)
        said = self.say(body)
        if isinstance(said, tuple):
            status, message = said
            headers = {"Retry-After": "7"} if status == 429 else {}
            return JSONResponse(
                {"error": {"message": message, "type": "x", "param": None, "code": None}}, status, headers
            )
        return StreamingResponse(self._stream(body, said), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], said: str | list[bytes]) -> AsyncIterator[bytes]:
        sent = said if isinstance(said, list) else [*(event(one) for one in chunks(body, said)), event("[DONE]")]
        done = False
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            for _ in range(500):
                if self.most < self.together:
                    await asyncio.sleep(0.01)
            for piece in sent:
                yield piece
                await asyncio.sleep(self.pause)
            done = True
        finally:
            self.left += not done
            self.open -= 1

    def app(self) -> Starlette:
        """Its routes."""
        html, headers = page()

        async def index(_: Request) -> Response:
            return Response(html, headers=headers)

        return Starlette(
            routes=[
                Route("/", index),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
                Route("/v1/completions", self.answer, methods=["POST"]),
            ]
        )


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Serves the app in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    server.force_exit = True
    thread.join(10)


class Tab:
    """The page in a browser of its own, with what it asked for and complained about."""

    def __init__(self, browser: Any, url: str, key: str = "", **options: Any) -> None:
        self.asked: list[str] = []
        self.said: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}} | options)
        self.context.set_default_timeout(30000)
        self.page = self.context.new_page()
        self.url = url
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda line: self.said.append(line.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(url)
        if key:
            self.page.fill("#key", key)
            self.page.press("#key", "Enter")
        self.ready()

    def ready(self) -> None:
        """Waits until the models are known."""
        self.page.wait_for_selector("#model option", state="attached")

    def send(self, text: str) -> None:
        """Writes it, presses Enter, and waits until all answers are there."""
        self.page.fill("#say", text)
        self.page.press("#say", "Enter")
        self.wait()

    def wait(self) -> None:
        """Waits until no answer grows."""
        self.page.wait_for_selector("body:not(.busy)")

    def texts(self, selector: str = ".text") -> list[str]:
        """What is read in every such element."""
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def click(self, name: str, place: int = -1) -> None:
        """Clicks the button of this name, the last one if there are several."""
        found = self.page.get_by_role("button", name=name, exact=True)
        (found.nth(place) if place >= 0 else found.last).click()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A Chromium of this machine."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])


@contextlib.contextmanager
def opened(started: Any, url: str, key: str = "") -> Iterator[Tab]:
    """The page, which at the end has asked nobody else for anything, and has complained about nothing."""
    tab = Tab(started, url, key)
    yield tab
    foreign = [one for one in tab.asked if not one.startswith((url, "data:", f"blob:{url}"))]
    tab.context.close()
    assert not foreign
    assert not [line for line in tab.said if "Failed to load resource" not in line]
