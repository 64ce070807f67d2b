"""What a tensor that differs looks like: a transpose, another tensor, shifted rows, rows in rope's other order."""

import numpy as np

from convert.formats.opened import Opened
from convert.verify.report import Report
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.folders.model_folder import DTYPES


class Hints:
    """Collects digests while the tensors pass, and names at the end what each difference looks like."""

    def __init__(self, a: Opened, b: Opened):
        self._configs = (a.config, b.config)
        self._digests: tuple[dict[str, str], dict[str, str]] = ({}, {})
        self._found: dict[str, tuple[str, str]] = {}  # tensor -> (what differs, what it looks like)

    def seen(self, name: str, digests: tuple[str, str]) -> None:
        """Notes the sha256 of A's tensor and of B's."""
        for side, digest in enumerate(digests):
            self._digests[side][name] = digest

    def differs(self, name: str, first: np.ndarray, second: np.ndarray) -> None:
        """Looks at a pair that does not agree, while it is in memory."""
        if first.shape != second.shape:
            looks = "the transpose" if first.shape == second.shape[::-1] and _same(first.T, second) else ""
            self._found[name] = f"shape {list(first.shape)} | {list(second.shape)}", looks
            return
        self._found[name] = _extent(first, second), _look(name, first, second, self._configs[0])

    def report(self, report: Report) -> None:
        """A finding for each pair; blocks that changed places first."""
        moved = self._moved()
        for pair in _swaps(moved):
            report.find("tensors", pair, "the two blocks have changed places")
        for name, (extent, looks) in self._found.items():
            looks = looks or (f"B has A's {moved[name]} here" if name in moved else "")
            report.find("tensors", name, f"{looks}; {extent}" if looks else extent)

    def _moved(self) -> dict[str, str]:
        """Tensor of B that differs -> the tensor of A whose very bytes it has."""
        owners: dict[str, list[str]] = {}
        for name, digest in self._digests[0].items():
            owners.setdefault(digest, []).append(name)
        found = {name: owners.get(self._digests[1].get(name, ""), []) for name in self._found}
        return {name: names[0] for name, names in found.items() if len(names) == 1}


def _swaps(moved: dict[str, str]) -> list[str]:
    """``h.0 and h.1`` for each pair of blocks of which every tensor that differs has the other's bytes."""
    blocks: dict[str, set[str]] = {}
    for name, other in moved.items():
        head, source = name.split(".")[:2], other.split(".")[:2]
        if head[0] == source[0] == "h" and name.split(".")[2:] == other.split(".")[2:]:
            blocks.setdefault(".".join(head), set()).add(".".join(source))
    return [
        f"{one} and {other}"
        for one, others in blocks.items()
        for other in others
        if len(others) == 1 and blocks.get(other) == {one} and int(one[2:]) < int(other[2:])
    ]


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return bool(np.array_equal(first, second.astype(first.dtype, copy=False)))


def _extent(first: np.ndarray, second: np.ndarray) -> str:
    """How much of a tensor differs, and where most."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    gap = np.abs(a - b)
    other = ~(a == b)  # NaN differs from itself
    at = tuple(int(i) for i in np.unravel_index(int(np.nanargmax(np.where(np.isnan(gap), np.inf, gap))), gap.shape))
    rows = np.flatnonzero(other.reshape(len(other), -1).any(axis=1)) if other.ndim > 1 else ()
    only = f", all in row {rows[0]}" if len(rows) == 1 and other.sum() > 1 else ""
    count = f"{int(other.sum())} of {other.size} values differ{only}"
    return f"{count}, max |d| {gap[at]:.3g} at {list(at)}: {a[at]:.9g} | {b[at]:.9g}"


def _look(name: str, first: np.ndarray, second: np.ndarray, config: ModelConfig) -> str:
    """The first explanation that fits exactly, or ''."""
    if first.ndim == 2 and first.shape[0] == first.shape[1] and _same(first.T, second):
        return "B has A's transpose"
    order = _pairs(name, first, config)
    if order is not None:
        if _same(first[order], second):
            return "the rows of q and k are in pairs in B (as llama2.c and GGUF have them), in halves in A"
        if _same(first, second[order]):
            return "the rows of q and k are in pairs in A (as llama2.c and GGUF have them), in halves in B"
    if len(first) > 2:
        for shift in (1, -1):
            if _same(np.roll(first, shift, axis=0), second):
                return f"B's rows are A's, shifted by {shift}"
    if first.ndim == 1 and np.array_equal((first.astype(np.float32) + 1).astype(second.dtype), second):
        return "B is A + 1"
    if first.ndim == 1 and np.array_equal((second.astype(np.float32) + 1).astype(first.dtype), first):
        return "A is B + 1"
    for label, values, target in (("A", first, second), ("B", second, first)):
        for spelled, dtype in DTYPES.items():
            with np.errstate(over="ignore"):
                if dtype.itemsize < values.dtype.itemsize and _same(target, values.astype(dtype)):
                    return f"the other side is {label} rounded to {spelled}, though stored as {target.dtype}"
    return ""


def _pairs(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray | None:
    """The order of rows that puts the halves of each head side by side; None where rope turns no rows of a tensor."""
    if config.position != "rope" or config.rotary_dim != config.head_dim or config.qkv_by_head:
        return None
    H, K, D = config.n_head, config.n_kv_head, config.head_dim
    heads = {"q_proj": H, "k_proj": K, "c_attn": H + K}.get(name.split(".")[-2], 0)
    if not heads or len(array) < heads * D:
        return None
    order = np.arange(len(array))
    order[: heads * D] = order[: heads * D].reshape(heads, 2, D // 2).swapaxes(1, 2).reshape(-1)
    return order
