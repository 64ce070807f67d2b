"""What ``print(model)`` shows: parameters, layers and shapes, blocks that are alike once."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from mlxgpt.common.config import ModelConfig

_BLOCK = re.compile(r"h\.(\d+)\.(.+)")


class Size(NamedTuple):
    """Of one tensor: its shape, how many parameters it holds, whether they train, and what else is to be said."""

    shape: tuple[int, ...]
    trains: bool = True
    dtype: str = "float32"
    bits: int = 0  # > 0: packed in words of 32 bits

    @property
    def count(self) -> int:
        """Parameters."""
        return math.prod(self.shape) * (32 // self.bits if self.bits else 1)

    @property
    def text(self) -> str:
        """The shape that the matrix stands for."""
        if self.bits:
            return f"({self.shape[0]}, {self.shape[1] * 32 // self.bits}) in {self.bits} bits"
        return str(tuple(self.shape))


def describe(config: ModelConfig, sizes: Mapping[str, Size], compute: str, training: bool, dropout: float) -> str:
    """Lines on the whole, then one a tensor; ``compute``: the blocks' dtype."""
    # a quantized matrix counts by its words
    shown = {name: size for name, size in sizes.items() if name.rpartition(".")[2] not in ("scales", "biases")}
    total, trained = (sum(size.count for size in shown.values() if size.trains or every) for every in (True, False))
    kept = {size.dtype for size in shown.values() if not size.bits}
    heads = f"{config.n_head} heads of {config.head_dim}"
    if config.n_kv_head != config.n_head:
        heads += f", {config.n_kv_head} of keys and values"
    end = f"labels {', '.join(config.labels)}" if config.labels else f"vocabulary {config.vocab_size}"
    own = f", of which {trained:,} train" if trained != total else ""
    parts = [
        f"{config.family}: {total:,} parameters{own}; {config.n_layer} layers, width {config.n_embd}, {heads}; "
        f"context {config.block_size}, {end}",
        f"weights {' and '.join(sorted(kept))}, computes in {compute}; "
        f"{'training' if training else 'evaluation'} mode, dropout {dropout:g}",
    ]
    rows = [("  " * depth + name, text, count) for depth, name, text, count in _rows(shown)]
    if config.tied and not config.labels:
        rows.append(("head", "wte.weight, transposed", 0))
    names, texts = (max((len(row[n]) for row in rows), default=0) for n in (0, 1))
    lines = [f"  {name:{names}}  {text:{texts}}" + (f"  {count:>13,}" if count else "") for name, text, count in rows]
    return "\n".join([*parts, *(line.rstrip() for line in lines)])


def _rows(sizes: Mapping[str, Size]) -> list[tuple[int, str, str, int]]:
    """Depth, name, shape and parameters; neighboring blocks with the same tensors are one group."""
    blocks: dict[int, dict[str, Size]] = {}
    for name, size in sizes.items():
        if found := _BLOCK.fullmatch(name):
            blocks.setdefault(int(found[1]), {})[found[2]] = size
    grouped = [list(group) for _, group in itertools.groupby(sorted(blocks), key=lambda n: list(blocks[n].items()))]
    made: list[tuple[int, str, str, int]] = []
    for name, size in sizes.items():
        if not _BLOCK.fullmatch(name):
            made.append((0, name, size.text, size.count))
            continue
        for group in grouped:
            inside = blocks[group[0]]
            many = len(group) > 1
            title = f"h.{group[0]} to h.{group[-1]}, each" if many else f"h.{group[0]}"
            made.append((0, title, "", sum(each.count for each in inside.values())))
            made += [(1, each, one.text, one.count) for each, one in inside.items()]
        grouped = []
    return made
