"""The verb ``finetune``: fine-tunes a model, or an adapter of it, on examples, or resumes a run."""

from argparse import Namespace
from pathlib import Path

from mlxgpt.common.align.preferring import Preferring
from mlxgpt.common.align.rewarding import Rewarding
from mlxgpt.common.recipes import read_toml
from mlxgpt.common.sft import settings
from mlxgpt.common.sft.finetune import Finetuning
from mlxgpt.common.train import session

KINDS = {"prefer": Preferring, "reward": Rewarding}


def finetune(args: Namespace) -> int:
    """Returns, and raises, what session.run does."""
    return session.run(KINDS.get(task_of(args), Finetuning)(args))


def task_of(args: Namespace) -> str:
    """tune.task of the settings, or of the run that is resumed."""
    if args.resume:
        stored = Path(args.resume) / "recipe.toml"
        sections = read_toml(stored) if stored.is_file() else {}
    else:
        sections = settings.gather(args).sections
    return str(sections.get("tune", {}).get("task", "lm"))
