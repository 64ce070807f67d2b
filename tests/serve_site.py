"""mlxgpt serve's web half on a real socket: uvicorn in a thread, and a client that may send anything."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mlxgpt.common.serve.web import life
from mlxgpt.common.serve.web.app import make_app
from mlxgpt.common.serve.web.connection import server
from mlxgpt.common.serve.web.log import LOG, Log
from mlxgpt.common.serve.web.settings import Settings
from mlxgpt.common.serve.work import Worker

WAIT = 60  # seconds after which a test gives up


class Reply:
    """What came back on a connection, of its first answer; ``rest`` follows it."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        head, _, rest = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split(" ")[1]) if raw else 0
        pairs = [line.partition(": ") for line in lines]
        self.headers = {name.lower(): value for name, _, value in pairs}
        if self.headers.get("transfer-encoding") == "chunked":
            self.body, self.whole = _dechunked(rest)
        else:
            length = int(self.headers.get("content-length", len(rest)))
            self.body, self.rest, self.whole = rest[:length], rest[length:], len(rest) >= length

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, whose shape is OpenAI's."""
        assert self.json.keys() == {"error"} and self.headers["content-type"] == "application/json"
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"] and "\n" not in error["message"]
        return error


def _dechunked(rest: bytes) -> tuple[bytes, bool]:
    """The body, and whether it ended as it should."""
    made = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        if not int(size, 16):
            return made, True
        made, rest = made + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return made, False


class Site:
    """A server, and ways to ask it."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.lines: list[str] = []
        self.log, self.worker = Log(), worker
        self.socket = life.bind(settings.host, 0)
        self.port = self.socket.getsockname()[1]
        self.settings = replace(settings, port=self.port)
        self.app = make_app(worker, self.settings, self.log)
        self.server = server(self.app, self.settings, self.log)
        self.host = f"Host: 127.0.0.1:{self.port}\r\n".encode()

    def connect(self) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port))
        made.settimeout(WAIT)
        return made

    def raw(self, data: bytes) -> Reply:
        """Sends bytes, and reads until the server closes."""
        with self.connect() as client:
            client.sendall(data)
            return Reply(read(client))

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
        """A request as a client makes it, on a connection of its own."""
        return self.raw(self.request(method, path, body, headers))

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> bytes:
        fields = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"}
        if body is not None:
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        fields |= headers or {}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + (body or b"")

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, None, named(headers))

    def post(self, path: str, value: Any, **headers: str) -> Reply:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.ask("POST", path, body, named(headers))

    def until(self, holds: Callable[[], Any]) -> None:
        """Waits for what another thread does."""
        end = time.monotonic() + WAIT
        while not holds():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.002)

    def rest(self) -> None:
        """Waits until no request is being answered: its line comes after its answer."""
        self.until(lambda: not self.server.server_state.tasks)

    def take_lines(self, count: int) -> list[str]:
        """The lines of so many requests, and no more."""
        self.until(lambda: len(self.lines) >= count)
        self.rest()
        taken, self.lines[:] = self.lines[:], []
        assert len(taken) == count, taken
        return taken


def named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def read(client: socket.socket) -> bytes:
    """All that the server sends."""
    made = b""
    try:
        while part := client.recv(1 << 16):
            made += part
    except ConnectionResetError:
        made += b""
    return made


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if not (line := record.getMessage()).startswith("ignored: "):  # said once of a field, not of a request
            self._lines.append(line)


@contextmanager
def serving_site(worker: Worker, settings: Settings | None = None) -> Iterator[Site]:
    """A server that answers until the block ends."""
    site = Site(worker, settings or Settings())
    handler = _Lines(site.lines)
    LOG.addHandler(handler)
    thread = threading.Thread(target=site.server.run, args=([site.socket],), daemon=True)
    thread.start()
    try:
        site.until(lambda: site.server.started)
        yield site
    finally:
        site.server.should_exit = site.server.force_exit = True
        thread.join(WAIT)
        LOG.removeHandler(handler)
        assert not thread.is_alive()
