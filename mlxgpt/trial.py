"""A decoder of any choices on given tokens, in MLX on the CPU: convert/adopt tries hundreds of them."""

from collections.abc import Mapping
from pathlib import Path

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.layers import Array
from mlxgpt.load import load
from mlxgpt.model import Model
from mlxgpt.probe import host, watch


class Trials:
    """Runs candidates one after the other; a weight that two of them share is made an array of the framework once.

    ``exact``: in float64, which PyTorch alone has for every layer.

    Raises:
        UserError: ``exact`` in MLX.
    """

    def __init__(self, exact: bool = False):
        if exact:
            raise UserError("float64 is of the torch backend alone: expected --backend torch")
        mx.set_default_device(mx.Device(mx.cpu))
        self._held: dict[str, tuple[np.ndarray, Array]] = {}

    def array(self, name: str, given: np.ndarray) -> Array:
        """A weight of a candidate."""
        if name not in self._held or self._held[name][0] is not given:
            self._held[name] = given, mx.array(given)
        return self._held[name][1]

    def model(self, config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Model:
        """The decoder of ``config`` with float32 ``weights`` by our names, all of params.table."""
        model = Model(config, seed=None)
        for name, given in weights.items():
            module, _, kind = name.rpartition(".")
            setattr(model.at(module), kind, self.array(name, given))
        model.eval()
        return model

    def run(
        self, config: ModelConfig, weights: Mapping[str, np.ndarray], ids: np.ndarray, hidden: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (B, T, V) of ids (B, T) and, if asked, what enters the first block and what each gives (B, T, C)."""
        model = self.model(config, weights)
        last, seen = watch(model, mx.array(ids), [f"h.{n}" for n in range(config.n_layer)] if hidden else [])
        states = [seen["h.0"]._given[0], *(each._gave for each in seen.values())] if hidden else []
        return host(model.head(last)), [host(state) for state in states]


def answer(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of ids (B, T) from a model folder, in float32 on the CPU."""
    model, _ = load(folder, device="cpu")
    return host(model(mx.array(ids)))
