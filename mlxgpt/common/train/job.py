"""What a kind of training supplies (Kind), and what the loop works with (Job)."""

import shlex
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from mlxgpt.common.backend import Backend
from mlxgpt.common.batch import Engine, Source
from mlxgpt.common.config import Recipe
from mlxgpt.common.runs.checkpoint import Checkpoint, RunState
from mlxgpt.common.runs.metrics import Metrics
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.train.progress import Progress
from mlxgpt.common.train.tasks import Tasks

Weights = dict[str, Any]
"""Canonical name -> float32 array, or affine.Quantized for a frozen matrix."""


S = TypeVar("S", bound=Source)


class Kind(Protocol[S]):
    """A kind of training, such as pretrain.Pretraining and sft.finetune.Finetuning.

    ``session.run`` calls the methods of a new or a resumed run in the order in which they stand here, then the loop
    calls the last group. Each may raise UserError; before ``weights`` returns, nothing has been written.
    """

    verb: ClassVar[str]
    """The command that begins a run of this kind and resumes it."""
    begin_only: ClassVar[tuple[str, ...]]
    """Arguments that a resumed run refuses."""
    args: Namespace
    recipe: Recipe
    """Set by ``read_settings`` or ``read_stored``, completed by the methods after them."""
    source: S
    """Set by ``open_source`` or ``reopen_source``."""
    init_from: str | None = None
    """What environment.json names as the origin of the first weights."""
    objective: Callable[[Any, Any], Any] | None = None
    """A program's own, which the engine takes in place of the recipe's."""
    own: tuple[str, ...] = ()
    """What of the run a program has and no command: source, objective."""
    ends_at_second: bool = True
    """Whether a second Ctrl-C ends the process."""
    tasks: Tasks | None = None
    """What train.tasks asks, set behind the source."""
    reasons: tuple[str, ...] = ()
    """Why the recipe is as it is: comments at the top of the run's recipe.toml."""

    # A new run.

    def read_settings(self) -> tuple[Path | None, str]:
        """Sets ``recipe`` from the arguments and the files that they name.

        Returns:
            The run folder that was asked for, and what to call the run where none was.
        """
        ...

    def open_model(self) -> None:
        """Puts the model that training starts from, if there is one, into the recipe; runs before any data is read."""

    def open_source(self) -> None:
        """Sets ``source``, and completes the recipe with what follows from the data."""
        ...

    # A resumed run.

    def read_stored(self, run: Path, stored: dict[str, Any]) -> None:
        """Sets ``recipe`` from the run's recipe.toml and the arguments."""
        ...

    def reopen_source(self, run: Path, newest: Checkpoint | None) -> None:
        """Sets ``source`` for a run that resumes from ``newest``, or from step 1 where it has no checkpoint."""
        ...

    # Both.

    @property
    def seeded(self) -> bool:
        """Whether the seed alone makes the first weights again; if not, they are saved before step 1."""
        ...

    def weights(self, place: Path | None) -> Weights:
        """All weights as the engine takes them: of the checkpoint ``place``, or those that a new run starts from."""
        ...

    def set_first_state(self, engine: Engine, state: RunState) -> None:
        """Gives a new run what it starts from beside its weights."""

    @property
    def spells(self) -> Tokenizer | None:
        """The tokenizer of the texts that the model learns from; None where it learns from ids."""
        ...

    def digests(self) -> dict[str, str]:
        """Name -> sha256 of what must be the same when the run is resumed."""
        return self.source.digest

    def describe_source(self) -> dict[str, Any]:
        """What environment.json says about the data."""
        ...

    # The loop.

    def begun(self, job: "Job") -> None:
        """What needs the engine before the first step of a new or a resumed run; the run's folder is there."""

    def figures(self, step: int, sums: dict[str, float]) -> dict[str, float]:
        """Metrics of a training step, of what its objective added up, the ``weight`` of the loss among it."""
        return {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}

    def write_weights(self, place: Path, trained: dict[str, np.ndarray]) -> None:
        """Writes the model or adapter of a checkpoint into the folder ``place``."""
        ...

    def sample(self, job: "Job") -> Mapping[str, str] | str | None:
        """Text that the model writes now, or parts of it (samples.Sample); None where no samples are wanted."""

    def score(self, job: "Job", total: dict[str, float]) -> dict[str, float]:
        """More metrics of a validation, whose engine sums are ``total``."""
        return {}

    def trial(self, run: Path) -> str:
        """The command with which to try what the run made, TEXT for what is to be filled in."""
        return f"generate --model {shlex.quote(str(run))} --prompt TEXT"

    def again(self, run: Path) -> str:
        """What resumes the run."""
        return f"mlxgpt {self.verb} --resume {shlex.quote(str(run))}"

    def finish(self, job: "Job") -> None:
        """What is measured once, after the last step."""


@dataclass
class Job:
    """All that the loop works with. ``state`` is where it starts from."""

    run: Path
    kind: Kind[Any]
    backend: Backend
    engine: Engine
    state: RunState
    metrics: Metrics
    progress: Progress
    stop_after: int = 0  # 0: at the end of the schedule

    @property
    def recipe(self) -> Recipe:
        """The kind's, resolved."""
        return self.kind.recipe
