"""The verb ``finetune``: fine-tunes a model, or an adapter of it, on examples, or resumes a run."""

from argparse import Namespace

from mlxgpt.common.sft.finetune import Finetuning
from mlxgpt.common.train import session


def finetune(args: Namespace) -> int:
    """Returns, and raises, what session.run does."""
    return session.run(Finetuning(args))
