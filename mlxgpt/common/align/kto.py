"""KTO's estimate of how far the policy is from the reference: answers behind prompts that they do not answer.

    z = max(0, mean over the batch of log p(y' | x) - log r(y' | x))              Ethayarajh et al. 2024

y' is the answer of the row before x in the global batch, the last row's for the first, as in trl. Which rows share a
batch is the same in every epoch, so that each row has one mismatch and one reference value of it.
"""

from collections.abc import Sequence

import numpy as np

from mlxgpt.common.sft.pack import Example, Plan


def others(plans: Sequence[Plan], count: int) -> np.ndarray:
    """The row (N,) whose answer each row's mismatch has; a batch of one row takes the last one of the batch before."""
    found = np.zeros(count, np.int64)
    for number, plan in enumerate(plans):
        rows = [row for (row,) in plan]
        last = rows[-1] if len(rows) > 1 else plans[number - 1][-1][0]
        found[rows] = [last, *rows[:-1]]
    return found


def mismatch(asked: Example, answered: Example, most: int) -> Example:
    """The prompt of one example with the answer of another, cut at its end to ``most`` tokens."""
    start = int(np.argmax(answered.weights > 0))
    prompt, answer = asked.prompt, answered.targets[start:]
    ids = np.concatenate([prompt, answer]).astype(np.int32)
    weights = np.concatenate([np.zeros(len(prompt) - 1, np.float32), answered.weights[start:]])
    return Example(asked.where, ids[:-1][:most], ids[1:][:most], weights[:most])


def divergence(policy: np.ndarray, reference: np.ndarray) -> float:
    """z, from the log-probabilities (B,) of a global batch's mismatches."""
    return max(0.0, float((policy.astype(np.float64) - reference).mean()))
