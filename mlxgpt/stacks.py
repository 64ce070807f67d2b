"""Tensors that are updated alike, as one array on a GPU: a layer more adds no kernel to an update but copies.

A GPU starts a kernel in the time in which it updates some 100,000 weights. Weights and moments of one shape and one
rule are therefore one array (n, *shape), and the model has views of it. On a CPU each tensor is an array of its own.
"""

from collections.abc import Mapping

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt.common.model.params import Param
from mlxgpt.layers import Array


def helps(device: mx.Device) -> bool:
    """Whether the device takes time to start a kernel."""
    return device != mx.Device(mx.cpu)


class Stacks:
    """Which tensors are one array, by the name of the first.

    Args:
        table: all tensors that are trained.
        muon: names of those that Muon updates.
        device: what they are on.
    """

    def __init__(self, table: Mapping[str, Param], muon: set[str], device: mx.Device):
        self.together = helps(device)
        groups: dict[object, list[str]] = {}
        for name, param in table.items():
            key = (param.shape, param.lr, param.decay, name in muon) if self.together else name
            groups.setdefault(key, []).append(name)
        self._groups = {names[0]: names for names in groups.values()}

    @property
    def names(self) -> list[str]:
        """All tensors in the order of the groups."""
        return [name for names in self._groups.values() for name in names]

    def join(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays by name as arrays by group: a kernel an array, none for the only one of a group."""
        if not self.together:
            return dict(arrays)
        each = {group: [arrays[name] for name in names] for group, names in self._groups.items() if group in arrays}
        return {group: mx.stack(own) if own[1:] else own[0][None] for group, own in each.items()}

    def split(self, stacks: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays by group as views by name."""
        if not self.together:
            return dict(stacks)
        each = ((self._groups[group], stack) for group, stack in stacks.items())
        parts = (zip(names, mx.split(stack, len(names)), strict=True) for names, stack in each)
        return {name: part.squeeze(0) for own in parts for name, part in own}

    def squares(self, array: Array) -> Array:
        """The sum of the squares of each tensor of a group, (n,)."""
        rows = mx.square(array).sum(axis=-1)
        return rows.reshape(len(array), -1).sum(axis=-1) if self.together else rows.sum()[None]
