"""The steps of the rows that draw: a token each, or several where drafts tell what may come."""

from mlxgpt.common import failures
from mlxgpt.common.inference import generation
from mlxgpt.common.inference.choosing import Choice
from mlxgpt.common.serve.engine.prefixes import Prefixes
from mlxgpt.common.serve.engine.rows import Rows
from mlxgpt.common.serve.engine.slot import Slot, Task
from mlxgpt.common.serve.engine.telling import Telling


class Steps:
    """Draws, and says what was drawn.

    Args:
        telling: who is told.
        prefixes: what rows leave behind.
    """

    def __init__(self, telling: Telling, prefixes: Prefixes) -> None:
        self._telling, self._counts, self._prefixes = telling, telling.counts, prefixes

    def step(self, rows: Rows) -> list[Task]:
        """Draws the next token of every row of a model, or several; what is to be read anew before it goes on."""
        choices, bad = [], []
        for row, slot in enumerate(rows.slots):
            try:
                choices.append(slot.next())
            except Exception as error:  # of a constraint
                bad.append(row)
                self._telling.fail(slot, self._telling.meaning(error))
        rows.keep([row for row in range(len(rows.slots)) if row not in bad])
        if not rows.slots:
            return []
        self._counts.steps += 1
        try:
            return self._draw_ahead(rows, choices) if rows.hot else self._draw(rows, choices)
        except Exception as error:
            known = failures.meaning(error)
            if not (known and known.memory):
                raise
            self._prefixes.clear()
            for slot in rows.slots:
                self._telling.fail(slot, known.line)
            rows.keep([])
            return []

    def _draw(self, rows: Rows, choices: list[Choice]) -> list[Task]:
        """A token each: the next forward pass is queued before this step's tokens are read."""
        before, drawn = list(rows.slots), rows.batch.draw(choices)
        going = [row for row, slot in enumerate(before) if not (slot.last or _turns(slot))]
        for row, slot in enumerate(before):
            if slot.last:
                self.hold(rows, row)
        rows.go_on(drawn, going)
        ended, again = set(), []
        for slot, chosen in zip(before, drawn.read(), strict=True):
            if not self._telling.take(slot, chosen):
                ended.add(slot)
            elif slot in rows.slots:
                rows.tell(rows.slots.index(slot), [chosen.token])
            else:
                again.append(_anew(slot))
        self._drop(rows, ended)
        return again

    def _draw_ahead(self, rows: Rows, choices: list[Choice]) -> list[Task]:
        """A token each, and what of their drafts is drawn: that needs no step of its own."""
        turning = {slot for slot in rows.slots if _turns(slot)}
        drawn = list(zip(rows.slots, rows.batch.draw(choices).read(), strict=True))
        ended = {slot for slot, chosen in drawn if not self._telling.take(slot, chosen)}
        self._drop(rows, ended)
        again = [_anew(slot) for slot in rows.slots if slot in turning]
        rows.keep([row for row, slot in enumerate(rows.slots) if slot not in turning])
        if not rows.slots:
            return again
        for row, slot in enumerate(rows.slots):
            rows.tell(row, slot.ids[-1:])
        accepted, drafted = rows.ahead()
        self._counts.drafted_tokens += drafted
        self._counts.accepted_tokens += sum(map(len, accepted))
        ended = set()
        for row, (slot, tokens) in enumerate(zip(rows.slots, accepted, strict=True)):
            rows.tell(row, [each.token for each in tokens])
            if not all(self._telling.take(slot, each) for each in tokens):
                ended.add(slot)
        self._drop(rows, ended)
        return again

    def _drop(self, rows: Rows, ended: set[Slot]) -> None:
        """Takes rows out that are done, and keeps what they leave behind."""
        for row, slot in enumerate(rows.slots):
            if slot in ended and slot.row.reason:
                self.hold(rows, row)
        rows.keep([row for row, slot in enumerate(rows.slots) if slot not in ended])

    def hold(self, rows: Rows, row: int) -> None:
        """Keeps what a row has read, for a request that begins with it."""
        if self._prefixes.limit:
            slot, read = rows.slots[row], rows.batch.lengths[row]
            ids = ([*slot.ids, slot.end] if slot.row.reason == "eos" else slot.ids)[:read]
            self._prefixes.add(rows.served.name, ids, rows.batch.layers(row, len(ids)))


def _anew(slot: Slot) -> Task:
    """A row to be read anew."""
    return Task(slot.work, 0.0, slot.ids, [slot], again=True)


def _turns(slot: Slot) -> bool:
    """Whether the frequencies change with the next token, so that the row is read anew: longrope's border."""
    return generation.switches(slot.work.served.model.config, [slot.row], len(slot.row.tokens) + 1)
