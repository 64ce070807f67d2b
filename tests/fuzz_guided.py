"""Searches a reader by coverage, with atheris (pip install atheris; Linux): what reaches new lines is damaged further.

    python tests/fuzz_guided.py READER [--minutes 10] [--seed 0]

An input is a number, which file of the valid model it replaces, and that file's bytes; ``fuzz_damage.py`` mutates them,
so that damage adds up, and ``fuzz_readers.py`` says what is wrong. Each kind of finding is printed once and its input
kept in the folder that is named.
"""

import argparse
import gc
import importlib
import random
import sys
import tempfile
from pathlib import Path
from types import FunctionType
from typing import Any

from fuzz_damage import damaged
from fuzz_readers import READERS, Fuzzer

LARGEST = 1 << 20  # bytes of an input


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    atheris: Any = importlib.import_module("atheris")  # in no list of requirements: Linux alone has wheels
    place = Path(tempfile.mkdtemp(prefix=f"fuzz-{args.reader}-"))
    (place / "model").mkdir()
    fuzzer = Fuzzer(args.reader, place / "model")
    names = sorted(fuzzer.seeds)
    corpus = place / "corpus"
    corpus.mkdir()
    for number, file in enumerate(names):
        (corpus / f"{number}").write_bytes(bytes([number]) + fuzzer.seeds[file])
    found: dict[str, int] = {}

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        fresh = len(data) < 2 or rng.random() < 0.3  # else the file that matters least would be all that is left
        number = rng.randrange(len(names)) if fresh else data[0] % len(names)
        content = fuzzer.seeds[names[number]] if fresh else data[1:]
        return (bytes([number]) + damaged(content, names[number].name, rng))[:largest]

    def one(data: bytes) -> None:
        wrong = fuzzer.read_with(names[data[0] % len(names)], data[1:]) if data else None
        if wrong:
            kind = wrong.split(": ")[0]
            if kind not in found:
                kept = place / f"finding-{len(found)}"
                kept.write_bytes(data)
                print(f"{args.reader}: {kept}: {wrong}", flush=True)
            found[kind] = found.get(kind, 0) + 1

    for item in gc.get_objects():
        if isinstance(item, FunctionType) and (item.__module__ or "").split(".")[0] in ("convert", "mlxgpt"):
            atheris.instrument_func(item)
    options = [
        f"-max_total_time={60 * args.minutes:.0f}",
        f"-seed={args.seed + 1}",
        f"-max_len={LARGEST}",
        "-timeout=600",
    ]
    # what is lazily imported maps pages that libFuzzer would count as a leak
    options += ["-rss_limit_mb=0", "-print_final_stats=1", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
