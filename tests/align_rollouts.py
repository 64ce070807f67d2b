"""Recorded rollouts on which reinforcement learning is held against trl, as tests/align_cases.py is for preferences.

Ten rollouts of two prompts with four completions each, two updates a rollout, so that ratios leave 1 and are clipped.
B rows, T tokens of a row.
"""

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import policy_reference
from align_cases import CASES, OPTIM, STEPS, model, tokenizer

from mlxgpt.common.align.rl import figures
from mlxgpt.common.align_config import RLConfig
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import AdapterConfig, Recipe, TrainConfig, TuneConfig
from mlxgpt.common.sft import pack
from mlxgpt.common.sft.pack import Example

UPDATES, GROUP, MOST = 2, 4, 12
"""Of a rollout; completions of a prompt; tokens of a completion."""


@dataclass(frozen=True)
class Method:
    """Ours, and the trainer there with its settings."""

    trainer: str
    trl: dict[str, Any]
    rl: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "grpo": Method("GRPO", {"loss_type": "grpo", "beta": 0.04}, {"method": "grpo", "kl": 0.04}),
    "dr_grpo": Method("GRPO", {"loss_type": "dr_grpo", "beta": 0.0}, {"method": "dr_grpo"}),
    "dapo": Method(
        "GRPO",
        {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28, "temperature": 0.8},
        {"method": "dapo", "temperature": 0.8},
    ),
    "rloo": Method("RLOO", {"beta": 0.0}, {"method": "rloo"}),
}


@dataclass(frozen=True)
class Rollout:
    """Prompts and completions as ids, and the rewards of the completions."""

    rows: list[tuple[list[int], list[int]]]
    rewards: np.ndarray  # (2, GROUP)


def recipe(method: Method) -> Recipe:
    """Ours; rates and weights are those of the other cases."""
    return Recipe(
        model=model(CASES["dpo"]),
        optim=OPTIM,
        train=TrainConfig(steps=STEPS, compile="off"),
        tune=TuneConfig(date="2026-11-25"),
        adapter=AdapterConfig(method="full"),
        rl=RLConfig(max_tokens=MOST, updates=UPDATES, completions=GROUP, prompts=2, **method.rl),
    )


def rollouts() -> list[Rollout]:
    """Random tokens, as a policy near its start draws them; some end."""
    draw, read = random.Random(17), tokenizer()

    def ids(least: int, most: int) -> list[int]:
        return [1 + int(draw.random() * (read.n_vocab - 1)) for _ in range(least + int(draw.random() * (most - least)))]

    made = []
    for _ in range(STEPS // UPDATES):
        rows = []
        for _ in range(2):
            prompt = ids(2, 9)
            for _ in range(GROUP):
                drawn = ids(1, MOST + 1)
                rows.append((prompt, [*drawn[:-1], read.eos_id] if draw.random() < 0.5 else drawn))
        made.append(Rollout(rows, np.array([[round(draw.random(), 2) for _ in range(GROUP)] for _ in range(2)])))
    return made


def advantages(method: Method, rollout: Rollout) -> np.ndarray:
    """(B,) by the papers' formulas."""
    name = method.rl["method"]
    return policy_reference.advantages(rollout.rewards, name, "none" if name in ("dr_grpo", "rloo") else "group")


def train(method: Method, engine: Any, count: int = STEPS) -> dict[str, list[float]]:
    """``loss`` and ``norm`` of the first ``count`` updates by one of our engines."""
    made, config = {"loss": list[float](), "norm": list[float]()}, engine.recipe.rl
    assert config
    batches = [_batch(rollout, config) for rollout in rollouts()]
    reference = [-engine.token_losses(batch) for batch in batches]  # at the temperature
    beside: dict[str, np.ndarray] = {}
    for step in range(1, count + 1):
        at = (step - 1) // UPDATES
        if step % UPDATES == 1:
            drawn = batches[at].weights > 0
            beside = {"advantages": advantages(method, rollouts()[at]).astype(np.float32)}
            beside["old"] = np.where(drawn, -engine.token_losses(batches[at]), 0).astype(np.float32)
            if config.kl:
                beside["reference"] = np.where(drawn, reference[at], 0).astype(np.float32)
        batch = dataclasses.replace(
            batches[at], weights=figures.weights(batches[at].weights, config), beside=beside, each=1.0
        )
        stats = engine.train_step(step, [batch], OPTIM.lr)
        made["loss"].append(stats.loss_sum / stats.weight)
        made["norm"].append(stats.grad_norm)
    return made


def _batch(rollout: Rollout, config: RLConfig) -> Batch:
    """Weights 1 where a token of a completion is the target."""
    held = []
    for prompt, drawn in rollout.rows:
        ids = np.array([*prompt, *drawn], np.int32)
        held.append(Example("", ids[:-1], ids[1:], (np.arange(1, len(ids)) >= len(prompt)).astype(np.float32)))
    return pack.padded_batch(held, [(row,) for row in range(len(held))], 32)


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
    """As trl holds a rollout: prompts padded on the left, completions on the right, and their masks."""
    widths = [max(len(row[k]) for row in rows) for k in (0, 1)]
    made = {}
    for k, (name, width) in enumerate(zip(("prompt", "completion"), widths, strict=True)):
        ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
        for b, row in enumerate(rows):
            place = slice(width - len(row[0]), width) if k == 0 else slice(0, len(row[1]))
            ids[b, place], mask[b, place] = row[k], 1
        made |= {f"{name}_ids": ids, f"{name}_mask": mask}
    return made
