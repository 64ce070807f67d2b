"""What a policy learns from completions that were rewarded: the clipped objectives of reinforcement learning.

Of each token that was drawn, with p its log-probability at rl.temperature now, o the one when it was drawn, r the one
by the run as it began, A the advantage of its completion, and e^(p - o) the ratio:

    grpo, dr_grpo, dapo    -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + kl k        Shao et al. 2024
    k                      e^(r - p) - (r - p) - 1, times the ratio where rl.kl_ratio    Schulman 2020; DeepSeek 2025
    rloo                   the same first term with sums over the completion's tokens in p and o, a loss a completion;
                           its divergence is in the rewards already                      Ahmadian et al. 2024

The weights of a batch are what turns a sum of them into the mean that rl.mean asks for (common/align/rl/source.py);
where they are 0, a token was not drawn. B rows, T tokens.
"""

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt import losses
from mlxgpt.common.align_config import RLConfig
from mlxgpt.common.config import Recipe, TrainConfig
from mlxgpt.layers import Array, Dropout
from mlxgpt.model import Model
from mlxgpt.preference import Objective, Sums


def objective(recipe: Recipe) -> Objective | None:
    """What reinforcement learning trains; None where the recipe has none."""
    config, train = recipe.rl, recipe.train
    if config is None:
        return None
    chosen = sequences if config.method == "rloo" else tokens
    return lambda model, batch, drop=None: chosen(model, batch, config, train, drop)


def clipped(ratio: Array, advantages: Array, config: RLConfig) -> tuple[Array, Sums]:
    """Losses in the shape of ``ratio``, and where it was clipped below and above."""
    low = (ratio < 1 - config.clip) & (advantages < 0)
    high = (ratio > 1 + config.upper) & (advantages > 0)
    held = mx.where(low, 1 - config.clip, mx.where(high, 1 + config.upper, ratio))
    return -held * advantages, {"low": low.astype(mx.float32), "high": high.astype(mx.float32)}


def tokens(
    model: Model, batch: losses.Arrays, config: RLConfig, train: TrainConfig, drop: Dropout | None
) -> tuple[Array, Sums]:
    """Weighted losses (B, T), and figures (B, T) of the tokens that were drawn."""
    logps = -losses.lm(model, batch, train, drop, temperature=config.temperature)
    drawn = batch.weights > 0
    old = batch.beside["old"] if "old" in batch.beside else mx.stop_gradient(logps)
    ratio = mx.exp(mx.where(drawn, logps - old, 0.0))
    terms, figures = clipped(ratio, batch.beside["advantages"][:, None], config)
    if config.kl:
        apart = mx.where(drawn, batch.beside["reference"] - logps, 0.0)
        divergence = mx.exp(apart) - apart - 1
        divergence = divergence * ratio if config.kl_ratio else divergence
        terms, figures["kl"] = terms + config.kl * divergence, divergence
    figures["logp"] = logps
    figures = {name: mx.where(drawn, mx.stop_gradient(each), 0.0) for name, each in figures.items()}
    return mx.where(drawn, terms * batch.weights, 0.0), figures


def sequences(
    model: Model, batch: losses.Arrays, config: RLConfig, train: TrainConfig, drop: Dropout | None
) -> tuple[Array, Sums]:
    """Weighted losses (B,), and figures: (B,) of clipping, (B, T) of tokens."""
    logps = -losses.lm(model, batch, train, drop, temperature=config.temperature)
    drawn = batch.weights > 0
    old = batch.beside["old"] if "old" in batch.beside else mx.stop_gradient(logps)
    ratio = mx.exp(mx.where(drawn, logps - old, 0.0).sum(axis=-1))
    terms, figures = clipped(ratio, batch.beside["advantages"], config)
    figures["logp"] = mx.where(drawn, logps, 0.0)
    counted = drawn.any(axis=-1)
    return mx.where(counted, terms, 0.0), {name: mx.stop_gradient(each) for name, each in figures.items()}
