"""What stops a run: numbers that are not finite, and tensors that do not train."""

import hashlib
import math

import numpy as np

from mlxgpt.common.batch import Batch, Engine, StepStats
from mlxgpt.common.errors import RunError
from mlxgpt.common.model.params import Param

PATIENCE = 3  # steps in a row that are not finite


def describe_targets(batch: Batch) -> str:
    """A line about the share of a batch's tokens that are targets.

    Raises:
        RunError: none is.
    """
    asked, total = int(np.count_nonzero(batch.weights)), batch.weights.size
    if not asked:
        raise RunError(f"step 1: none of the {total:,} tokens of the batch is a target; expected some")
    return f"step 1: {asked:,} of {total:,} tokens are targets ({asked / total:.1%})"


def row_origins(batch: Batch, limit: int = 4) -> str:
    """Where a batch's rows came from, for messages."""
    more = f" and {len(batch.row_ids) - limit} more" if len(batch.row_ids) > limit else ""
    return ", ".join(batch.row_ids[:limit]) + more if batch.row_ids else f"{len(batch.tokens)} rows"


class Finite:
    """Counts the steps in a row whose loss or gradient was not finite; the engine has skipped their updates."""

    def __init__(self) -> None:
        self.streak = 0

    def check(self, step: int, stats: StepStats, batch: Batch) -> str:
        """A message about a skipped update, or ''.

        Raises:
            RunError: it was the third in a row.
        """
        if stats.finite:
            self.streak = 0
            return ""
        self.streak += 1
        loss = stats.loss_sum / stats.weight
        what = f"loss {loss:.4g}" if not math.isfinite(loss) else f"gradient norm {stats.grad_norm:.4g}"
        message = f"step {step}: {what} is not finite; update skipped; rows: {row_origins(batch)}"
        if self.streak == PATIENCE:
            raise RunError(f"{message}; {PATIENCE} steps in a row")
        return message


class FirstUpdates:
    """Watches the first two updates of a run: every trainable tensor must get a gradient and change.

    A tensor whose gradient is zero by design at the start (zero_grad_at_init) may have none in the first one, an idle
    one never.
    """

    def __init__(self, engine: Engine, table: dict[str, Param]):
        self._engine, self._table = engine, table
        self._idle = {name for name, param in table.items() if param.idle}
        self._before = self._digests() if engine.t == 0 else {}

    def _digests(self) -> dict[str, bytes]:
        weights = self._engine.snapshot()["params"]
        return {name: _digest(array) for name, array in weights.items()}

    def check(self, stats: StepStats, rate: float) -> None:
        """Checks an applied update, whose learning rate was ``rate``; call it after each.

        Raises:
            RunError: names the tensors that do not train.
        """
        update = self._engine.t
        if update > 2:
            return
        zero = [n for n in stats.zero_grads if n not in self._idle]
        zero = [n for n in zero if update > 1 or not self._table[n].zero_grad_at_init]
        if zero:
            raise RunError(f"{_some(zero)}: the gradient of update {update} is exactly zero: it would never train")
        if update == 2 and self._before:
            after = self._engine.snapshot()
            weights, moments = after["params"], after["m"]
            watched = {name: digest for name, digest in self._before.items() if name not in self._idle}
            same = [name for name, digest in watched.items() if _digest(weights[name]) == digest]
            same = [name for name in same if _would_show(weights[name], moments[name], rate)]
            if same:
                raise RunError(f"{_some(same)}: no bit has changed after two updates: it does not train")


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(array.tobytes(), digest_size=16).digest()


def _would_show(weights: np.ndarray, moments: np.ndarray, rate: float) -> bool:
    """Whether an update at ``rate`` can change bits: a warm-up rate of 1e-6 cannot change a norm's 1.0.

    Adam's first update is about ``rate`` wherever there is a gradient. Without moments the tensor was never updated.
    """
    moved = moments != 0
    return not moved.any() or bool((rate > np.spacing(np.abs(weights)))[moved].any())


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
