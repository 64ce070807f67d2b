"""Training a reward model as a kind of training: fine-tuning on pairs of which the better answer is to score higher."""

import shlex
from pathlib import Path

from mlxgpt.common.align.preferring import Preferring
from mlxgpt.common.runs.checkpoint import Checkpoint
from mlxgpt.common.sft.finetune import Finetuning
from mlxgpt.common.train.job import Job


class Rewarding(Preferring):
    """See job.Kind. ``args``: those of the verb finetune, whose tune.task is reward.

    The model's head becomes one of a single score, which a text's last token is given.
    """

    def reopen_source(self, run: Path, newest: Checkpoint | None) -> None:
        """The pairs and the base model; there is no reference."""
        Finetuning.reopen_source(self, run, newest)

    def begun(self, job: Job) -> None:
        """Nothing: scores are compared with each other alone."""

    def sample(self, job: Job) -> None:
        """None: the model writes no text."""

    def trial(self, run: Path) -> str:
        """A text's score."""
        return f"score --model {shlex.quote(str(run))} --text TEXT"
