"""What flows between the loop and an engine: plain numpy, no framework.

B rows, T tokens a row.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is asked of them.

    ``weights`` is 0 where a position is not a target. ``positions`` and ``segments`` are None when every row is one
    text that starts at position 0. ``first_row`` is the index of row 0 in the global batch: dropout is a function of
    it, so a micro-batch draws the masks that its rows have in the whole.
    """

    tokens: np.ndarray  # (B, T) int32
    targets: np.ndarray  # (B, T) int32
    weights: np.ndarray  # (B, T) float32
    positions: np.ndarray | None = None  # (B, T) int32
    segments: np.ndarray | None = None  # (B, T) int32
    row_ids: tuple[str, ...] = ()  # where each row came from, for messages
    first_row: int = 0
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)  # (B, ...) what an objective reads besides
    together: int = 1  # rows that no micro-batch separates, such as the two of a pair
    each: float = 0.0  # what a row counts in ``weight``; 0: its weights
    idle: str = ""  # why there is nothing to learn from it, and so no update

    @property
    def weight(self) -> float:
        """What the sum of the losses is divided by: the weights' sum, or ``each`` of every row."""
        return self.each * len(self.tokens) or float(self.weights.sum(dtype=np.float64))

    def split(self, items: int) -> list["Batch"]:
        """Micro-batches of at most ``items`` times ``together`` rows, in order; 0 = the batch as it is."""
        count, rows = len(self.tokens), items * self.together
        if not rows or rows >= count:
            return [self]
        return [self._slice(start, min(start + rows, count)) for start in range(0, count, rows)]

    def _slice(self, start: int, stop: int) -> "Batch":
        def cut(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[start:stop]

        return dataclasses.replace(
            self,
            tokens=self.tokens[start:stop],
            targets=self.targets[start:stop],
            weights=self.weights[start:stop],
            positions=cut(self.positions),
            segments=cut(self.segments),
            row_ids=self.row_ids[start:stop],
            beside={name: array[start:stop] for name, array in self.beside.items()},
            first_row=self.first_row + start,
        )


class Source(Protocol):
    """Where the loop takes its batches from."""

    digest: dict[str, str]
    """Name -> sha256 of every file the data consists of; a resumed run compares it."""

    def batch(self, step: int) -> Batch:
        """The global batch of ``step`` (from 1): a pure function of (seed, stream, step)."""
        ...

    def validation(self) -> Iterator[Batch]:
        """The validation batches, the same ones in the same order each time."""
        ...


@dataclass(frozen=True)
class StepStats:
    """What one update reports. The loss is the one before the update; sums are float64 on the host."""

    loss_sum: float  # sum of weights * losses over the global batch
    weight: float
    grad_norm: float  # global norm before clipping, of the mean-loss gradient
    finite: bool  # False: loss or gradient is not finite and the update was skipped
    sums: dict[str, float] = field(default_factory=dict)  # what else the objective adds up
    zero_grads: tuple[str, ...] = ()  # trainable tensors whose gradient is exactly zero


class State(TypedDict):
    """An engine's state on the host, by canonical names; all arrays are float32."""

    params: dict[str, np.ndarray]
    m: dict[str, np.ndarray]
    v: dict[str, np.ndarray]  # without Muon's tensors
    t: int  # applied updates


class Engine(Protocol):
    """A framework's half of training: mlxgpt.engine.Engine and torch_ref.engine.Engine.

    ``Engine(recipe, params, device="auto")`` takes host float32 parameters by canonical name.
    """

    t: int
    """Applied updates."""

    model: Any
    """The framework's model, for generation."""

    unused_limits: list[str]
    """A line for each memory setting of the recipe that has no effect on this device."""

    note: str
    """What became of a quantized base, or ''."""

    def train_step(self, step: int, micro_batches: list[Batch], lr: float) -> StepStats:
        """One update from the micro-batches of one global batch; ``step`` addresses the dropout masks.

        ``lr`` is the AdamW rate of this step; muon's rate is ``lr * muon_lr / optim.lr``.
        """
        ...

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Float64 sums without dropout or smoothing, always with ``loss`` and ``weight``."""
        ...

    def token_losses(self, batch: Batch) -> np.ndarray:
        """The plain next-token losses (B, T) float32, without dropout and unweighted; with rl.temperature, at it."""
        ...

    def logps(self, batch: Batch) -> np.ndarray:
        """Log-probabilities (B,) float32 of the rows' targets, each by its weight, added up as a training step does."""
        ...

    def snapshot(self) -> State:
        """Host copies that the caller owns."""
        ...

    def load_state(self, state: State) -> None:
        """Takes a snapshot back; UserError names the first tensor that is not as expected."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes: ``active`` and ``peak``."""
        ...

    def describe(self) -> dict[str, str]:
        """``framework``, ``version``, ``device``, ``blas``, ``threads``, ``compiled``: the environment key's parts."""
        ...
