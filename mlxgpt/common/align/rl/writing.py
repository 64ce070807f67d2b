"""A model that answers prompts once, without learning: for the best of N completions, and to compare two models."""

from collections.abc import Callable, Sequence
from typing import Any

from mlxgpt.common.align.rl import draw, scorer
from mlxgpt.common.align.rl import prompts as prompt_files
from mlxgpt.common.align.rl.draw import Drawn
from mlxgpt.common.align.rl.prompts import Prompts
from mlxgpt.common.align.rl.rewards import Rewards
from mlxgpt.common.align_config import RLConfig
from mlxgpt.common.backend import Backend
from mlxgpt.common.config import TuneConfig
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.tokenizers.protocol import Tokenizer


class Writer:
    """A model and the prompts as it reads them.

    Raises:
        UserError: no language model with a tokenizer, or a file without prompts.
    """

    def __init__(
        self, backend: Backend, place: str, adapters: Any, device: str, force: bool, tune: TuneConfig, config: RLConfig,
        say: Callable[[str], None],
    ):  # fmt: skip
        self._backend, self._config = backend, config
        self.model, found = backend.load.load(place, adapter=adapters, device=device, force=force)
        base_and_adapters.expect_task(self.model.config, place)
        self.tokenizer: Tokenizer = base_and_adapters.expect_tokenizer(found, place)
        self.prompts: Prompts = prompt_files.read(
            tune, self.tokenizer, self.model.config, config.raw, config.max_tokens, say
        )
        prompt_files.add_ends(self.tokenizer, self.prompts, config.raw)

    def write(self, each: int, seed: int, say: Callable[[str], None], rows: Sequence[int] | None = None) -> list[Drawn]:
        """``each`` completions of every prompt, or of those in ``rows``, a prompt's behind each other."""
        config = self._config
        sample = draw.settings(config, seed)
        kept = self.prompts.rows if rows is None else [self.prompts.rows[row] for row in rows]
        ids = [row.ids for row in kept]
        return draw.draw(self._backend, self.model, self.tokenizer, ids, each, sample, config.prompts, say)


def open_rewards(backend: Backend, config: RLConfig, device: str, run_code: bool) -> Rewards:
    """The rewards of a recipe; its caller closes them.

    Raises:
        UserError: as Rewards.
    """

    def judge(place: str) -> Any:
        return scorer.open_scorer(backend, place, device)

    return Rewards(config.rewards, config.weights, config.seconds, judge, run_code)
