"""The objectives of reinforcement learning in float64, written from the papers and compared once with trl 1.16's own.

B rows, T tokens; everything is a torch tensor, so that autograd gives the gradient.
"""

import numpy as np
import torch

EPS = 1e-4


def loss(
    method: str,
    logps: torch.Tensor,  # (B, T) of the targets, at the temperature
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
    advantages: torch.Tensor,  # (B,)
    mask: torch.Tensor,  # (B, T)
    low: float = 0.2,
    high: float = 0.2,
    kl: float = 0.0,
    kl_ratio: bool = True,
    mean: str = "",
    max_tokens: int = 0,
) -> torch.Tensor:
    """The loss of an update."""
    old = logps.detach() if old is None else old
    if method == "rloo":
        ratio = torch.exp(((logps - old) * mask).sum(dim=1))
        return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages).mean()
    ratio, better = torch.exp(logps - old), advantages[:, None]
    each = -torch.min(ratio * better, ratio.clamp(1 - low, 1 + high) * better)
    if kl:
        assert reference is not None
        apart = reference - logps
        k3 = torch.exp(apart) - apart - 1
        each = each + kl * (k3 * ratio if kl_ratio else k3)
    mean = mean or {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token"}[method]
    if mean == "sequence":
        return ((each * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
    return (each * mask).sum() / (mask.sum() if mean == "token" else len(mask) * max_tokens)


def advantages(rewards: np.ndarray, method: str, scale: str) -> np.ndarray:
    """Of rewards (P, G), a group a prompt: (B,), a group at a time."""
    made = []
    for group in rewards.astype(np.float64):
        for at, reward in enumerate(group):
            others = np.delete(group, at)
            made.append(reward - (others.mean() if method == "rloo" else group.mean()))
    found = np.array(made)
    if scale == "none":
        return found
    if method == "rloo":
        return (found - found.mean()) / (found.std(ddof=1) + EPS)
    deviation = rewards.std(ddof=1) if scale == "batch" else np.repeat(rewards.std(axis=1, ddof=1), rewards.shape[1])
    return found / (deviation + EPS)
