"""What storing merged weights in fewer bits loses of what the adapters changed; counted while the tensors pass."""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

_BLOCK = 1 << 18  # weights that are compared at a time


@dataclass
class Rounding:
    """Sums over the weights that adapters change, of tensors that are added one at a time; new rows do not count."""

    tensors: dict[str, tuple[float, float, int, int]] = field(default_factory=dict)
    dtypes: Counter[str] = field(default_factory=Counter)  # of what was stored; "packed": quantized again
    quantized: bool = False  # whether the base stays so

    def add(self, name: str, before: np.ndarray, exact: np.ndarray, stored: np.ndarray, dtype: str) -> None:
        """A tensor: the base's, with the adapters, and what is stored of that as ``dtype``; a later one replaces it."""
        lost, update, changed, unmoved = 0.0, 0.0, 0, 0
        step = max(1, _BLOCK * len(before) // max(before.size, 1))
        for start in range(0, min(len(before), len(exact)), step):
            old, new, kept = (np.asarray(each[start : start + step]) for each in (before, exact, stored))
            rows = min(len(old), len(new))
            old, new, kept = old[:rows], new[:rows].astype(np.float64), kept[:rows]
            moves = new != old
            lost += float(((kept.astype(np.float64) - new)[moves] ** 2).sum())
            update += float(((new - old) ** 2).sum())
            changed += int(np.count_nonzero(moves))
            unmoved += int(np.count_nonzero(moves & (kept == old.astype(kept.dtype))))
        self.tensors[name] = (lost, update, changed, unmoved)
        self.dtypes[dtype] += 1

    @property
    def lost(self) -> float:
        """Root mean square of the error of the changed weights, relative to that of their update."""
        lost, update = (math.fsum(each[i] for each in self.tensors.values()) for i in (0, 1))
        return math.sqrt(lost / update) if update else 0.0

    @property
    def changed(self) -> int:
        """How many weights the adapters change."""
        return sum(each[2] for each in self.tensors.values())

    @property
    def unmoved(self) -> int:
        """How many of these are stored as the base's value."""
        return sum(each[3] for each in self.tensors.values())

    def to_json(self) -> dict[str, object]:
        """The figures."""
        return {"lost": self.lost, "changed": self.changed, "unmoved": self.unmoved, "dtypes": sorted(self.dtypes)}

    def __str__(self) -> str:
        """One line; '' where what is stored is float32, or nothing of the base changed."""
        narrow = [name for name, _ in self.dtypes.most_common() if name != "float32"]
        if not narrow or not self.changed:
            return ""
        how = "quantizing" if "packed" in narrow else f"rounding to {narrow[0]}"
        still = f"{self.unmoved:,} of {self.changed:,} changed weights ({self.unmoved / self.changed:.1%})"
        cure = "--dequantize --dtype float32" if self.quantized else "--dtype float32"
        return (
            f"{how} loses {self.lost:.1%} of what the adapter changed (root mean square), and {still} stay as they "
            f"were; {cure} keeps the update"
        )
