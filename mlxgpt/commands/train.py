"""The verb ``train``: pre-trains a model from a recipe, or resumes a run."""

from argparse import Namespace

from mlxgpt.common.errors import UserError
from mlxgpt.common.train import session
from mlxgpt.common.train.pretrain import Pretraining


def train(args: Namespace) -> int:
    """Returns, and raises, what session.run does."""
    if args.moments and (args.resume or not args.init_from):
        raise UserError("--moments: expected --init-from DIR, whose optimizer's state it takes along")
    return session.run(Pretraining(args))
