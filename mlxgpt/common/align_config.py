"""The settings of alignment: [prefer] of preference and reward training, [rl] of reinforcement learning."""

from dataclasses import dataclass

from mlxgpt.common.fields import check, field, one_of

LOSSES = ("dpo", "cdpo", "robust", "ipo", "kto", "orpo", "simpo")
REFERENCE = ("dpo", "cdpo", "robust", "ipo", "kto")
"""The losses that compare with the run as it began."""
METHODS = ("grpo", "dr_grpo", "dapo", "rloo")


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

    method: str = field("grpo", "grpo, dr_grpo, dapo or rloo")
    rewards: tuple = field(
        (), "FILE.py or FILE.py:FUNCTION, a reward model's folder, exact, regex, regex:PATTERN, length:N or tests"
    )
    weights: tuple = field((), "weights of the rewards, in their order; empty = 1 each")
    seconds: float = field(60.0, "time that the reward functions have for a rollout")
    raw: bool = field(False, "give texts to the model as they are, though it has a chat template")
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
    kl_ratio: bool = field(True, "multiply that estimate by the ratio, so that its gradient is the divergence's")
    mask_truncated: bool = field(False, "leave completions that did not end out of the loss")
    replay: str = field("", "a run, or its rollouts.jsonl: train on its completions and rewards in place of own ones")
    check: bool = field(False, "with replay: draw as well, and say where the first token differs")

    def __post_init__(self) -> None:
        one_of("rl", self, "method", *METHODS)
        one_of("rl", self, "scale", "auto", "group", "batch", "none")
        one_of("rl", self, "mean", "auto", "sequence", "token", "constant")
        for name in ("prompts", "completions", "max_tokens", "temperature", "updates", "clip", "seconds"):
            value = getattr(self, name)
            check("rl", 0 < value < float("inf"), name, value, "a positive number")
        for name in ("clip_high", "kl"):
            value = getattr(self, name)
            check("rl", 0 <= value < float("inf"), name, value, "0 or a positive number")
        check("rl", self.completions > 1, "completions", self.completions, "2 at least: they are compared")
        check("rl", self.clip < 1, "clip", self.clip, "below 1")
        if self.method == "rloo":
            check(
                "rl",
                self.mean == "auto",
                "mean",
                self.mean,
                "'auto' where rl.method = rloo, whose loss is a sequence's",
            )
            check("rl", self.scale != "group", "scale", self.scale, "none or batch where rl.method = rloo")
        check("rl", self.kl_ratio or self.method != "rloo", "kl_ratio", self.kl_ratio, "true where rl.method = rloo")
        check("rl", bool(self.replay) or not self.check, "check", self.check, "false without rl.replay")
        numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in self.weights)
        check("rl", numbers, "weights", self.weights, "numbers")
        fits = not self.weights or len(self.weights) == len(self.rewards)
        check("rl", fits, "weights", self.weights, f"one for each of the {len(self.rewards)} rewards")

    @property
    def upper(self) -> float:
        """How far the ratio may rise above 1."""
        return self.clip_high or (0.28 if self.method == "dapo" else self.clip)

    @property
    def scaled(self) -> str:
        """What advantages are divided by the deviation of: group, batch or none."""
        own = {"grpo": "group", "dapo": "group", "dr_grpo": "none", "rloo": "none"}
        return own[self.method] if self.scale == "auto" else self.scale

    @property
    def averaged(self) -> str:
        """What the loss is a mean over: sequence, token or constant."""
        own = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant", "rloo": "sequence"}
        return own[self.method] if self.mean == "auto" else self.mean
