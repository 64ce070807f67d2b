"""Clients as they are: they ask all kinds of things, leave in the middle, send rubbish, and come again when told so."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.pool import CHAT, TEXT, Case, choices_of

LIMIT = 120.0  # seconds after which an answer counts as lost
RUBBISH: tuple[tuple[str, bytes, tuple[int, ...]], ...] = (
    (CHAT, b'{"messages": [', (400,)),
    (CHAT, b"\xff\xfe", (400,)),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', (400,)),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}', (400,)),
    (CHAT, b'{"messages": []}', (400,)),
    (CHAT, b'{"model": "../../etc", "messages": [{"role": "user", "content": "a"}]}', (404,)),
    (TEXT, b'{"prompt": "a", "suffix": "b"}', (400,)),
    (TEXT, json.dumps({"prompt": "a " * 9000}).encode(), (400,)),
    (TEXT, b'{"prompt": [1000000]}', (400,)),
    (TEXT, b'{"prompt": "a", "logit_bias": {"1": 1e999}}', (400,)),
    ("/v1/nothing", b"{}", (404,)),
)


@dataclass
class Tally:
    """What happened."""

    answers: int = 0
    choices: int = 0
    left: int = 0
    refused: int = 0  # rubbish
    busy: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


async def send(port: int, path: str, data: bytes, seconds: float = LIMIT, pieces: int = 0) -> list[tuple[float, bytes]]:
    """What arrives; the client hangs up after so many pieces, or seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    loop, arrived = asyncio.get_running_loop(), []
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        )
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        async with asyncio.timeout(seconds):
            while part := await reader.read(2**16):
                arrived.append((loop.time(), part))
                if len(arrived) == pieces:
                    break
    finally:
        writer.close()
    return arrived


async def ask(port: int, case: Case, stream: bool, tally: Tally, pause: float = 0.02) -> None:
    """One request to its end, again while the server is busy, held against what it must say."""
    body = case.body | ({"stream": True} if stream else {})
    shown = json.dumps(body)
    while True:
        try:
            status, found, error = choices_of(await send(port, case.path, shown.encode()))
        except Exception as problem:
            tally.wrong.append(f"{type(problem).__name__} {problem}: {shown}")
            return
        tally.statuses[status] += 1
        if status != 429:
            break
        tally.busy += 1
        await asyncio.sleep(pause)
    tally.answers, tally.choices = tally.answers + 1, tally.choices + len(found)
    if status != 200 or error:
        tally.wrong.append(f"status {status}, {error}: {shown}")
    elif case.expected is None:
        case.expected = found
    elif found != case.expected:
        tally.wrong.append(f"found {found}, expected {case.expected}: {shown}")


async def leave(port: int, case: Case, rng: random.Random, tally: Tally) -> None:
    """One request whose client hangs up: at once, in the queue, in the prompt, or in the answer."""
    stream = rng.random() < 0.7
    body = case.body | {"max_tokens": 400} | ({"stream": True} if stream else {})
    tally.left += 1
    try:
        pieces = rng.randrange(1, 12) if stream else 0
        await send(port, case.path, json.dumps(body).encode(), rng.choice([0.0, 0.01, 0.1]), pieces)
    except TimeoutError:
        return
    except OSError as problem:
        tally.wrong.append(f"{type(problem).__name__} {problem}: a request that its client leaves")


async def rubbish(port: int, rng: random.Random, tally: Tally) -> None:
    """A request that is none."""
    path, data, statuses = rng.choice(RUBBISH)
    tally.refused += 1
    status, _, error = choices_of(await send(port, path, data))
    tally.statuses[status] += 1
    if status not in statuses or set(json.loads(error)) != {"error"}:
        tally.wrong.append(f"status {status}, {error}: expected {statuses}: {data[:100]!r}")


async def alone(port: int, cases: Sequence[Case]) -> list[str]:
    """Each case whose answer is not known, one after the other; what is wrong."""
    tally = Tally()
    for case in cases:
        if case.expected is None:
            await ask(port, case, False, tally)
    return tally.wrong


async def crowd(port: int, cases: Sequence[Case], count: int, seed: int, goes_on: Callable[[Tally], bool]) -> Tally:
    """So many clients, each of which asks one thing after the other."""
    tally = Tally()

    async def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while goes_on(tally) and len(tally.wrong) < 20:
            what = rng.random()
            if what < 0.12:
                await leave(port, rng.choice(cases), rng, tally)
            elif what < 0.2:
                await rubbish(port, rng, tally)
            else:
                await ask(port, rng.choice(cases), rng.random() < 0.5, tally)
            if rng.random() < 0.1:
                await asyncio.sleep(rng.random() * 0.2)

    await asyncio.gather(*map(client, range(count)))
    return tally


def metrics(text: str) -> dict[str, float]:
    """Prometheus' text as a dict, names with their labels."""
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def lost(found: dict[str, float], failed: int = 0) -> list[str]:
    """What the server still holds though every client has gone, or says of failures; so many are planted."""
    names: dict[str, Any] = {"mlxgpt_up": 1, "mlxgpt_requests_running": 0, "mlxgpt_requests_waiting": 0,
                             "mlxgpt_choices_failed_total": failed}  # fmt: skip
    return [f"{name} is {found[name]:g}: expected {value}" for name, value in names.items() if found[name] != value]
