"""`mlxgpt serve` beside mlx_lm.server and transformers serve: tokens a second, the first token, memory, cold start.

    python -m benchmarks.serve [--rounds 5] [--clients 1 4 8 16] [--size "10M"] [--parts load turn ...] [--json]
    python -m benchmarks.serve --transformers PYTHON     with transformers serve of an environment that has fastapi

All load the same folder: a llama of random weights, float32, vocabulary 8,192; 10M has width 256 and 10 layers, 29M 512
and 8. A client sends one chat, below 8 clients two, one after the other: streamed, 70 to 90 tokens of prompt, 64 new
ones, temperature 0.8; no prompt comes twice. Servers take turns on one thread each; the clients use the other core, and
1 to 2 % of it. Seconds to the first token are a client's, of a round the median, or the upper quartile. mlx_lm.server
gets the BLAS that we get. transformers serve batches only with --continuous-batching, and samples only if told so.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Row, finish
from benchmarks.serving import load, servers
from benchmarks.serving.model import SIZES, SMALL, question, write_folder
from benchmarks.serving.servers import Server

TOKENS = 64  # new, a request
PARTS = ("load", "turn", "constrained", "cold", "memory")
FIRST = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
ENTRY = {"type": "object", "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
         "required": ["name", "count"], "additionalProperties": False}  # fmt: skip
SCHEMA = {"type": "array", "items": ENTRY, "minItems": 200}
_numbers = itertools.count(1)


def chats(
    server: Server, clients: int, seeded: bool, each: int = 1, more: dict[str, Any] | None = None
) -> list[list[dict[str, Any]]]:
    """The bodies of each client."""

    def body() -> dict[str, Any]:
        number = next(_numbers)
        given = {"messages": [{"role": "user", "content": question(number)}], "max_tokens": TOKENS, "temperature": 0.8}
        return server.body(**given, **STREAM, **({"seed": number} if seeded else {}), **(more or {}))

    return [[body() for _ in range(each)] for _ in range(clients)]


def ratio(
    what: str, against: str, unit: str, pairs: Sequence[tuple[float, float]], goal: str = "", *sides: Server
) -> Row:
    """Pairs of ours and a peer's figure."""
    ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
    memory = [side.resident("VmHWM") for side in sides] or [0.0, 0.0]
    return Row(what, against, unit, ours, peer, [a / b for a, b in pairs], goal, *memory)


def loads(size: str, folder: str, rounds: int, counts: Sequence[int], python: str) -> list[Row]:
    """Many clients at once, without seeds and with them."""
    peers = [servers.mlx_lm(folder)]
    if python:
        peers += [servers.transformers(folder, python),
                  servers.transformers(folder, python, "--continuous-batching", "--cb-num-blocks", "64")]  # fmt: skip
        peers[-1].name += ", batching"
    sides = [servers.ours(folder), servers.ours(folder, "torch"), *peers]
    for side in sides:
        side.start(FIRST)
        load.run(side.port, chats(side, 2, False))
    found: dict[tuple[str, int, bool], list[load.Load]] = {}
    for _ in range(rounds):
        for seeded, count in itertools.product((False, True), counts):
            for side in (sides[0], peers[0]) if seeded else sides:
                made = load.run(side.port, chats(side, count, seeded, 2 if count < 8 else 1))
                found.setdefault((side.name, count, seeded), []).append(made)
    rows = []
    measures: list[tuple[str, str, Callable[[load.Load], float]]] = [
        ("", "tok/s", lambda made: made.tokens_a_second),
        (", first token", "s", lambda made: made.first()),
        (", first token, upper quartile", "s", lambda made: made.first(quartile=True)),
    ]
    for seeded, (what, unit, figure), count in itertools.product((False, True), measures, counts):
        pairings = [(sides[0], peers[0])] + [(sides[1], peer) for peer in peers[1:] if not seeded]
        for ours, peer in pairings:
            goal = ("1.0", "2.0")[seeded] if count == 8 and unit == "tok/s" and peer is peers[0] else ""
            name = "MLX" if ours is sides[0] else "torch"
            label = f"{name}, {size}, {count} client{'s' * (count > 1)}{', seeds' * seeded}{what}"
            both = [[figure(made) for made in found[side.name, count, seeded]] for side in (ours, peer)]
            pairs = list(zip(*both, strict=True))
            rows.append(ratio(label, peer.name, unit, pairs, goal and f">= {goal}", ours, peer))
    for side in sides:
        side.stop()
    return rows


def turns(size: str, folder: str, rounds: int) -> list[Row]:
    """The first token of the second turn of a long chat, with what the first turn left and without."""
    sides = [servers.ours(folder), servers.ours(folder, "mlx", "--cache-bytes", "0")]
    peer = servers.mlx_lm(folder)
    seconds: dict[str, list[float]] = {}
    shares = []
    for side in (*sides, peer):
        side.start(FIRST)
    for _ in range(rounds + 1):
        start = next(_numbers)
        for side in (*sides, peer):
            chat = [{"role": "user", "content": " ".join(question(start + i) for i in range(20))}]
            first = load.run(side.port, [[side.body(messages=chat, max_tokens=16, temperature=0, **STREAM)]]).answers[0]
            chat += [{"role": "assistant", "content": first.text}, {"role": "user", "content": question(start)}]
            second = load.run(side.port, [[side.body(messages=chat, max_tokens=16, temperature=0, **STREAM)]]).answers[
                0
            ]
            seconds.setdefault(str(side.port), []).append(second.first or 0.0)
            if side is sides[0]:
                shares.append(second.usage)
    for side in (*sides, peer):
        side.stop()
    ours, without, theirs = (seconds[str(side.port)][1:] for side in (*sides, peer))
    cached = shares[-1].get("prompt_tokens_details", {}).get("cached_tokens", 0)
    what = f"MLX, {size}, second turn, {cached:,} of {shares[-1]['prompt_tokens']:,} tokens cached, first token"
    return [ratio(what, "the same, --cache-bytes 0", "s", list(zip(ours, without, strict=True))),
            ratio(what, peer.name, "s", list(zip(ours, theirs, strict=True)))]  # fmt: skip


def constrained(size: str, folder: str, rounds: int) -> list[Row]:
    """Answers that a JSON schema forms, beside free ones: seconds a token of 8 clients."""
    rows = []
    for backend in ("mlx", "torch"):
        side = servers.ours(folder, backend).start(FIRST)
        schema = {"type": "json_schema", "json_schema": {"name": "entries", "schema": SCHEMA, "strict": True}}
        pairs = []
        for _ in range(rounds + 1):
            made = [load.run(side.port, chats(side, 8, True, more=more)) for more in ({"response_format": schema}, {})]
            pairs.append(tuple(1 / one.tokens_a_second for one in made))
        code = side.stop()
        assert code == 0, code
        name = "MLX" if backend == "mlx" else backend
        rows.append(ratio(f"{name}, {size}, 8 clients, JSON schema, a token", "free text", "s", pairs[1:], "<= 1.1"))
    return rows


def cold(size: str, folder: str, rounds: int, python: str) -> list[Row]:
    """From the start of the process to the end of its first answer of two tokens."""
    sides = [servers.ours(folder), servers.ours(folder, "torch"), servers.mlx_lm(folder)]
    if python:
        sides.append(servers.transformers(folder, python))
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    memory: dict[str, float] = {}
    for _ in range(rounds + 1):
        for side in sides:
            seconds[side.name].append(side.start(FIRST).ready)
            memory[side.name] = side.resident("VmHWM")
            side.stop()
    rows = []
    for ours, peer in itertools.product(sides[:2], sides[2:]):
        pairs = list(zip(seconds[ours.name][1:], seconds[peer.name][1:], strict=True))
        name = "MLX" if ours is sides[0] else "torch"
        made = ratio(f"{name}, {size}, start to first answer", peer.name, "s", pairs)
        made.memory, made.peer_memory = memory[ours.name], memory[peer.name]
        rows.append(made)
    return rows


def memory(folder: str, requests: int = 1000, leaving: int = 200) -> list[Row]:
    """Resident memory before and after many requests, of which some are left in the middle; of a small model."""
    write_folder(Path(folder), SMALL)
    rows = []
    for backend in ("mlx", "torch"):
        side = servers.ours(folder, backend, "--cache-bytes", "4MiB").start(FIRST)

        def some(count: int, side: Server = side) -> None:
            each = max(count // 8, 1)
            load.run(side.port, [[body | {"max_tokens": 8} for body in own] for own in chats(side, 8, False, each)])

        def hang_up(side: Server = side) -> None:
            load.leave(side.port, [body for own in chats(side, 8, False, leaving // 8) for body in own], 8)

        some(300)  # the cache of prefixes is full, and every width was computed once
        hang_up()
        before = side.resident()
        some(requests // 2)
        hang_up()
        some(requests // 2)
        after = side.resident()
        code = side.stop()
        assert code == 0, code
        name = "MLX" if backend == "mlx" else backend
        what = f"{name}, small, resident after {requests:,} requests, {leaving} more left"
        rows.append(Row(what, "before them", "MiB", after, before, [after / before], "flat"))
    return rows


def measure(parts: Sequence[str], sizes: Sequence[str], rounds: int, counts: Sequence[int], python: str) -> list[Row]:
    """The rows of all parts; the larger model is only loaded by 8 clients."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in sizes:
            folder = str(Path(temporary) / size)
            write_folder(Path(folder), SIZES[size])
            least = size == next(iter(SIZES))
            if "load" in parts:
                rows += loads(size, folder, rounds, counts if least else [8], python)
            if not least:
                continue
            if "turn" in parts:
                rows += turns(size, folder, rounds)
            if "constrained" in parts:
                rows += constrained(size, folder, rounds)
            if "cold" in parts:
                rows += cold(size, folder, rounds, python)
            if "memory" in parts:
                rows += memory(str(Path(temporary) / "small"))
    return rows


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--size", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--transformers", metavar="PYTHON", default="", help="a Python that has transformers[serving]")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    finish(measure(args.parts, args.size, args.rounds, args.clients, args.transformers), args.json)


if __name__ == "__main__":
    main()
