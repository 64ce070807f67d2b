"""What rollouts weigh and what is told of them. B rows, T tokens."""

from collections.abc import Mapping, Sequence

import numpy as np

from mlxgpt.common.align.rl import rewards
from mlxgpt.common.align.rl.rollouts import Line
from mlxgpt.common.align_config import RLConfig
from mlxgpt.common.batch import Batch


def weights(mask: np.ndarray, config: RLConfig) -> np.ndarray:
    """Weights (B, T) with which the sum over tokens, divided by B, is the mean that rl.mean asks for.

    ``mask`` (B, T) is 1 where a token counts.
    """
    if config.method == "rloo":
        return mask
    if config.averaged == "constant":
        return mask / np.float32(config.max_tokens)
    if config.averaged == "token":
        return mask * np.float32(len(mask) / max(1.0, mask.sum()))
    return mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)


def of_rollout(lines: Sequence[Line], completions: int) -> dict[str, float]:
    """Metrics of a rollout with so many completions a prompt, by trl's names."""
    total = np.array([line.reward for line in lines])
    groups = total.reshape(-1, completions)
    lengths, ended = np.array([len(line.ids) for line in lines]), np.array([line.ended for line in lines])
    made = {"reward": float(total.mean()), "reward_std": rewards.deviation(total)}
    for name in lines[0].rewards:
        values = np.array([line.rewards[name] for line in lines])
        made |= {f"rewards/{name}/mean": float(values.mean()), f"rewards/{name}/std": rewards.deviation(values)}
    made["frac_reward_zero_std"] = float((groups.max(axis=1) == groups.min(axis=1)).mean())
    made["completions/mean_length"] = float(lengths.mean())
    made["completions/clipped_ratio"] = float(1 - ended.mean())
    if ended.any():
        made["completions/mean_terminated_length"] = float(lengths[ended].mean())
    return made


def of_update(sums: Mapping[str, float], batch: Batch, method: str) -> dict[str, float]:
    """Metrics of what an objective added up; nothing where an update was skipped."""
    tokens, made = max(1, np.count_nonzero(batch.weights)), {}
    if "low" in sums:
        counted = len(batch.tokens) if method == "rloo" else tokens
        low, high = sums["low"] / counted, sums["high"] / counted
        made = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
        made["logps"] = sums["logp"] / tokens
    return made | ({"kl": sums["kl"] / tokens} if "kl" in sums else {})
