"""train.tasks: tasks that are asked at each validation. They look at the weights and change nothing of the training."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.config import ModelConfig, Recipe, TrainConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.tasks import compare, named, requests, shots
from mlxgpt.common.tasks.scorer import ModelScorer
from mlxgpt.common.tasks.task import Continued, Task
from mlxgpt.common.tokenizers.protocol import Tokenizer

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value; no metrics where the model's numbers are not finite."""
DIGEST = "task "  # before its name, among the digests of a run


class Stopped(Exception):
    """A signal came while questions were asked."""


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run, all of which can be asked."""

    tasks: Sequence[Task]
    limit: int | None
    tokenizer: Tokenizer

    @property
    def digests(self) -> dict[str, str]:
        """``task NAME`` -> sha256 of the questions that are asked, and of what stands before them."""
        made = {}
        for task in self.tasks:
            questions = requests.first(task, self.limit)
            asked = map(compare.digest, questions, shots.before(task, questions))
            made[DIGEST + task.name] = hashlib.sha256("\0".join(asked).encode()).hexdigest()
        return made

    def score(self, backend: Backend, model: Any, say: Callable[[str], None], stopped: Callable[[], Any]) -> Scores:
        """What a model says now.

        Raises:
            Stopped: ``stopped`` said so.
        """

        def told(progress: str) -> None:
            if stopped():
                raise Stopped
            say(progress)

        scorer, found = ModelScorer(backend, model, self.tokenizer), {}
        for task in self.tasks:
            told(task.name)
            try:
                outcome = requests.ask(
                    task, scorer, self.limit, lambda text, name=task.name: told(f"{name}: {text}"), resamples=0
                )
                found[task.name] = {name: metric.value for name, metric in outcome.metrics.items()}
            except RunError:  # its numbers are not finite, of which the loop makes an end itself
                found[task.name] = {}
        return found


def read(train: TrainConfig) -> list[Task]:
    """The tasks that the settings name.

    Raises:
        UserError: a file that is no task, programs to run, or a name twice.
    """
    found: list[Task] = []
    for given in train.tasks:
        try:
            name, place = _parts(given)
            task = named.read(name, place or None)
        except UserError as error:
            raise UserError(f"train.tasks: {str(error).removeprefix('--task ')}") from None
        where = f"train.tasks: {given}"
        if task.kind == "code":
            raise UserError(f"{where}: programs are not run in training: expected mlxgpt eval --task with --run-code")
        if any(task.name == other.name for other in found):
            raise UserError(f"{where}: there is a task {task.name} already: expected each once")
        found.append(task)
    return found


def prepare(recipe: Recipe, tokenizer: Tokenizer | None, say: Callable[[str], None]) -> Tasks | None:
    """The tasks of a recipe; None where it has none. Says how many questions are asked and what is cut.

    Raises:
        UserError: as ``read``; questions that the model cannot be asked, or no validation.
    """
    settings = recipe.train
    if not settings.tasks:
        return None
    if not settings.eval_every:
        raise UserError(
            "train.tasks: expected train.eval_every, and data to validate on: tasks are asked at validations"
        )
    if recipe.model.labels:
        what = "a score" if recipe.model.scores else "labels"
        raise UserError(f"train.tasks: the model gives {what}, no text: expected tasks with a language model alone")
    if tokenizer is None:
        raise UserError("train.tasks: the data has ids and no tokenizer, and tasks have text: expected a tokenizer")
    limit = settings.task_limit or None
    tasks = read(settings)
    for task in tasks:
        try:
            _try(task, limit, recipe.model, tokenizer, say)
        except UserError as error:
            raise UserError(f"train.tasks: {task.name}: {error}") from None
    return Tasks(tasks, limit, tokenizer)


def _parts(given: str) -> tuple[str, str]:
    """The name of a published task and where its files are; else what was given, and ''."""
    name, _, place = given.partition("=")
    return (name, place) if name.isidentifier() else (given, "")


def _try(task: Task, limit: int | None, model: ModelConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    """Asks a model that says nothing, so that whatever cannot be asked is found before training."""

    def nothing(model: Any, groups: Any, *others: Any) -> list[list[Continued]]:
        return [[Continued(0.0, False)] * len(group.continuations) for group in groups]

    def silence(model: Any, tokenizer: Any, prompts: Sequence[Any], *others: Any, **more: Any) -> list[Any]:
        return [SimpleNamespace(text="")] * len(prompts)

    backend: Any = SimpleNamespace(
        scoring=SimpleNamespace(continuations=nothing), generate=SimpleNamespace(generate=silence)
    )
    outcome = requests.ask(task, ModelScorer(backend, SimpleNamespace(config=model), tokenizer), limit, resamples=0)
    count, whole = outcome.questions, len(task.questions)
    asked = f"{count}" if count == whole else f"{count} of {whole}"
    cut = f"; {outcome.cut} rows are longer than the context: their first tokens are left out" if outcome.cut else ""
    say(f"train.tasks: {task.name}: {asked} questions at each validation{cut}")
    for note in task.notes:
        say(f"train.tasks: {task.name}: {note}")


def absolute(train: TrainConfig) -> TrainConfig:
    """The settings with paths of tasks that are there made absolute, so that a run may move."""
    made = []
    for given in train.tasks:
        name, place = _parts(given)
        path = Path(place or name).expanduser()
        found = str(path.resolve()) if path.exists() else place or name
        made.append(f"{name}={found}" if place else found)
    return replace(train, tasks=tuple(made))


def expect_same(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Refuses to go on with other questions under the name of the first ones, in one curve.

    Raises:
        UserError: says which task.
    """
    for name, digest in after.items():
        if name.startswith(DIGEST) and before.get(name, digest) != digest:
            raise UserError(
                f"train.tasks: {name.removeprefix(DIGEST)}: other questions than the run began with, in one curve: "
                "expected the same file and train.task_limit, or another name"
            )


def shown(scores: Scores) -> str:
    """The first metric of each task, for a line of progress."""
    firsts = {task: next(iter(found.items()), ("", math.nan)) for task, found in scores.items()}
    return "".join(f"  {task} {metric} {value:.4f}" for task, (metric, value) in firsts.items())
