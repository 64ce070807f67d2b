"""The outermost layer of the app: every request passes it, is answered once, and leaves one line in the log."""

import secrets
import traceback
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxgpt.common.serve.api.errors import ApiError, Gone
from mlxgpt.common.serve.web.log import Line, Log
from mlxgpt.common.serve.web.security import HEADERS, Guard

LEFT = 499  # in the log and in /metrics: the client left before an answer


class Door:
    """Refuses what the guard refuses, adds the headers of every answer, and writes the log.

    ``scope["state"]["line"]`` is the request's line; whoever computes adds its tokens.
    """

    def __init__(self, app: ASGIApp, guard: Guard, log: Log, retry_seconds: int) -> None:
        self._app, self._guard, self._log, self._retry = app, guard, log, str(retry_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        client = scope["client"][0] if scope.get("client") else "-"
        line = Line(client, scope["method"], scope["path"], LEFT, "req_" + secrets.token_hex(8))
        scope.setdefault("state", {})["line"] = line
        started = False
        more = _has_body(scope)  # that the client may still send

        async def hear() -> Message:
            nonlocal more
            message = await receive()
            more = more and bool(message.get("more_body", False))
            return message

        async def say(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, line.status = True, message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in (*HEADERS, *self._guard.cors(scope), (b"x-request-id", line.id.encode())):
                    headers.setdefault(name.decode(), value.decode("latin-1"))
                if line.status == 503:
                    headers.setdefault("retry-after", self._retry)
                if more:
                    headers["connection"] = "close"  # the rest of the body is not read
            await send(message)

        try:
            self._guard.check_place(scope)
            if (allowed := self._guard.preflight(scope)) is not None:
                await _empty(allowed, say)
                return
            self._guard.check_key(scope)
            await self._app(scope, hear, say)
        except ApiError as error:
            line.note = error.logged
            if not started:
                await answer(error, say)
        except Gone:
            line.note = line.note or "the client left"
        except Exception as error:
            line.note = _where(error)
            if not started:  # else it breaks off, which a client takes for what it is
                await answer(ApiError(500, "the server failed; its log says how"), say)
        finally:
            self._log(line)


async def answer(error: ApiError, send: Send) -> None:
    """Sends an error."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(error.body)).encode())]
    headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error.body})


async def _empty(headers: list[tuple[bytes, bytes]], send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
        for name, value in scope["headers"]
    )


def _where(error: Exception) -> str:
    """An error that nobody expected, with its place."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name} line {frame.lineno})"
