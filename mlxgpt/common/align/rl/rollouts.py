"""rollouts.jsonl: what a policy drew and what it was rewarded with, a completion a line; resuming cuts it.

A rollout's rows stand behind each other: those of a prompt together, in the order in which they were drawn. ``old`` has
log-probabilities where rl.updates > 1, so that a run that was stopped between two of them goes on exactly.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.files import atomic_write, flush

FILE = "rollouts.jsonl"


@dataclass(frozen=True)
class Line:
    """One completion. Floats survive the way through JSON bit for bit."""

    step: int  # the first update from the rollout
    prompt: int  # row of the prompts, from 0
    sha256: str  # of the prompt's tokens, its first half
    ids: list[int]  # with the token that ended it
    ended: bool
    text: str
    rewards: dict[str, float]
    reward: float  # the weighted sum
    advantage: float
    old: list[float] = field(default_factory=list)  # log-probabilities of ids when they were drawn


def path_of(given: str | Path) -> Path:
    """The file of a run, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(given).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file: expected a run of mlxgpt rl, or its {FILE}")
    return path


def read(path: Path) -> Iterator[list[Line]]:
    """The rollouts of a file, in order; a last line that a crash truncated is skipped.

    Raises:
        UserError: a line before the last that is none.
    """
    yield from (list(rows) for _, rows in groupby(_lines(path), key=lambda line: line.step))


def _lines(path: Path) -> Iterator[Line]:
    damage = ""
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if damage:
                raise UserError(damage)
            try:
                yield Line(**json.loads(text))
            except (ValueError, TypeError):
                damage = f"{path} row {number}: {text.strip()[:40]!r}: expected what mlxgpt rl writes"


def append(run: Path, lines: Sequence[Line]) -> None:
    """Adds a rollout; it is on disk before a checkpoint can need it.

    Raises:
        RunError: the system refuses to write.
    """
    try:
        with open(run / FILE, "a", encoding="utf-8") as file:
            file.write("".join(map(_text, lines)))
            file.flush()
            flush(file.fileno())
    except OSError as error:
        raise RunError(f"{run / FILE}: {error.strerror}") from None


def _text(line: Line) -> str:
    return json.dumps(_described(line), ensure_ascii=False) + "\n"


def _described(line: Line) -> dict[str, Any]:
    made = asdict(line)
    if not line.old:
        del made["old"]
    return made


def cut(run: Path, step: int) -> list[Line]:
    """Drops the rollouts that began after ``step``; the last that is left."""
    if not (run / FILE).exists():
        return []
    kept: list[list[Line]] = []
    try:
        for rows in read(run / FILE):
            if rows[0].step > step:
                break
            kept.append(rows)
    except UserError:
        if not kept:
            raise
    with atomic_write(run / FILE) as file:
        file.write("".join(_text(line) for rows in kept for line in rows).encode())
    return kept[-1] if kept else []


def first_difference(ours: Iterable[Sequence[int]], theirs: Iterable[Sequence[int]]) -> tuple[int, int] | None:
    """The row and the token, from 0, from which completions differ; None where none does."""
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if list(one) != list(other):
            pairs = enumerate(zip(one, other, strict=False))
            return row, next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
    return None
