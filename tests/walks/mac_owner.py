"""Somebody with a folder of fifteen texts: train, stop and go on, read what it writes, and why the loss is what it is.

python tests/walks/mac_owner.py
"""

import json
import sys
from pathlib import Path

from walk import TINY, books, check, command, lines, losses, main, offline, stopped

RUN = "runs/books"


def walk() -> None:
    """From ``mlxgpt`` alone to a diagnosis."""
    books("books", 15)
    command(says=("mlxgpt train --data books/", "verbs:"))
    command("train", "books/", code=2, says=("mlxgpt train --data books/",))
    check(not Path("runs").exists(), "a refused command writes nothing", list(Path().iterdir()))
    command("data", "inspect", "books/", says=("documents        15", "duplicates       0"))

    train = ("train", "--data", "books/", *TINY, "--steps", "2000", "--lr", "3e-3", "--set", "train.eval_every=20")
    text = stopped(RUN, 25, *train, "--set", "optim.warmup=5")
    for each in ("15 documents", "the ends of 15 of 15 documents", "unigram nats a token", "samples after"):
        check(each in text, f"the first run says {each!r}", text)
    again = f"mlxgpt train --resume {RUN}"
    check(again in text, f"Ctrl-C says how to go on: {again}", text)
    at = len(lines(RUN))
    check(at >= 25, "Ctrl-C keeps the steps that were done", at)

    to = str(at + 15)
    command(*again.split()[1:], "--stop-after", to, says=(f"resumes from step {at}", f"saved at step {to}"))
    command(*train, "--set", "optim.warmup=5", "--out", "runs/whole", "--stop-after", to)
    check(losses(RUN) == losses("runs/whole"), "a resumed run has the losses of one that was never stopped")
    check(losses(RUN)[-1] < losses(RUN)[0] - 0.5, "the loss falls", losses(RUN)[:: at // 2])

    asked = ("generate", "--model", RUN, "--prompt", "Ada saw the", "--max-tokens", "12", "--seed", "1")
    text = command(*asked)
    check(bool(text.strip()) and text == command(*asked), "a seed gives the same text again", text)

    command("report", RUN, "--out", "report.html", says=("report.html", "1 run"))
    check(all(each in offline("report.html") for each in ("<svg", "Ada")), "the report has curves and samples")
    text = command("diagnose", RUN, says=("books: step", "change:", "ln V"))
    found = json.loads(command("diagnose", RUN, "--json"))
    check(bool(found), "diagnose --json", found)
    for name, steps in (("short", "10"), ("long", "14")):
        command(*train, "--set", "optim.warmup=5", "--out", f"runs/{name}", "--steps", steps)
    command("train", "--resume", "runs/short", "--steps", "14", says=("step 14/14",))
    check(losses("runs/short") == losses("runs/long"), "a lengthened run is one of that length")
    command("runs", says=("books", "whole", "short"))


if __name__ == "__main__":
    sys.exit(main(walk))
