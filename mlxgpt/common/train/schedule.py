"""Learning-rate schedules: pure functions of the step, in Python floats, the same for both frameworks.

Steps count from 1 to S = train.steps; W = optim.warmup. For s <= W, every schedule warms up: lr(s) = peak * s / W.
Then, with p = (s - W) / (S - W):

    cosine     min + (peak - min) * (1 + cos(pi p)) / 2        SGDR, Loshchilov and Hutter 2017, equation 5
    linear     min + (peak - min) * (1 - p)
    constant   peak
    wsd        peak until step S - D, then min + (peak - min) * (S - s) / D, D = max(1, round(decay_fraction * S))
               warmup-stable-decay, Hu et al. 2024 (MiniCPM), section 4.2, with a linear decay

All but constant reach ``min_lr`` exactly at step S. Muon's rate has the same shape: ``rate * muon_lr / lr``.
"""

import math

from mlxgpt.common.config import OptimConfig
from mlxgpt.common.errors import UserError


def decay_steps(optim: OptimConfig, steps: int) -> int:
    """wsd: the number of steps, at the end, in which the rate decays."""
    return max(1, round(optim.decay_fraction * steps))


def last_stable(optim: OptimConfig, steps: int) -> int:
    """wsd: the last step at the peak rate, up to which a longer run is the same; 0 of other schedules."""
    return steps - decay_steps(optim, steps) if optim.schedule == "wsd" else 0


def rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of ``step`` (from 1) in a schedule of ``steps``."""
    peak, low, warmup = optim.lr, optim.min_lr, optim.warmup
    if step <= warmup:
        return peak * step / warmup
    if optim.schedule == "constant":
        return peak
    if step >= steps:
        return low
    if optim.schedule == "wsd":
        stable = last_stable(optim, steps)
        return peak if step <= stable else low + (peak - low) * (steps - step) / (steps - stable)
    progress = (step - warmup) / (steps - warmup)
    share = (1.0 + math.cos(math.pi * progress)) / 2.0 if optim.schedule == "cosine" else 1.0 - progress
    return low + (peak - low) * share


def check_schedule(optim: OptimConfig, steps: int) -> None:
    """Refuses a schedule whose parts do not fit into ``steps``.

    Raises:
        UserError: the warm-up, with wsd's decay, leaves no step for the rest.
    """
    if optim.schedule == "constant":
        return
    if optim.warmup >= steps:
        raise UserError(f"optim.warmup = {optim.warmup}: expected fewer than train.steps = {steps}")
    if optim.schedule == "wsd" and optim.warmup + decay_steps(optim, steps) > steps:
        raise UserError(
            f"optim.warmup = {optim.warmup} and optim.decay_fraction = {optim.decay_fraction}: "
            f"{decay_steps(optim, steps)} steps of decay do not fit into train.steps = {steps}"
        )
