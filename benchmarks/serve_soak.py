"""A long run of `mlxgpt serve` among clients of all kinds: is any answer wrong or lost, and does memory stay flat?

    python -m benchmarks.serve_soak [--minutes 20] [--backend mlx] [--clients 12] [--seed 0] [--no-write]

A base and two adapters of random weights. 300 seeded requests were answered before by `generate` alone (chats, texts
and ids; n, stop strings, penalties, logit_bias, logprobs), or, where a grammar forms the answer (JSON schemas, tools),
by the server with nobody else there; 12 clients ask for them at random, half of them streamed, and each answer must be
that one to the character. One request in eight is left by its client, at once or later; one in twelve is rubbish; the
queue is short, so that some are told to come again. At the end a SIGTERM comes in the middle of answers, which must be
completed, and the process must end with 0.

Exit code 1 where an answer was wrong or missing, the server holds a request that nobody waits for, or resident memory
grew by more than 2 % with confidence after the first tenth, or the interval is too wide to say so.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import DOCS, replace_section
from benchmarks.serving import clients, pool, servers
from benchmarks.serving.model import SMALL, write_adapter, write_folder
from benchmarks.soak import LIMITS, Trend, trend

CASES, SCALE = 300, 6.0
FIRST = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def write_models(place: Path) -> tuple[Path, list[str]]:
    """The base, and the adapters as --adapter has them."""
    write_folder(place / "base", SMALL, SCALE)
    for number in (1, 2):
        write_adapter(place / f"adapter{number}", place / "base", number)
    return place / "base", [f"style{number}={place}/adapter{number}" for number in (1, 2)]


def make_cases(backend: str, base: Path, adapters: list[str], count: int, seed: int = 0) -> list[pool.Case]:
    """Requests with their answers; loads the models in this process."""
    from mlxgpt.common import backend as backends
    from mlxgpt.common.serve import models

    found = backends.load(backend)
    loaded = models.load_all(found, models.Options(str(base), adapters=adapters, device="cpu"))
    return pool.make({each.name: each for each in loaded}, found.generate, count, seed)


async def end(server: servers.Server, cases: list[pool.Case], tally: clients.Tally) -> int:
    """SIGTERM in the middle of answers, all of which must be right; the exit code."""
    asked = [asyncio.create_task(clients.ask(server.port, case, True, tally)) for case in cases]
    while json_metrics(server)["mlxgpt_requests_running"] < 2 and not all(one.done() for one in asked):
        await asyncio.sleep(0)
    code = await asyncio.to_thread(server.stop)
    await asyncio.gather(*asked)
    return code


def json_metrics(server: servers.Server) -> dict[str, float]:
    """What the server counts."""
    return clients.metrics(server.ask("/metrics").decode())


def settled(server: servers.Server, seconds: float = 30.0) -> tuple[dict[str, float], list[str]]:
    """What the server counts when its clients have gone, and what is wrong with that after so long at the most."""
    until = time.monotonic() + seconds
    while wrong := clients.lost(counted := json_metrics(server)):  # a row leaves before the next step, not at once
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    return counted, wrong


def soak(
    backend: str, minutes: float, count: int, seed: int
) -> tuple[clients.Tally, dict[str, float], np.ndarray, list[str]]:
    """What the clients saw, what the server counts, its resident memory over time in MiB, and what is wrong."""
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        base, adapters = write_models(Path(folder))
        cases = make_cases(backend, base, adapters, CASES, seed)
        words = [word for adapter in adapters for word in ("--adapter", adapter)]
        words += ["--max-batch", "8", "--max-queue", "3", "--cache-bytes", "8MiB"]
        server = servers.ours(str(base), backend, *words).start(FIRST)

        async def run() -> clients.Tally:
            if wrong := await clients.alone(server.port, cases):
                raise SystemExit(wrong[0])
            stop = time.monotonic() + minutes * 60

            async def watch() -> None:
                while time.monotonic() < stop:
                    memory.append(server.resident())
                    await asyncio.sleep(min(1.0, minutes * 60 / 200))

            watching = asyncio.create_task(watch())
            tally = await clients.crowd(server.port, cases, count, seed, lambda _: time.monotonic() < stop)
            await watching
            return tally

        tally = asyncio.run(run())
        counted, wrong = settled(server)
        long = [case for case in cases if case.expected and len(case.expected[0].text) > 20][:6]
        if code := asyncio.run(end(server, long, tally)):
            wrong.append(f"exit code {code} after SIGTERM, expected 0")
    return tally, counted, np.array(memory), tally.wrong + wrong


def report(backend: str, tally: clients.Tally, counted: dict[str, float], seen: Trend) -> list[str]:
    """A row of the table."""
    growth = f"{seen.growth:+.2%} ({seen.low:+.2%} to {seen.high:+.2%})"
    return [
        backend, f"{tally.answers:,}", f"{tally.choices:,}", f"{tally.left:,}", f"{tally.refused:,}", f"{tally.busy:,}",
        f"{counted['mlxgpt_choices_cancelled_total']:,.0f}", f"{counted['mlxgpt_generated_tokens_total']:,.0f}",
        str(len(tally.wrong)), f"{seen.level:.0f} MiB", growth, seen.verdict(LIMITS["rss"]),
    ]  # fmt: skip


HEAD = ["backend", "answers held against", "choices", "left by clients", "rubbish", "told to wait", "choices cancelled",
        "tokens", "wrong or lost", "resident", "growth (95 % interval)", "memory"]  # fmt: skip


def main() -> int:
    """Runs, prints the table and what is wrong, and keeps the table in docs/reliability.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of each backend; default: 20")
    parser.add_argument("--backend", nargs="+", choices=("mlx", "torch"), default=["mlx", "torch"])
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="leave docs/reliability.md as it is")
    args = parser.parse_args()
    rows, bad = [], []
    for backend in args.backend:
        tally, counted, memory, wrong = soak(backend, args.minutes, args.clients, args.seed)
        seen = trend(memory)
        rows.append(report(backend, tally, counted, seen))
        bad += [f"{backend}: {line}" for line in wrong]
        if seen.verdict(LIMITS["rss"]) != "flat":
            bad.append(f"{backend}: resident memory: {seen.verdict(LIMITS['rss'])}")
        print(json.dumps(dict(sorted(tally.statuses.items()))), file=sys.stderr)
    lines = [" | ".join(["", *line, ""]).strip() for line in (HEAD, ["---"] * len(HEAD), *rows)]
    print("\n".join([*lines, *(line[:400] for line in bad[:10])]))
    if not args.no_write:
        write(lines, args.minutes, bad)
    return 1 if bad else 0


def write(lines: list[str], minutes: float, bad: list[Any]) -> None:
    """The section of docs/reliability.md."""
    from benchmarks.__main__ import describe

    verdict = (
        "nothing wrong, nothing lost, flat memory" if not bad else "NOT so: " + "; ".join(line[:100] for line in bad)
    )
    body = f"`python -m benchmarks.serve_soak --minutes {minutes:g}`: {verdict}.\n\n" + "\n".join(lines)
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    made = replace_section(page, "Soak of the server", f"{body}\n\n{describe()}.\n", "Memory settings")
    (DOCS / "reliability.md").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
