"""How long ``mlxgpt --help`` takes and how much memory it needs, beside mlx-lm's commands.

python -m benchmarks.startup [--rounds 9] [--json]
"""

import argparse
import os
import statistics
import sys
import time

from benchmarks.report import Row, finish

OURS = [sys.executable, "-m", "mlxgpt", "--help"]
PEER = [sys.executable, "-m", "mlx_lm", "generate", "--help"]


def once(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a whole process."""
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        # spawned, not forked: a child counts the pages of the parent that it was forked from
        process = os.posix_spawn(
            command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, nowhere.fileno(), fd) for fd in (1, 2)]
        )
        _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    runs = [(once(OURS), once(PEER)) for _ in range(args.rounds + 1)][1:]
    seconds, memory = ([(ours[i], peer[i]) for ours, peer in runs] for i in (0, 1))
    rows = []
    for what, pairs, scale, unit, goal in (
        ("mlxgpt --help, time", seconds, 1, "s", "at most 0.15 s"),
        ("mlxgpt --help, peak memory", memory, 2**-20, "MiB", "at most 40 MB"),
    ):
        ours, peer = (statistics.median(pair[i] for pair in pairs) * scale for i in (0, 1))
        rows.append(Row(what, "mlx_lm.generate --help", unit, ours, peer, [a / b for a, b in pairs], goal))
    finish(rows, args.json)


if __name__ == "__main__":
    main()
