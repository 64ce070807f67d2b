"""The app: every route, and who answers it."""

import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.api.openapi import openapi
from mlxgpt.common.serve.api.service import Answer, Service
from mlxgpt.common.serve.page.page import page
from mlxgpt.common.serve.web import metrics
from mlxgpt.common.serve.web.door import Door
from mlxgpt.common.serve.web.log import Line, Log
from mlxgpt.common.serve.web.requests import leaves, read_json, unless_gone
from mlxgpt.common.serve.web.security import Guard
from mlxgpt.common.serve.web.settings import Settings
from mlxgpt.common.serve.work import Worker

Handler = Callable[[Request], Awaitable[Response]]


def make_app(worker: Worker, settings: Settings, log: Log | None = None) -> Starlette:
    """The app; ``app.state.draining`` is set to True when the server is told to end."""
    log, service = log or Log(), Service(worker, settings.max_prompts, settings.keep_alive_seconds)
    html, html_headers = page()

    @functools.cache
    def schema() -> Response:
        vocabulary = min(served.model.config.vocab_size for served in worker.served.values())
        return JSONResponse(openapi(list(worker.served), vocabulary))

    def check_alive() -> None:
        if worker.death is not None:
            raise ApiError(503, "the engine died; the server's log says why", code="engine_dead")
        if app.state.draining:
            raise ApiError(503, "the server is ending", code="draining")

    async def health(request: Request) -> Response:
        check_alive()
        return JSONResponse({"status": "ok"})

    async def show_metrics(request: Request) -> Response:
        text = metrics.text(worker, settings.backend, log.statuses)
        return PlainTextResponse(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def show_page(request: Request) -> Response:
        return Response(html, headers=html_headers)

    async def show_schema(request: Request) -> Response:
        return schema()

    async def models(request: Request) -> Response:
        return JSONResponse(service.models())

    async def model(request: Request) -> Response:
        return JSONResponse(service.model(request.path_params["name"]))

    def post(answer: Callable[..., Awaitable[Answer]], computes: bool = False) -> Handler:
        async def handle(request: Request) -> Response:
            check_alive()
            given = await read_json(request, settings)
            more: list[Any] = [lambda: leaves(request.receive)] if computes else []
            return _Sent(await answer(given, *more))

        return handle

    app = Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", health),
            Route("/metrics", show_metrics),
            Route("/openapi.json", show_schema),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", post(service.chat, True), methods=["POST"]),
            Route("/v1/completions", post(service.completions, True), methods=["POST"]),
            Route("/tokenize", post(service.tokenize), methods=["POST"]),
            Route("/detokenize", post(service.detokenize), methods=["POST"]),
        ],
        middleware=[Middleware(Door, Guard(settings), log, settings.retry_seconds)],
        exception_handlers={HTTPException: _no_route},
    )
    app.router.redirect_slashes = False
    app.state.draining = False
    return app


class _Sent(Response):
    """An Answer: JSON, or the events of a stream, which ends when its client leaves."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        kind = "text/event-stream" if answer.streams else "application/json"
        super().__init__(b"" if answer.streams else answer.body, 200, answer.headers, kind)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        line: Line = scope["state"]["line"]
        try:
            if self._answer.streams:
                await unless_gone(receive, self._stream(send))
            else:
                await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()
            line.tokens = self._answer.tokens()

    async def _stream(self, send: Send) -> None:
        headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        headers.append((b"x-accel-buffering", b"no"))  # a proxy passes each event on
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(self._answer.body) as events:  # pyright: ignore[reportArgumentType]
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method} is not for this path: expected {allowed}"
        raise ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    message = "nothing at this path: expected one of /openapi.json, such as /v1/models; a client's base URL ends in /v1"
    raise ApiError(404, message, code="not_found")
