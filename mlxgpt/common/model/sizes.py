"""What ``print(model)`` shows: parameters, layers and shapes, blocks that are alike once."""

import itertools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_BLOCK = re.compile(r"h\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Size:
    """The shape of a tensor, or of the matrix that its words stand for, and in how many ``bits`` (0: not quantized)."""

    shape: tuple[int, ...]
    bits: int = 0

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return str(self.shape) + (f" in {self.bits} bits" if self.bits else "")


class Row(NamedTuple):
    """A line: how far it is indented, a name, a shape and a number of parameters."""

    depth: int
    name: str
    shape: str
    parameters: int


def describe(model: Any, arrays: Mapping[str, Any], trained: Collection[str]) -> str:
    """Two lines on the whole, then one a tensor.

    Args:
        model: either framework's.
        arrays: its tensors by name, buffers too.
        trained: the names of those that train.
    """
    config, sizes, dtypes = model.config, {}, set()
    for name, array in arrays.items():
        path, _, kind = name.rpartition(".")
        if kind.startswith("_") or kind in ("scales", "biases"):
            continue  # no parameters, or of a quantized matrix, which counts by its words
        bits, shape = model.at(path).bits if kind == "words" else 0, tuple(array.shape)
        sizes[name] = Size((*shape[:-1], shape[-1] * 32 // bits) if bits else shape, bits)
        dtypes |= set() if bits else {_dtype(array.dtype)}
    total = sum(size.parameters for size in sizes.values())
    own = sum(size.parameters for name, size in sizes.items() if name in trained)
    heads = f"{config.n_head} heads of {config.head_dim}"
    if config.n_kv_head != config.n_head:
        heads += f", {config.n_kv_head} of keys and values"
    end = f"labels {', '.join(config.labels)}" if config.labels else f"vocabulary {config.vocab_size}"
    end = "a score" if config.scores else end
    rows = _rows(sizes)
    if config.tied and not config.labels:
        rows.append(Row(0, "head", "wte.weight, transposed", 0))
    names = [2 * row.depth * " " + row.name for row in rows]
    wide, high = max(map(len, names)), max(len(row.shape) for row in rows)
    lines = [
        f"  {name:{wide}}  {row.shape:{high}}" + (f"  {row.parameters:>13,}" if row.parameters else "")
        for name, row in zip(names, rows, strict=True)
    ]
    first = [
        f"{config.family}: {total:,} parameters{f', of which {own:,} train' if own != total else ''}; "
        f"{config.n_layer} layers, width {config.n_embd}, {heads}; context {config.block_size}, {end}",
        f"weights {' and '.join(sorted(dtypes))}, computes in {_dtype(model.dtype)}; "
        f"{'training' if model.training else 'evaluation'} mode, dropout {model.dropout:g}",
    ]
    return "\n".join(line.rstrip() for line in (*first, *lines))


def _dtype(dtype: Any) -> str:
    """The name of a framework's dtype without the framework's."""
    return str(dtype).rpartition(".")[2]


def _rows(sizes: Mapping[str, Size]) -> list[Row]:
    """A line a tensor; neighboring blocks with the same tensors are one."""
    blocks: dict[int, dict[str, Size]] = {}
    for name, size in sizes.items():
        if found := _BLOCK.fullmatch(name):
            blocks.setdefault(int(found[1]), {})[found[2]] = size
    alike = [list(group) for _, group in itertools.groupby(sorted(blocks), key=lambda n: list(blocks[n].items()))]
    made: list[Row] = []
    for name, size in sizes.items():
        if not _BLOCK.fullmatch(name):
            made.append(Row(0, name, str(size), size.parameters))
            continue
        for group in alike:
            inside = blocks[group[0]]
            title = f"h.{group[0]} to h.{group[-1]}, each" if len(group) > 1 else f"h.{group[0]}"
            made.append(Row(0, title, "", sum(each.parameters for each in inside.values())))
            made += [Row(1, each, str(one), one.parameters) for each, one in inside.items()]
        alike = []
    return made
