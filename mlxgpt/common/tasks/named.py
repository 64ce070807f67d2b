"""What --task may name: a .jsonl of one's own, a YAML file of lm-evaluation-harness, or a published task."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.tasks import own
from mlxgpt.common.tasks.task import Task

SHOWN = ("choice", "cloze", "answer", "code")  # the kinds that examples may stand before


def read_all(names: Sequence[str], data: str | None = None, shots: int | None = None) -> list[Task]:
    """The tasks that --task names, none twice; ``data``: where published files lie.

    Raises:
        UserError: as ``read``; two tasks have one name.
    """
    tasks = [read(name, data, shots) for name in names]
    for at, task in enumerate(tasks):
        if any(task.name == other.name for other in tasks[:at]):
            raise UserError(
                f"--task {names[at]}: a task {task.name} is there already: expected tasks of different names"
            )
    return tasks


def read(name: str, data: str | None = None, shots: int | None = None) -> Task:
    """The task that ``name`` is, with ``shots`` examples before each question; None: as the task has it.

    Raises:
        UserError: nothing has that name, a file that is no task, or examples for a kind that has none.
    """
    path = Path(name)
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"--task {name}: expected a .jsonl")
    task = own.read(path)
    if shots and task.kind not in SHOWN:
        raise UserError(f"--shots {shots}: {task.name} is of kind {task.kind}: expected 0")
    return task if shots is None else replace(task, shots=shots)
