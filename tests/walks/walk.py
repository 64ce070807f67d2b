"""What the walks of this folder share: commands as a user types them, in an empty folder, and what they must say.

A walk is a script: ``python tests/walks/mac_owner.py`` prints each step; exit code 1 and one line where one fails.
Commands run in this process, which saves their start; ``$ python`` ones in a process of their own.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

os.environ.setdefault("MLXGPT_DEVICE", "cpu")  # as the suite: bits are compared; MLXGPT_DEVICE=auto takes the GPU

from mlxgpt import cli  # noqa: E402

# the sizes that a user leaves out: a model of 50 thousand parameters
TINY = (
    "--batch-size", "4", "--set", "model.n_layer=1", "--set", "model.n_head=4", "--set", "model.n_embd=32",
    "--set", "model.block_size=64", "--set", "data.vocab_size=300",
)  # fmt: skip


AUTHORS = tuple("Ada Ben Cleo Dan Eva Finn Gus Hal Ida Jon Kit Lea Max Nell Otto".split())  # noqa: SIM905


class Lost(Exception):
    """The user would leave here: the step, and what it said."""


def check(good: bool, what: str, found: object = "") -> None:
    """Raises Lost unless ``good``."""
    if not good:
        raise Lost(f"{what}; found: {' '.join(str(found).split())[-600:]}")


def command(*words: str, code: int = 0, says: tuple[str, ...] = (), typed: str = "", backend: str | None = None) -> str:
    """Runs ``mlxgpt WORDS`` and returns what it printed; errors too, if ``code`` is not 0.

    Args:
        code: the exit code that it must have.
        says: texts that must be in what it prints.
        typed: what the user types while it runs.
        backend: torch for ``python -m torch_ref WORDS``.
    """
    line = " ".join(["python -m torch_ref" if backend else "mlxgpt", *words])
    print(f"$ {line}", flush=True)
    out, err, before, sys.stdin = io.StringIO(), io.StringIO(), sys.stdin, io.StringIO(typed)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found = cli.main(list(words), backend=backend)
    finally:
        sys.stdin = before
    text = out.getvalue() + err.getvalue()
    check(found == code, f"{line}: exit code {found}, expected {code}", text)
    check("Traceback" not in text, f"{line}: no traceback", text)
    for each in says:
        check(each in text, f"{line}: expected it to say {each!r}", text)
    return text if code else out.getvalue()


def stopped(run: str, steps: int, *words: str) -> str:
    """Runs a training command and presses Ctrl-C once ``steps`` of it stand in the run's metrics."""

    def press() -> None:
        while not over.is_set() and len(lines(run)) < steps:
            time.sleep(0.01)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    over, handler = threading.Event(), signal.signal(signal.SIGINT, signal.default_int_handler)
    finger = threading.Thread(target=press)
    finger.start()
    try:
        return command(*words, code=130)
    finally:
        over.set()
        finger.join()
        signal.signal(signal.SIGINT, handler)


def program(*words: str, says: tuple[str, ...] = ()) -> str:
    """Runs ``python WORDS`` from here and returns what it printed."""
    print(f"$ python {' '.join(words)}", flush=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    text = done.stdout + done.stderr
    check(done.returncode == 0, f"python {' '.join(words)}: exit code {done.returncode}, expected 0", text)
    for each in says:
        check(each in text, f"python {' '.join(words)}: expected it to say {each!r}", text)
    return text


def lines(run: str, split: str = "train") -> list[dict[str, Any]]:
    """Whole lines of a run's metrics."""
    path = Path(run, "metrics.jsonl")
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
    return [line for line in map(json.loads, whole) if line.get("split") == split]


def losses(run: str) -> list[float]:
    """Training losses of a run, by step."""
    return [line["loss"] for line in lines(run)]


def offline(page: str) -> str:
    """The text of a page that must open from disk and load nothing."""
    text = Path(page).read_text(encoding="utf-8")
    for mark in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        check(mark not in text, f"{page}: expected a page that loads nothing", mark)
    return text


def books(folder: str, count: int) -> None:
    """Texts of different authors: each has a name and words of its own."""
    Path(folder).mkdir()
    for n, name in enumerate(AUTHORS[:count]):
        draw = Random(n)
        words = ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(3)) for _ in range(20)]
        told = [f"{name} saw the {draw.choice(words)} and the {draw.choice(words)}." for _ in range(60)]
        Path(folder, f"{name.lower()}.txt").write_text("\n".join([f"The book of {name}.", *told]) + "\n")


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A new folder as the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def main(walk: Callable[[], None]) -> int:
    """Walks in an empty folder; 1 and one line where the user would leave."""
    with empty_folder():
        try:
            walk()
        except Lost as error:
            print(f"lost: {error}", file=sys.stderr)
            return 1
    print("arrived")
    return 0
