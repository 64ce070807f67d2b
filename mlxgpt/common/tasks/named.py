"""What --task may name: a .jsonl of one's own, a YAML file of lm-evaluation-harness, or a published task."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.tasks import own
from mlxgpt.common.tasks.harness import read as harness
from mlxgpt.common.tasks.published import arc, crows_pairs, gsm8k, hellaswag, lambada, mmlu, piqa, programs, winogrande
from mlxgpt.common.tasks.task import Task

SHOWN = ("choice", "cloze", "answer", "code")  # the kinds that examples may stand before
PUBLISHED: dict[str, Callable[[str, Path, int], Task]] = {
    "hellaswag": hellaswag.read,
    "arc_easy": arc.read,
    "arc_challenge": arc.read,
    "piqa": piqa.read,
    "winogrande": winogrande.read,
    "lambada_openai": lambada.read,
    "lambada_standard": lambada.read,
    "gsm8k": gsm8k.read,
    "crows_pairs_english": crows_pairs.read,
    "humaneval": programs.humaneval,
    "mbpp": programs.mbpp,
    **dict.fromkeys(mmlu.NAMES, mmlu.read),
}
_SHOTS = {"gsm8k": gsm8k.SHOTS, "mbpp": programs.SHOTS}  # where lm-evaluation-harness has not 0


def read_all(names: Sequence[str], data: str | None = None, shots: int | None = None) -> list[Task]:
    """The tasks that --task names, none twice; ``data``: where the files of published ones lie.

    Raises:
        UserError: as ``read``; two tasks have one name; ``data`` is given, and none is published.
    """
    tasks = [read(name, data, shots) for name in names]
    if data is not None and not any(name in PUBLISHED for name in names):
        raise UserError(f"--data {data}: {names[0]} names its own file: expected --data only with a published task")
    for at, task in enumerate(tasks):
        if any(task.name == other.name for other in tasks[:at]):
            raise UserError(f"--task {names[at]}: there is a task {task.name} already: expected each once")
    return tasks


def read(name: str, data: str | None = None, shots: int | None = None) -> Task:
    """The task that ``name`` is, with ``shots`` examples before each question; None: as the task has it.

    Raises:
        UserError: nothing has that name, a file that is no task, or examples for a kind that has none.
    """
    path = Path(name)
    if name in PUBLISHED:
        task = _published(name, data, shots)
    elif path.suffix.lower() == ".jsonl":
        task = own.read(path)
    elif path.suffix.lower() in (".yaml", ".yml"):
        task = harness.read(path, shots)
    elif path.exists():
        raise UserError(f"--task {name}: expected a .jsonl of questions or a YAML of lm-evaluation-harness")
    else:
        known = ", ".join(each for each in PUBLISHED if not each.startswith("mmlu_"))
        raise UserError(f"--task {name}: no such file or task{nearest(name, PUBLISHED)}: expected FILE.jsonl, {known}")
    if shots and task.kind not in SHOWN:
        raise UserError(f"--shots {shots}: {task.name} is of kind {task.kind}: expected 0")
    return task if shots is None else replace(task, shots=shots)


def _published(name: str, data: str | None, shots: int | None) -> Task:
    if data is None:
        raise UserError(f"--task {name}: expected --data PATH, the folder with its files or the file of its questions")
    task = PUBLISHED[name](name, Path(data), _SHOTS.get(name, 0) if shots is None else shots)
    alike = sum(len(set(each.choices)) < len(each.choices) for each in task.questions)
    note = f"{alike} of {len(task.questions)} questions have equal choices, as published"
    return replace(task, notes=(*task.notes, note)) if alike else task
