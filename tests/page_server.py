"""A server that says what a test tells it to, for the chat page: its requests are kept, its answers scripted."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlxgpt.common.serve.page.page import page

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
        self.key = ""
        self.pause = 0.0  # seconds between two pieces
        self.say: Callable[[dict[str, Any]], Any] = lambda body: f"I am {body['model']} with seed {body['seed']}."
        self.reset()

    def reset(self) -> None:
        """As it was made."""
        self.bodies.clear()
        self.left, self.key, self.pause = 0, "", 0.0
        self.say = lambda body: f"I am {body['model']} with seed {body['seed']}."

    def _refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "this server asks for a key: found none that it knows"}}, 401)
        return None

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        data = [{"id": name, "object": "model", "chat": chat, "context": 512} for name, chat in MODELS]
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
        sent = said if isinstance(said, list) else [*map(event, chunks(body, said)), event("[DONE]")]
        done = False
        try:
            for piece in sent:
                yield piece
                await asyncio.sleep(self.pause)
            done = True
        finally:
            self.left += not done

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
