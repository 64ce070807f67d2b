"""The settings of alignment: [prefer] of preference and reward training, [rl] of reinforcement learning."""

from dataclasses import dataclass

from mlxgpt.common.fields import check, field, one_of

LOSSES = ("dpo", "cdpo", "robust", "ipo", "kto", "orpo", "simpo")
REFERENCE = ("dpo", "cdpo", "robust", "ipo", "kto")
"""The losses that compare with the run as it began."""
METHODS = ("grpo", "dr_grpo", "dapo", "rloo", "ppo")


@dataclass(frozen=True, kw_only=True)
class PreferConfig:
    """Training on answers of which one is better; preference.py has the formulas."""

    loss: str = field("dpo", "dpo, cdpo, robust, ipo, kto, orpo or simpo")
    beta: float = field(0.1, "strength of the pull to the reference; simpo: scale of the reward, usually 2")
    smoothing: float = field(0.1, "cdpo, robust: share of the pairs that are the wrong way around")
    gamma: float = field(0.5, "simpo: margin by which the better answer must be ahead")
    sft: float = field(0.0, "weight of the better answer's mean negative log-likelihood, added to the loss")
    desirable: float = field(1.0, "kto: weight of good answers")
    undesirable: float = field(1.0, "kto: weight of bad answers")
    center: float = field(0.0, "reward: weight of the squared sum of a pair's scores, which keeps them around 0")

    def __post_init__(self) -> None:
        one_of("prefer", self, "loss", *LOSSES)
        check("prefer", 0 < self.beta < float("inf"), "beta", self.beta, "a positive number")
        check("prefer", 0 <= self.smoothing < 0.5, "smoothing", self.smoothing, "at least 0 and below 0.5")
        for name in ("gamma", "sft", "desirable", "undesirable", "center"):
            value = getattr(self, name)
            check("prefer", 0 <= value < float("inf"), name, value, "0 or a positive number")
        readers = {
            "smoothing": ("cdpo", "robust"), "gamma": ("simpo",), "desirable": ("kto",), "undesirable": ("kto",),
            "sft": tuple(each for each in LOSSES if each not in ("kto", "orpo")),
        }  # fmt: skip
        for name, losses in readers.items():
            value, default = getattr(self, name), type(self).__dict__[name]
            fits = self.loss in losses or value == default
            check("prefer", fits, name, value, f"{default!r} where prefer.loss = {self.loss}")


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Reinforcement learning: rollouts, rewards and the policy's loss; policy.py has the formulas."""

    method: str = field("grpo", "grpo, dr_grpo, dapo, rloo or ppo")
    rewards: tuple = field((), "rewards: FILE.py or FILE.py:FUNCTION, a reward model's folder, or exact, regex, length")
    weights: tuple = field((), "weights of the rewards, in their order; empty = 1 each")
    prompts: int = field(4, "prompts of a rollout")
    completions: int = field(8, "completions of each prompt: a group")
    max_tokens: int = field(128, "tokens of a completion")
    temperature: float = field(1.0, "divides the logits, in drawing and in log-probabilities alike")
    updates: int = field(1, "updates from each rollout")
    clip: float = field(0.2, "how far the ratio of new to old probabilities may fall below 1, and rise above it")
    clip_high: float = field(0.0, "the same for rising alone; 0 = dapo 0.28, others as rl.clip")
    scale: str = field("auto", "divide advantages by the deviation of rewards: group, batch, none; auto by the method")
    mean: str = field("auto", "mean of the loss over: sequence, token, or constant (max_tokens); auto by the method")
    kl: float = field(0.0, "weight of the KL divergence from the model that the run began with, estimated by k3")
    mask_truncated: bool = field(False, "leave completions that did not end out of the loss")
    gamma: float = field(1.0, "ppo: discount of later rewards")
    gae: float = field(0.95, "ppo: lambda of generalized advantage estimation")
    value: float = field(0.1, "ppo: weight of the value head's loss")
    value_clip: float = field(0.2, "ppo: how far a value may move from the rollout's")

    def __post_init__(self) -> None:
        one_of("rl", self, "method", *METHODS)
        one_of("rl", self, "scale", "auto", "group", "batch", "none")
        one_of("rl", self, "mean", "auto", "sequence", "token", "constant")
        for name in ("prompts", "completions", "max_tokens", "temperature", "updates", "clip"):
            check("rl", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("clip_high", "kl", "value", "value_clip"):
            check("rl", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        for name in ("gamma", "gae"):
            check("rl", 0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
