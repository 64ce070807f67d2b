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

from mlxgpt.common import backend as backends
from mlxgpt.common.backend import Backend
from mlxgpt.common.serve.engine.prefixes import Prefixes
from mlxgpt.common.serve.engine.rows import Rows
from mlxgpt.common.serve.engine.slot import Slot, Task
from mlxgpt.common.serve.engine.steps import Steps
from mlxgpt.common.serve.engine.telling import Telling
from mlxgpt.common.serve.work import Begun, Busy, Counts, Drawn, Piece, Served, Stopped, Work

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
        self._prefixes = Prefixes(cache_bytes, backend.batching)
        self._kv_bits = kv_bits
        self._telling = Telling(self.cancel, self._prefixes.clear)
        self._steps = Steps(self._telling, self._prefixes)
        self.counts: Counts = self._telling.counts
        self._served: Mapping[str, Served] = MappingProxyType({})
        self._lock = threading.Condition()  # guards what follows
        self._queue: deque[Task] = deque()
        self._cancelled: set[Work] = set()
        self._ending = ""  # drain, now
        self._death: BaseException | None = None
        self._ready = threading.Event()
        # the engine's own
        self._reading: deque[Task] = deque()
        self._rows: dict[str, Rows] = {}  # of each model
        self._seconds = 1.0  # that a request takes, lately
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
                name: Rows(served, self._backend.batching, self._kv_bits) for name, served in self._served.items()
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
            self._telling.refuse(task, reason, error)
        for rows in self._rows.values():
            for slot in rows.slots:
                self._telling.say(slot.work, Piece(slot.index, "", (), reason, error))
            rows.slots.clear()

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
        for rows in self._rows.values():
            self._reading.extendleft(self._steps.step(rows))
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
        return sum(len(rows.slots) for rows in self._rows.values())

    def _drop(self, gone: set[Work]) -> None:
        """Takes the rows of requests out whose clients left."""
        self.counts.cancelled += sum(len(task.slots) for task in self._reading if task.work in gone)
        self._reading = deque(task for task in self._reading if task.work not in gone)
        for work in gone:
            self._telling.forget(work)
        for rows in self._rows.values():
            for row, slot in enumerate(rows.slots):
                if slot.work in gone:
                    self.counts.cancelled += 1
                    self._steps.hold(rows, row)
            rows.keep([row for row, slot in enumerate(rows.slots) if slot.work not in gone])

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
                self._telling.refuse(task, "", self._telling.meaning(error))
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
            self._telling.arrived(task)
            if self._prefixes.limit and not work.score_prompt:
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
        self._telling.say(task.work, Begun(task.cached, _scores(task)))
        if self._prefixes.limit:
            self._prefixes.add(task.work.served.name, task.ids, task.prompt.layers())

    def _join(self, task: Task) -> bool:
        """Gives a prompt's choices the rows that are free; whether it has no more of them."""
        work = task.work
        if not work.sample.max_tokens:
            for slot in task.slots:
                self._telling.finish(slot, Piece(slot.index, "", (), "length"))
            return True
        count = min(len(task.slots), self._max_batch - self._running())
        if count > 0:
            self._rows[work.served.name].join(task.prompt, task.slots[:count])
            del task.slots[:count]
        return not task.slots


def _scores(task: Task) -> tuple[Drawn, ...]:
    """The prompt's tokens with their log-probabilities, the first without; () if nobody asked."""
    if not task.work.score_prompt:
        return ()
    made = [Drawn(task.ids[0])]
    for logprobs, ids, values in task.prompt.scores:
        for logprob, tops, theirs in zip(logprobs.tolist(), ids.tolist(), values.tolist(), strict=True):
            made.append(Drawn(task.ids[len(made)], logprob, tuple(zip(tops, theirs, strict=True))))
    return tuple(made)
