"""The life of the server's process: it drains when it is told to end, and ends by itself when the engine dies."""

import asyncio
import contextlib
import errno
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.serve.engine import Engine
from mlxgpt.common.serve.web.app import make_app
from mlxgpt.common.serve.web.connection import server as make_server
from mlxgpt.common.serve.web.log import Log
from mlxgpt.common.serve.web.settings import Settings

LOOKS = 0.2  # seconds between looks at the engine
LAST_BYTES = 5.0  # seconds in which the last answers of an engine that has ended go out
LAST_WORDS = 1.0  # seconds in which requests of an engine that died or was stopped are answered


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; ``port`` 0 is any that is free.

    Raises:
        UserError: no such address here, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        made = socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        cure = "; --port takes another, 0 any that is free" if error.errno == errno.EADDRINUSE else ""
        why = (error.strerror or str(error)).partition(" (")[0].lower()
        raise UserError(f"--host {host} --port {port}: {why}{cure}") from None
    made.setblocking(False)
    return made


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(
    engine: Engine, settings: Settings, sock: socket.socket, grace: float, ready: Callable[[], None] = lambda: None
) -> int:
    """Serves until a signal comes.

    SIGTERM and Ctrl-C: no new connections; what runs may take ``grace`` seconds more, and is told if it took longer.
    A second one ends at once. ``ready`` is called when signals mean that.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C, 143 or 130 after a second signal.

    Raises:
        RunError: the engine died.
    """
    code = asyncio.run(_run(engine, settings, sock, grace, ready))
    leave(engine, code)
    return code


def leave(engine: Engine, code: int) -> None:
    """Ends the process here if the engine's thread still computes: PyTorch aborts if Python ends under it."""
    if not engine.join(0):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


async def _run(engine: Engine, settings: Settings, sock: socket.socket, grace: float, ready: Callable[[], None]) -> int:
    log = Log()
    app: Any = make_app(engine, settings, log)
    server = _Server(make_server(app, settings, log).config)
    server.config.timeout_graceful_shutdown = math.ceil(grace + LAST_WORDS)
    got: list[int] = []
    loop = asyncio.get_running_loop()

    def told(number: int) -> None:
        got.append(number)
        if len(got) == 1 and (left := engine.counts.running + engine.counts.waiting):
            answers, again = "answer" if left == 1 else "answers", "Ctrl-C" if number == signal.SIGINT else "a signal"
            line = f"ending: {left} {answers} may take {grace:g} s more; {again} again ends at once"
            print(line, file=sys.stderr, flush=True)
        app.state.draining = server.should_exit = True
        server.force_exit = len(got) > 1
        engine.stop(drain=len(got) == 1)
        loop.call_later(grace, engine.stop, False)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told, number)
    watch = asyncio.create_task(_watch(engine, server))
    ready()
    try:
        await server.serve([sock])
    finally:
        watch.cancel()
        engine.stop(drain=False)
        await asyncio.to_thread(engine.join, LAST_WORDS)
    if engine.death is not None:
        raise RunError(f"the engine died: {type(engine.death).__name__}: {engine.death}")
    if len(got) > 1:
        return 128 + got[-1]
    return 0 if got[:1] == [signal.SIGTERM] else 130


async def _watch(engine: Engine, server: uvicorn.Server) -> None:
    """Ends the server some time after its engine died; where it was drained, clients that still send are left."""
    while not engine.join(0):
        await asyncio.sleep(LOOKS)
    if engine.death is None:
        await asyncio.sleep(LAST_BYTES)
        server.force_exit = True
        return
    await asyncio.sleep(LAST_WORDS)
    server.config.timeout_graceful_shutdown = math.ceil(LAST_WORDS)
    server.should_exit = True
