"""A decoder of any choices on given tokens, in PyTorch on the CPU: convert/adopt tries hundreds of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mlxgpt.common.config import ModelConfig
from torch_ref.layers import Array
from torch_ref.load import load
from torch_ref.model import Model
from torch_ref.probe import host, watch


class Trials:
    """Runs candidates one after the other; a weight that two of them share is made an array of the framework once.

    ``exact``: in float64, which PyTorch alone has for every layer.
    """

    def __init__(self, exact: bool = False):
        self._dtype = torch.float64 if exact else torch.float32
        self._held: dict[str, tuple[np.ndarray, Array]] = {}

    def array(self, name: str, given: np.ndarray) -> Array:
        """A weight of a candidate."""
        if name not in self._held or self._held[name][0] is not given:
            self._held[name] = given, torch.tensor(given, dtype=self._dtype)
        return self._held[name][1]

    def model(self, config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Model:
        """The decoder of ``config`` with float32 ``weights`` by our names, all of params.table."""
        model = Model(config, self._dtype, seed=None)
        for name, given in weights.items():
            module, _, kind = name.rpartition(".")
            getattr(model.at(module), kind).data = self.array(name, given)
        model.eval()
        return model

    @torch.no_grad()
    def run(
        self, config: ModelConfig, weights: Mapping[str, np.ndarray], ids: np.ndarray, hidden: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (B, T, V) of ids (B, T) and, if asked, what enters the first block and what each gives (B, T, C)."""
        model = self.model(config, weights)
        last, seen = watch(
            model, torch.from_numpy(ids).long(), [f"h.{n}" for n in range(config.n_layer)] if hidden else []
        )
        states = [seen["h.0"]._given[0], *(each._gave for each in seen.values())] if hidden else []
        return host(model.head(last)), [host(state) for state in states]


@torch.no_grad()
def answer(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of ids (B, T) from a model folder, in float32 on the CPU."""
    model, _ = load(folder, device="cpu")
    return host(model(torch.from_numpy(ids).long()))
