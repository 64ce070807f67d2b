"""The verb ``rl``: reinforcement learning of a model on rewards, or resumes a run; or the best of N completions."""

import contextlib
from argparse import Namespace

from mlxgpt.common.align.rl import best_of
from mlxgpt.common.align.rl.reinforcing import Reinforcing
from mlxgpt.common.train import session


def reinforce(args: Namespace) -> int:
    """Returns, and raises, what session.run does."""
    if args.method == best_of.METHOD:
        return best_of.command(args)
    with contextlib.closing(Reinforcing(args)) as kind:
        return session.run(kind)
