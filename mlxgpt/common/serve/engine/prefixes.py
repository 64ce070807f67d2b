"""Keys and values of what earlier requests held, for requests that begin alike; the least used are forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import rotary

LEAST = 8  # tokens: to copy fewer costs more than to read them


@dataclass(eq=False)
class _Entry:
    """Tokens (n,) and their keys and values, under the name of the model that made them."""

    name: str
    ids: np.ndarray
    layers: Any
    bytes: int
    used: int


class Prefixes:
    """Holds at most ``limit`` bytes.

    Args:
        limit: 0 keeps nothing.
        batching: the backend's module, which knows the arrays.
    """

    def __init__(self, limit: int, batching: Any) -> None:
        self.limit, self._batching = limit, batching
        self._entries: list[_Entry] = []
        self._clock = 0

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(entry.bytes for entry in self._entries)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    def find(self, name: str, config: ModelConfig, ids: Sequence[int]) -> tuple[int, Any]:
        """How many of the first tokens are held, at most all but one, and their keys and values; 0 and None for few."""
        wanted, best, most = np.array(ids[:-1], np.int64), None, LEAST - 1
        for entry in self._entries:
            if entry.name == name and self._usable(config, len(entry.ids), len(ids)):
                same = _alike(entry.ids, wanted)
                if same > most and self._batching.reaches(entry.layers, same):
                    best, most = entry, same
        if best is None:
            return 0, None
        self._clock += 1
        best.used = self._clock
        return most, self._batching.first(best.layers, most)

    @staticmethod
    def _usable(config: ModelConfig, held: int, length: int) -> bool:
        """Whether keys of a sequence of ``held`` tokens are those of one of ``length``."""
        return not rotary.by_length(config) or max(held, length) <= config.rope_original

    def add(self, name: str, ids: Sequence[int], layers: Any) -> None:
        """Holds a sequence; those that it begins with are no longer needed."""
        made, size = np.array(ids, np.int64), self._batching.size(layers)
        if size > self.limit:
            return
        self._clock += 1
        kept = []
        for entry in self._entries:
            same = _alike(entry.ids, made) if entry.name == name else 0
            if same == len(made) and self._batching.reaches(entry.layers, same):  # nothing new
                entry.used = self._clock
                return
            if same < len(entry.ids) or not self._batching.reaches(layers, same):
                kept.append(entry)
        self._entries = [*kept, _Entry(name, made, layers, size, self._clock)]
        total = self.bytes
        for entry in sorted(self._entries, key=lambda entry: entry.used):
            if total <= self.limit:
                break
            self._entries.remove(entry)
            total -= entry.bytes


def _alike(one: np.ndarray, two: np.ndarray) -> int:
    """How many tokens both begin with."""
    size = min(len(one), len(two))
    differ = np.flatnonzero(one[:size] != two[:size])
    return int(differ[0]) if len(differ) else size
