"""The rows of one model: its batch, their choices, and what guesses for them what comes next."""

from collections.abc import Sequence
from typing import Any

from mlxgpt.common.inference import drafting
from mlxgpt.common.inference.choosing import Chosen
from mlxgpt.common.model import rotary
from mlxgpt.common.serve.engine.slot import Slot
from mlxgpt.common.serve.work import Served


class Rows:
    """In the order in which they joined.

    Args:
        served: the model.
        batching: the backend's module.
        kv_bits: of the cache: 8 or 4; 0 holds keys and values as they are.
    """

    def __init__(self, served: Served, batching: Any, kv_bits: int = 0) -> None:
        self.served, self.slots = served, list[Slot]()
        self.batch = batching.Batch(served.model, served.n_vocab, kv_bits)
        self._drafter = served.drafter() if served.drafter else None

    @property
    def hot(self) -> bool:
        """Whether drafts are worth it."""
        return self._drafter is not None and self._drafter.hot

    def join(self, prompt: Any, slots: Sequence[Slot]) -> None:
        """Adds choices behind a prompt that was read."""
        self.batch.join(prompt, len(slots))
        self.slots += slots
        if self._drafter:
            self._drafter.join(slots)

    def keep(self, rows: Sequence[int]) -> None:
        """The rows that stay; the others leave."""
        self.batch.keep(rows)
        self._stay(rows)

    def go_on(self, drawn: Any, rows: Sequence[int]) -> None:
        """Reads what was drawn, of the rows that go on; the others leave."""
        self.batch.go_on(drawn, rows)
        self._stay(rows)

    def _stay(self, rows: Sequence[int]) -> None:
        if len(rows) < len(self.slots):
            self.slots[:] = [self.slots[row] for row in rows]
            if self._drafter:
                self._drafter.keep(rows)

    def tell(self, row: int, tokens: Sequence[int]) -> None:
        """What a row drew."""
        if self._drafter:
            self._drafter.take(row, tokens)

    def ahead(self) -> tuple[list[list[Chosen]], int]:
        """Reads the last token of every row, and a draft; what of the drafts is drawn, and how many tokens they had."""
        assert self._drafter is not None
        config, lengths = self.served.model.config, [len(slot.ids) for slot in self.slots]
        border = config.rope_original if rotary.by_length(config) else None
        most = drafting.room(config, lengths, [slot.drafts for slot in self.slots], border)
        drafts = self._drafter.propose(self.slots, most)
        choices = [
            [slot.after(draft[:n]) for n in range(len(draft))] for slot, draft in zip(self.slots, drafts, strict=True)
        ]
        return self.batch.ahead([slot.ids[-1] for slot in self.slots], drafts, choices), sum(map(len, drafts))
