"""What a model's answers are rewarded with, and how often they beat another's: means and intervals over prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.align.rl.rewards import Rewards
from mlxgpt.common.align.rl.writing import Writer
from mlxgpt.common.tasks import compare


@dataclass(frozen=True)
class Answered:
    """Rewards (prompts, draws) of a model's answers."""

    name: str
    asked: tuple[str, ...]  # file and row of each prompt
    rewards: np.ndarray
    ended: float  # share of answers that ended by themselves

    def described(self) -> dict[str, Any]:
        """The mean and its interval of 95 %."""
        each = self.rewards.mean(axis=1)
        found = compare.compare({"reward": each}, {"reward": np.zeros(len(each))})["reward"]
        return {"model": self.name, "reward": found.first, "low": found.low, "high": found.high, "ended": self.ended}


def answer(
    name: str, writer: Writer, rewards: Rewards, draws: int, limit: int | None, say: Callable[[str], None]
) -> Answered:
    """Asks for ``draws`` answers a prompt and rewards them."""
    kept = list(range(len(writer.prompts.rows)))[:limit]
    drawn = writer.write(draws, rng.key32(0, "win rate"), say, kept)
    asked = [writer.prompts.rows[row] for row in kept for _ in range(draws)]
    total = rewards.total(rewards.check(asked, [each.text for each in drawn]))
    wheres = tuple(row.where for row in writer.prompts.rows[:limit])
    return Answered(name, wheres, total.reshape(-1, draws), float(np.mean([each.ended for each in drawn])))


def win_rate(first: Answered, second: Answered) -> dict[str, Any]:
    """How often the first one's answer is rewarded more, ties half, with the interval of 95 % over prompts."""
    ahead = (first.rewards > second.rewards) + (first.rewards == second.rewards) / 2
    won = ahead.mean(axis=1)
    found = compare.compare({"won": won}, {"won": 1 - won})["won"]
    made = {"rate": found.first, "low": (1 + found.low) / 2, "high": (1 + found.high) / 2}
    counts = {name: int((ahead == value).sum()) for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
    return made | counts | {"prompts": len(won)}


def lines(answered: list[Answered], apart: dict[str, Any] | None) -> list[str]:
    """What was found, for a terminal."""
    made = []
    for each in answered:
        found = each.described()
        interval = f"[{found['low']:.4f}, {found['high']:.4f}]"
        made.append(f"reward         {found['reward']:.4f}  {interval}  {each.name}, {each.ended:.0%} of answers ended")
    if apart:
        counts = f"{apart['wins']} wins, {apart['ties']} ties, {apart['losses']} losses on {apart['prompts']} prompts"
        made.append(f"win rate       {apart['rate']:.4f}  [{apart['low']:.4f}, {apart['high']:.4f}]  {counts}")
    return made
