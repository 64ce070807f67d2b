"""Clients of an OpenAI-compatible server that cost it little: they note what arrives and when, and read it afterwards.

Each client is a task on one event loop with a connection of its own a request; nothing is parsed while others wait.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What a streamed request got."""

    began: float
    status: int = 0
    tokens: int = 0
    text: str = ""
    reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    first: float | None = None  # seconds to the first text
    seconds: float = 0.0
    body: str = ""  # of an answer that is no stream


@dataclass
class Load:
    """Many clients for a while."""

    answers: list[Answer]
    seconds: float
    busy: float  # CPU seconds of the clients themselves

    @property
    def tokens_a_second(self) -> float:
        """New tokens of all clients."""
        return sum(answer.tokens for answer in self.answers) / self.seconds

    def first(self, quartile: bool = False) -> float:
        """Seconds to the first text: the median, or the upper quartile."""
        found = [answer.first for answer in self.answers if answer.first is not None]
        if len(found) < 2:
            return found[0]
        return statistics.quantiles(found, n=4, method="inclusive")[2 if quartile else 1]


async def post(
    port: int, path: str, body: dict[str, Any], leave_after: int = 0
) -> tuple[list[tuple[float, bytes]], float]:
    """What arrived and when; ``leave_after`` arrivals, the client hangs up."""
    data = json.dumps(body).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    arrived = []
    while part := await reader.read(2**16):
        arrived.append((time.perf_counter(), part))
        if len(arrived) == leave_after:
            break
    writer.close()
    return arrived, began


def body_of(arrived: Sequence[tuple[float, bytes]]) -> tuple[int, list[tuple[float, bytes]]]:
    """The status and the body, each piece of it with its time; chunks put together."""
    raw, times = b"", []
    for at, part in arrived:
        raw += part
        times.append((len(raw), at))
    head, _, rest = raw.partition(b"\r\n\r\n")
    if not head:
        return 0, []
    status, at = int(head.split(b" ", 2)[1]), len(head) + 4

    def when(end: int) -> float:
        return next(time for size, time in times if size >= end)

    if b"transfer-encoding: chunked" not in head.lower():
        found, end = [], at
        for line in rest.splitlines(keepends=True):
            end += len(line)
            found.append((when(end), line))
        return status, found
    found = []
    while at < len(raw):
        line = raw.index(b"\r\n", at)
        size = int(raw[at:line], 16)
        if not size:
            break
        found.append((when(min(line + 2 + size, len(raw))), raw[line + 2 : line + 2 + size]))
        at = line + 4 + size
    return status, found


def events_of(pieces: Sequence[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """The data of server-sent events, each with the time at which it was whole."""
    found, rest = [], b""
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        found += [(at, line[5:].strip()) for line in lines if line.startswith(b"data:")]
    return found


def read(arrived: Sequence[tuple[float, bytes]], began: float) -> Answer:
    """The events of a stream, put together."""
    answer = Answer(began)
    answer.status, pieces = body_of(arrived)
    answer.seconds = (arrived[-1][0] if arrived else began) - began
    events = events_of(pieces)
    if not events:
        answer.body = b"".join(piece for _, piece in pieces).decode("utf-8", "replace")
    for at, event in events:
        if event == b"[DONE]":
            continue
        chunk = json.loads(event)
        answer.usage = chunk.get("usage") or answer.usage
        if "error" in chunk:
            answer.body = event.decode()
        for choice in chunk.get("choices") or ():
            text = (choice.get("delta") or choice).get("content") or choice.get("text") or ""
            if text and answer.first is None:
                answer.first = at - began
            answer.text += text
            answer.reason = choice.get("finish_reason") or answer.reason
    answer.tokens = answer.usage.get("completion_tokens", 0)
    return answer


async def clients(port: int, bodies: Sequence[Sequence[dict[str, Any]]], path: str) -> Load:
    """A client for each list of bodies, which it sends one after the other."""

    async def client(own: Sequence[dict[str, Any]]) -> list[tuple[list[tuple[float, bytes]], float]]:
        return [await post(port, path, body) for body in own]

    start, cpu = time.perf_counter(), time.process_time()
    found = await asyncio.gather(*(client(own) for own in bodies))
    seconds, busy = time.perf_counter() - start, time.process_time() - cpu
    answers = [read(*one) for own in found for one in own]
    for answer in answers:
        if answer.status != 200 or answer.reason is None:
            raise SystemExit(
                f"port {port}: status {answer.status}, reason {answer.reason}: {answer.body or answer.text}"[:500]
            )
    return Load(answers, seconds, busy)


def run(port: int, bodies: Sequence[Sequence[dict[str, Any]]], path: str = "/v1/chat/completions") -> Load:
    """The same, from a program without a loop."""
    return asyncio.run(clients(port, bodies, path))


def leave(port: int, bodies: Sequence[dict[str, Any]], at_once: int, path: str = "/v1/chat/completions") -> None:
    """Clients that hang up in the middle: some before the first piece of the answer, others after a few."""

    async def one(number: int, body: dict[str, Any], gate: asyncio.Semaphore) -> None:
        async with gate:
            await post(port, path, body, leave_after=1 + number % 6)

    async def everyone() -> None:
        gate = asyncio.Semaphore(at_once)
        await asyncio.gather(*(one(number, body, gate) for number, body in enumerate(bodies)))

    asyncio.run(everyone())
