"""What a model learns from answers of which one is better: pairs, single judged answers, and scores of pairs.

Rows 2i and 2i + 1 of a batch are the better and the worse answer of pair i; KTO's rows stand alone. With p a row's
log-probability behind its prompt, r the same by the run as it began, n its tokens, and x = (p - r) - (p' - r') of a
pair:

    dpo      -log s(beta x)                                                       Rafailov et al. 2023
    cdpo     -(1 - e) log s(beta x) - e log s(-beta x)                            Mitchell 2023
    robust   (-(1 - e) log s(beta x) + e log s(-beta x)) / (1 - 2e)               Chowdhury et al. 2024
    ipo      ((p - r) / n - (p' - r') / n' - 1 / (2 beta))^2                      Azar et al. 2023, of means
    simpo    -log s(beta (p / n - p' / n') - gamma)                               Meng et al. 2024
    orpo     nll - beta log s(log odds(p / n) - log odds(p' / n'))                Hong et al. 2024, nll of the text
    kto      w (1 - s(beta (p - r - z))), or w (1 - s(beta (z - p + r))) where worse        Ethayarajh et al. 2024
    reward   -log s(f - f') + center (f + f')^2                                   Bradley and Terry 1952

s is the logistic function, e = smoothing, z the divergence that common/align/kto.py measures, f the head's scores.
"""

from collections.abc import Callable

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt import losses
from mlxgpt.common.align_config import REFERENCE, PreferConfig
from mlxgpt.common.config import Recipe, TrainConfig
from mlxgpt.layers import Array, Dropout
from mlxgpt.model import Model

Sums = dict[str, Array]
"""Figures of a batch by name, an item each, which the host adds up."""
Objective = Callable[..., tuple[Array, Sums]]
"""(model, batch, drop) -> terms, an item each, and sums."""


def log_sigmoid(x: Array) -> Array:
    """log of the logistic function."""
    return -mx.logaddexp(0.0, -x)


def objective(recipe: Recipe) -> Objective | None:
    """What the recipe's task trains; None where that is one loss a token."""
    config, train = recipe.prefer, recipe.train
    if config is None:
        return None
    assert recipe.tune
    chosen = score_pairs if recipe.tune.task == "reward" else judge if config.loss == "kto" else pairs
    return lambda model, batch, drop=None: chosen(model, batch, config, train, drop)


def told(model: Model, batch: losses.Arrays, train: TrainConfig, drop: Dropout | None) -> tuple[Array, Array, Array]:
    """Log-probabilities (B,) of the rows' answers, how many tokens they have (B,), and all losses (B, T)."""
    each = losses.lm(model, batch, train, drop)
    return -(each * batch.weights).sum(axis=-1), batch.weights.sum(axis=-1), each


def pairs(
    model: Model, batch: losses.Arrays, config: PreferConfig, train: TrainConfig, drop: Dropout | None
) -> tuple[Array, Sums]:
    """Losses (P,) of the pairs, and their figures by trl's names."""
    logps, counts, each = told(model, batch, train, drop)
    rewards = logps / counts if config.loss in ("simpo", "orpo") else logps
    if config.loss in REFERENCE:
        rewards = rewards - batch.beside["reference"]
    better, worse = rewards[0::2], rewards[1::2]
    x = config.beta * (better - worse)
    sums: Sums = {}
    if config.loss == "dpo":
        terms = -log_sigmoid(x)
    elif config.loss == "cdpo":
        terms = -(1 - config.smoothing) * log_sigmoid(x) - config.smoothing * log_sigmoid(-x)
    elif config.loss == "robust":
        wrong = config.smoothing * log_sigmoid(-x)
        terms = (wrong - (1 - config.smoothing) * log_sigmoid(x)) / (1 - 2 * config.smoothing)
    elif config.loss == "ipo":
        terms = mx.square(better / counts[0::2] - worse / counts[1::2] - 1 / (2 * config.beta))
    elif config.loss == "simpo":
        terms = -log_sigmoid(x - config.gamma)
    else:
        assert config.loss == "orpo"
        odds = (better - worse) - (mx.log1p(-mx.exp(better)) - mx.log1p(-mx.exp(worse)))
        ratio = log_sigmoid(odds)  # once: MLX's compiler loses one of two outputs that are equal
        terms, sums = -config.beta * ratio, {"log_odds_chosen": odds, "log_odds_ratio": ratio}
    if "nll" in batch.beside:  # weights of the losses that are added
        nll = (each * batch.beside["nll"]).sum(axis=-1)[0::2]
        terms, sums["nll_loss"] = terms + nll, nll
    better, worse = config.beta * better, config.beta * worse
    sums |= {
        "rewards/chosen": better,
        "rewards/rejected": worse,
        "rewards/margins": better - worse,
        "rewards/accuracies": (better > worse).astype(mx.float32),
        "logps/chosen": logps[0::2],
        "logps/rejected": logps[1::2],
    }
    return terms, {name: mx.stop_gradient(array) for name, array in sums.items()}


def judge(
    model: Model, batch: losses.Arrays, config: PreferConfig, train: TrainConfig, drop: Dropout | None
) -> tuple[Array, Sums]:
    """KTO's losses (B,), and figures of the good and of the bad answers, 0 for rows of the other kind."""
    logps, _, _ = told(model, batch, train, drop)
    good, kl = batch.beside["good"], batch.beside["kl"]
    ratio = logps - batch.beside["reference"]
    weight = mx.where(good > 0, config.desirable, config.undesirable)
    terms = weight * (1 - mx.sigmoid(config.beta * mx.where(good > 0, ratio - kl, kl - ratio)))
    bad, reward = 1 - good, config.beta * ratio
    sums = {
        "count/chosen": good, "count/rejected": bad, "rewards/chosen": reward * good, "rewards/rejected": reward * bad,
        "logps/chosen": logps * good, "logps/rejected": logps * bad, "kl": kl,
    }  # fmt: skip
    return terms, {name: mx.stop_gradient(array) for name, array in sums.items()}


def score_pairs(
    model: Model, batch: losses.Arrays, config: PreferConfig, train: TrainConfig, drop: Dropout | None
) -> tuple[Array, Sums]:
    """A reward model's losses (P,), and figures of the scores, which the weights take at each row's last token."""
    scores = (losses.scores(model, batch, train, drop)[..., 0] * batch.weights).sum(axis=-1)
    better, worse = scores[0::2], scores[1::2]
    ahead = better - worse  # once, as above
    terms = -log_sigmoid(ahead - batch.beside["margin"][0::2])
    if config.center:
        terms = terms + config.center * mx.square(better + worse)
    sums = {
        "rewards/chosen": better,
        "rewards/rejected": worse,
        "rewards/margins": ahead,
        "rewards/accuracies": (better > worse).astype(mx.float32),
    }
    return terms, {name: mx.stop_gradient(array) for name, array in sums.items()}
