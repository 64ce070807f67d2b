"""What pages take for granted and a reader has: a folder of texts, a run, rows, an adapter; all of them tiny.

Used in hidden fences: ``<!-- python run``. Each call makes what it says in the current folder and prints nothing.
"""

import contextlib
import io
import json
from pathlib import Path

from mlxgpt import cli

MODEL = ("data.vocab_size=300", "model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.block_size=64")
BRIEF = ("train.batch_size=4", "optim.warmup=1", "train.eval_every=0", "train.sample_every=0", "train.save_every=0")


def mlxgpt(*words: str) -> None:
    """A command that has to work.

    Raises:
        RuntimeError: it did not; with what it printed.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(words)
    if code:
        raise RuntimeError(f"mlxgpt {' '.join(words)}: exit code {code}: {out.getvalue()}")


def books(folder: str = "books", count: int = 12) -> None:
    """A folder of short texts."""
    Path(folder).mkdir()
    for n in range(count):
        lines = (f"{a} and {b} make {a + b}, said the reader of book {n}.\n" for a in range(9) for b in range(9))
        Path(folder, f"{n}.txt").write_text("".join(lines), encoding="utf-8")


def trained(out: str = "runs/first", *sets: str, source: str = "books") -> None:
    """A run of two steps on a folder of texts, which is made if it is not there."""
    if not Path(source).exists():
        books(source)
    all_sets = (f"data.source={source}", *MODEL, *BRIEF, *sets)
    mlxgpt("train", "pydocs", "--out", out, "--steps", "2", *(word for each in all_sets for word in ("--set", each)))


def rows(path: str = "rows.jsonl", count: int = 40) -> None:
    """Questions and answers."""
    made = ({"prompt": f"What is {n} plus {n}?\n", "completion": f"{n} plus {n} is {2 * n}."} for n in range(count))
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def tuned(out: str = "runs/qa", base: str = "runs/first") -> None:
    """An adapter on a run; the rows are made if they are not there."""
    if not Path("rows.jsonl").exists():
        rows()
    sets = (word for each in ("optim.warmup=1", "tune.block_size=32") for word in ("--set", each))
    mlxgpt("finetune", "--model", base, "--data", "rows.jsonl", "--out", out, "--steps", "2", *sets)
