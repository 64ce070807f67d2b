"""Connections: what uvicorn's leave open. Time limits, a limit of their number, and errors in OpenAI's shape."""

import asyncio
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.web.door import Door
from mlxgpt.common.serve.web.log import Line, Log, to_stderr
from mlxgpt.common.serve.web.security import HEADERS, Guard, not_http, too_long
from mlxgpt.common.serve.web.settings import Settings

LINGER_SECONDS = 2.0  # that a refused body is still read, and thrown away: its sender reads no answer before it ends
LINGER_BYTES = 64 * 2**20
SPARE = 32  # connections past the limit that are told so; further ones are dropped


def server(app: ASGIApp, settings: Settings, log: Log) -> uvicorn.Server:
    """A server of the app within the limits."""

    async def full(scope: Scope, receive: Receive, send: Send) -> None:
        close = {"Connection": "close"}
        raise ApiError(503, "too many connections are open", code="too_many_connections", headers=close)

    overflow = Door(full, Guard(settings), log, settings.retry_seconds)

    def protocol(**options: Any) -> Connection:
        return Connection(settings, log, overflow, **options)

    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="asyncio",
        http=protocol,  # pyright: ignore[reportArgumentType]  # called as a class is
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.idle_seconds,
        h11_max_incomplete_event_size=settings.max_headers,
    )
    to_stderr()
    return uvicorn.Server(config)


class _Transport:
    """A transport whose close() reads on a while if the client still sends, so that it comes to read the answer."""

    def __init__(self, transport: asyncio.Transport, sends: Callable[[], bool]) -> None:
        self._transport, self._sends = transport, sends
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing() or not self._sends():
            self._transport.close()
            return
        self.lingers = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.abort)


class Connection(H11Protocol):
    """A client's connection."""

    transport: Any

    def __init__(self, settings: Settings, log: Log, overflow: ASGIApp, **options: Any) -> None:
        super().__init__(**options)
        self._settings, self._log, self._overflow = settings, log, overflow
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._thrown = 0  # bytes read while lingering

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(_Transport(transport, self._sends))  # pyright: ignore[reportArgumentType]
        more = len(self.connections) - self._settings.max_connections
        if more > SPARE:
            self._log(Line(self._client(), status=503, note="too many connections: dropped"))
            transport.abort()
            return
        if more > 0:
            self.app = self._overflow  # pyright: ignore[reportAttributeAccessIssue]
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._timer, self._stall = _off(self._timer), _off(self._stall)

    def data_received(self, data: bytes) -> None:
        if self.transport.lingers:
            self._thrown += len(data)
            if self._thrown > LINGER_BYTES:
                self.transport.abort()
            return
        if not self.transport.is_closing():
            super().data_received(data)
            self._wait_for_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._unset_keepalive_if_required()  # part of a next request has come
        self._wait_for_headers()

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self._settings.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall = _off(self._stall)

    def _unsupported_upgrade_warning(self) -> None:
        """A request that would rather be another protocol is answered as it is."""

    def _sends(self) -> bool:
        """Whether more may come of a request that was answered."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.conn.trailing_data[0])

    def _client(self) -> str:
        return self.client[0] if self.client else "-"

    def _wait_for_headers(self) -> None:
        """Starts the clock where a request has begun whose headers are not whole, and stops it where they are."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing() or self.timeout_keep_alive_task is not None:
            self._timer = _off(self._timer)
        elif self._timer is None:
            self._began = time.monotonic()
            self._timer = self.loop.call_later(self._settings.header_seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if not self.conn.trailing_data[0]:
            self.transport.close()  # no request has begun: browsers open connections that they may not use
        else:
            seconds = self._settings.header_seconds
            self._refuse(ApiError(408, f"the request's headers took more than {seconds:g} s", code="request_timeout"))

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP, or too long: called by uvicorn where h11 raises."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(too_long(self._settings.max_headers))
        else:
            # without what h11 quotes: it may be a key
            why = re.sub(r":? (bytearray\(|b['\"]).*", "", str(error), flags=re.DOTALL)
            self._refuse(not_http(why))

    def _refuse(self, error: ApiError) -> None:
        """Answers without the app, where no answer has begun, and ends the connection."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if (line := cycle.scope.get("state", {}).get("line")) is not None and not cycle.response_started:
                line.status, line.note = error.status, error.message
            cycle.disconnected = True  # the app's own answer is dropped
            cycle.message_event.set()
        else:
            self._log(Line(self._client(), status=error.status, note=error.message, began=self._began))
        headers = [*HEADERS, (b"content-type", b"application/json"), (b"content-length", str(len(error.body)).encode())]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reason = STATUS_PHRASES[error.status]
            response = h11.Response(
                status_code=error.status, headers=[*headers, (b"connection", b"close")], reason=reason
            )
            for event in (response, h11.Data(data=error.body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()


def _off(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
