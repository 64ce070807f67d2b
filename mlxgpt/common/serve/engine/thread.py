"""The engine's thread: it loads the models, reads prompts in pieces between the steps of the batch, and draws.

Everything of a framework happens here: MLX's streams belong to the thread that made them.
"""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mlxgpt.common import backend as backends
from mlxgpt.common import failures
from mlxgpt.common.backend import Backend
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.inference import generation
from mlxgpt.common.serve.engine.prefixes import Prefixes
from mlxgpt.common.serve.engine.slot import Slot, Task
from mlxgpt.common.serve.work import Begun, Busy, Counts, Drawn, Piece, Served, Stopped, Work

LATEST = 1024  # requests whose seconds to the first token are kept
WAIT = 60  # seconds, at the most, that Busy speaks of


class Engine:
    """A thread that answers Work.

    Args:
        backend: of the models.
        load: makes the models, in the engine's thread; the base first.
        max_batch: choices that are drawn together.
        max_queue: requests that may wait for a place among them.
        cache_bytes: memory for keys and values that later requests may begin with; 0: none.
        kv_bits: of keys and values: 8 or 4; 0 holds them as they are.
    """

    def __init__(
        self,
        backend: Backend,
        load: Callable[[], Sequence[Served]],
        max_batch: int = 16,
        max_queue: int = 64,
        cache_bytes: int = 0,
        kv_bits: int = 0,
    ) -> None:
        self._backend, self._load, self._max_batch, self._max_queue = backend, load, max_batch, max_queue
        self.counts = Counts()
        self._prefixes = Prefixes(cache_bytes, backend.batching)
        self._keeps, self._kv_bits = cache_bytes > 0, kv_bits
        self._served: Mapping[str, Served] = MappingProxyType({})
        self._lock = threading.Condition()  # guards what follows
        self._queue: deque[Task] = deque()
        self._cancelled: set[Work] = set()
        self._ending = ""  # drain, now
        self._death: BaseException | None = None
        self._ready = threading.Event()
        # the engine's own
        self._reading: deque[Task] = deque()
        self._rows: dict[str, tuple[Any, list[Slot]]] = {}  # batch and choices of each model
        self._seconds = 1.0  # that a request takes, lately
        self._began: dict[Work, float] = {}  # works that have drawn nothing yet
        self._thread = threading.Thread(target=self._main, name="mlxgpt-engine", daemon=True)

    def start(self) -> None:
        """Begins, and waits until the models are loaded.

        Raises:
            UserError: or whatever loading raised.
        """
        with backends.without_signals():
            self._thread.start()
        self._ready.wait()
        if self._death is not None:
            raise self._death

    @property
    def served(self) -> Mapping[str, Served]:
        """The models by name, the base first."""
        return self._served

    @property
    def death(self) -> BaseException | None:
        """What ended the thread, if it died."""
        return self._death

    def submit(self, work: Work) -> None:
        """Queues a request; see work.Worker."""
        with self._lock:
            if self._ending or self._death is not None:
                raise Stopped("the server is ending" if self._ending else f"the engine died: {self._death}")
            busy = self.counts.running + len(self._reading)
            if len(self._queue) >= self._max_queue + max(0, self._max_batch - busy):
                turns = (len(self._queue) + busy) / self._max_batch
                raise Busy(max(1, min(WAIT, round(self._seconds * turns))))
            self._queue.append(Task(work, time.monotonic(), list(work.prompt)))
            self.counts.requests += 1
            self.counts.waiting = len(self._queue)
            self._lock.notify()

    def cancel(self, work: Work) -> None:
        """The request leaves before the next step."""
        with self._lock:
            self._cancelled.add(work)
            self._lock.notify()

    def stop(self, drain: bool = True) -> None:
        """Takes nothing more; what was taken is answered first, or else told that it is cancelled."""
        with self._lock:
            self._ending = "drain" if drain and self._ending != "now" else "now"
            self._lock.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the thread's end; whether it came."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._served = MappingProxyType({served.name: served for served in self._load()})
            self._rows = {
                name: (self._backend.batching.Batch(served.model, served.n_vocab, self._kv_bits), [])
                for name, served in self._served.items()
            }
            self._ready.set()
            while self._turn():
                pass
            self._leave("cancelled", "")
        except BaseException as error:
            if self._ready.is_set():
                traceback.print_exc(file=sys.stderr)
            with self._lock:
                self._death = error
            self._leave("", f"the engine died: {type(error).__name__}: {error}")
        finally:
            self._ready.set()
            self._rows.clear()
            self._backend.batching.leave()

    def _leave(self, reason: str, error: str) -> None:
        """Tells everyone who still waits."""
        with self._lock:
            left = [*self._queue]
            self._queue.clear()
        for task in (*left, *self._reading):
            self._refuse(task, reason, error)
        for _, slots in self._rows.values():
            for slot in slots:
                self._say(slot.work, Piece(slot.index, "", (), reason, error))
            slots.clear()

    def _turn(self) -> bool:
        """Some tokens of prompts, and a step of each batch; False at the end."""
        with self._lock:
            while not (self._queue or self._busy() or self._ending or self._cancelled):
                self._lock.wait()
            gone = self._gone()
            if self._ending == "now" or (self._ending and not self._queue and not self._busy()):
                return False
        if gone:
            self._drop(gone)
        self._read()
        for name in self._rows:
            self._step(name)
        self.counts.running = self._running()
        self.counts.cache_bytes = self._prefixes.bytes
        return True

    def _gone(self) -> set[Work]:
        """Requests whose clients left, taken out of the queue; the lock is held."""
        gone, self._cancelled = self._cancelled, set()
        if gone:
            self.counts.cancelled += sum(len(task.work.copies) for task in self._queue if task.work in gone)
            self._queue = deque(task for task in self._queue if task.work not in gone)
            self.counts.waiting = len(self._queue)
        return gone

    def _busy(self) -> bool:
        return bool(self._reading) or self._running() > 0

    def _running(self) -> int:
        return sum(len(slots) for _, slots in self._rows.values())

    def _drop(self, gone: set[Work]) -> None:
        """Takes the rows of requests out whose clients left."""
        self.counts.cancelled += sum(len(task.slots) for task in self._reading if task.work in gone)
        self._reading = deque(task for task in self._reading if task.work not in gone)
        for work in gone:
            self._began.pop(work, None)
        for name, (batch, slots) in self._rows.items():
            stay = [row for row, slot in enumerate(slots) if slot.work not in gone]
            for row, slot in enumerate(slots):
                if slot.work in gone:
                    self.counts.cancelled += 1
                    self._hold(name, batch, row, slot.ids)
            if len(stay) < len(slots):
                batch.keep(stay)
                slots[:] = [slots[row] for row in stay]

    def _read(self) -> None:
        """Reads as many tokens of prompts as one turn may, and lets those join that were read."""
        budget = self._backend.generate.PREFILL
        while budget > 0 and (task := self._next()):
            try:
                self._prepare(task)
                if task.prompt.left:
                    budget -= task.prompt.read(budget)
                if task.prompt.left:
                    return
                if not task.again:
                    self._begin(task)
            except Exception as error:
                self._reading.popleft()
                self._refuse(task, "", self._meaning(error))
                continue
            if not self._join(task):
                return  # its other choices join when rows have left
            self._reading.popleft()

    def _next(self) -> Task | None:
        """The prompt to go on with: the one that is being read, else the next of the queue if there is a place."""
        if self._reading:
            return self._reading[0]
        if self._running() >= self._max_batch:
            return None
        with self._lock:
            while self._queue and self._queue[0].work in self._cancelled:
                self.counts.cancelled += len(self._queue.popleft().work.copies)
            if not self._queue:
                return None
            task = self._queue.popleft()
            self.counts.waiting = len(self._queue)
            self._reading.append(task)
        return task

    def _prepare(self, task: Task) -> None:
        """Finds what is held of a prompt, and sets up its choices; once."""
        if task.prompt is not None:
            return
        work, served = task.work, task.work.served
        held = None
        if not task.again:
            task.slots = [Slot(work, index) for index in range(len(work.copies))]
            self._began[work] = task.arrived
            if self._keeps and not work.score_prompt:
                task.cached, held = self._prefixes.find(served.name, served.model.config, task.ids)
                self.counts.cache_hits += held is not None
                self.counts.cache_misses += held is None
        top = (work.logprobs or 0) if work.score_prompt else None
        new = self._backend.batching.Prompt
        task.prompt = new(served.model, task.ids, served.n_vocab, held, top, self._kv_bits)

    def _begin(self, task: Task) -> None:
        """Says that the prompt was read; once."""
        task.again = True
        self.counts.prompt_tokens += len(task.ids)
        self.counts.cached_tokens += task.cached
        self._say(task.work, Begun(task.cached, _scores(task)))
        if self._keeps:
            self._prefixes.add(task.work.served.name, task.ids, task.prompt.layers())

    def _join(self, task: Task) -> bool:
        """Gives a prompt's choices the rows that are free; whether it has no more of them."""
        work = task.work
        if not work.sample.max_tokens:
            for slot in task.slots:
                self._finish(slot, Piece(slot.index, "", (), "length"))
            return True
        count = min(len(task.slots), self._max_batch - self._running())
        if count > 0:
            batch, slots = self._rows[work.served.name]
            batch.join(task.prompt, count)
            slots += task.slots[:count]
            del task.slots[:count]
        return not task.slots

    def _step(self, name: str) -> None:
        """Draws the next token of every row of a model."""
        batch, slots = self._rows[name]
        choices, bad = [], []
        for row, slot in enumerate(slots):
            try:
                choices.append(slot.next())
            except Exception as error:  # of a constraint
                bad.append(row)
                self._finish(slot, Piece(slot.index, "", (), "", self._meaning(error)))
        if bad:
            self._keep(name, [row for row in range(len(slots)) if row not in bad])
        if not slots:
            return
        try:
            self._draw(name, batch, slots, choices)
        except Exception as error:
            known = failures.meaning(error)
            if not (known and known.memory):
                raise
            self._prefixes.clear()
            for slot in slots:
                self._finish(slot, Piece(slot.index, "", (), "", known.line))
            self._keep(name, [])

    def _draw(self, name: str, batch: Any, slots: list[Slot], choices: list[Any]) -> None:
        """A step: the next forward pass is queued before this step's tokens are read."""
        config = self._served[name].model.config
        drawn = batch.draw(choices)
        going = [row for row, slot in enumerate(slots) if not (slot.last or _turns(config, slot))]
        for row in range(len(slots) if self._keeps else 0):
            if slots[row].last:
                self._hold(name, batch, row, slots[row].ids)
        before = list(slots)
        batch.go_on(drawn, going)
        slots[:] = [slots[row] for row in going]
        ended, self.counts.steps = set(), self.counts.steps + 1
        for slot, chosen in zip(before, drawn.read(), strict=True):
            try:
                piece = slot.take(chosen)
            except Exception as error:  # not finite, or of a constraint: of this row alone
                piece = Piece(slot.index, "", (), "", self._meaning(error))
            self.counts.generated_tokens += len(piece.drawn)
            if piece.reason or piece.error:
                ended.add(slot)
                self._finish(slot, piece, chosen.token)
            else:
                self._count_first(slot.work)
                self._say(slot.work, piece)
                if slot not in slots:
                    self._reading.appendleft(Task(slot.work, 0.0, slot.ids, [slot], again=True))
        if ended:
            for row, slot in enumerate(slots):
                if slot in ended and slot.row.reason == "eos":
                    self._hold(name, batch, row, [*slot.ids, slot.end])
                elif slot in ended and slot.row.reason:
                    self._hold(name, batch, row, slot.ids)
            self._keep(name, [row for row, slot in enumerate(slots) if slot not in ended])

    def _keep(self, name: str, rows: list[int]) -> None:
        batch, slots = self._rows[name]
        batch.keep(rows)
        slots[:] = [slots[row] for row in rows]

    def _hold(self, name: str, batch: Any, row: int, ids: list[int]) -> None:
        """Keeps what a row leaves behind, for a request that begins with it."""
        if self._keeps and len(ids) == batch.lengths[row]:
            self._prefixes.add(name, ids, batch.layers(row))

    def _finish(self, slot: Slot, piece: Piece, token: int = -1) -> None:
        """A choice's last word."""
        slot.end = token
        self._count_first(slot.work)
        self.counts.finished += not piece.error
        self.counts.failed += bool(piece.error)
        self._say(slot.work, piece)

    def _refuse(self, task: Task, reason: str, error: str) -> None:
        """The last word of a request that did not reach the batch."""
        self._began.pop(task.work, None)
        left = [slot.index for slot in task.slots] or range(len(task.work.copies))
        self.counts.failed += len(left) if error else 0
        for index in left:
            self._say(task.work, Piece(index, "", (), reason, error))

    def _count_first(self, work: Work) -> None:
        """Seconds from a request's arrival to its first token."""
        if (arrived := self._began.pop(work, None)) is None:
            return
        seconds, counts = time.monotonic() - arrived, self.counts
        counts.first_token_seconds = [*counts.first_token_seconds[1 - LATEST :], seconds]
        counts.first_token_total += seconds
        counts.first_token_count += 1

    def _say(self, work: Work, said: Begun | Piece) -> None:
        try:
            work.say(said)
        except Exception:  # whoever listened is gone
            self.cancel(work)

    def _meaning(self, error: Exception) -> str:
        """An error in one line; memory that later requests could begin with is given back where there is too little."""
        if isinstance(error, UserError | RunError):
            return str(error)
        known = failures.meaning(error)
        if known and known.memory:
            self._prefixes.clear()
        if not known:
            traceback.print_exc(file=sys.stderr)
        return known.line if known else f"{type(error).__name__}: {error}"


def _turns(config: ModelConfig, slot: Slot) -> bool:
    """Whether the frequencies change with the next token, so that the row is read anew: longrope's border."""
    return generation.switches(config, [slot.row], len(slot.row.tokens) + 1)


def _scores(task: Task) -> tuple[Drawn, ...]:
    """The prompt's tokens with their log-probabilities, the first without; () if nobody asked."""
    if not task.work.score_prompt:
        return ()
    made = [Drawn(task.ids[0])]
    for logprobs, ids, values in task.prompt.scores:
        for logprob, tops, theirs in zip(logprobs.tolist(), ids.tolist(), values.tolist(), strict=True):
            made.append(Drawn(task.ids[len(made)], logprob, tuple(zip(tops, theirs, strict=True))))
    return tuple(made)
