"""A walk through a model that holds the weights of one block, in MLX; the host has what is between."""

import dataclasses
from collections.abc import Collection, Mapping

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from mlxgpt import device as devices
from mlxgpt import rope
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.inference import calibration
from mlxgpt.common.inference.calibration import Compared, Inputs, Stream, Sums, Weights
from mlxgpt.common.model import params, rotary
from mlxgpt.generate import HEAD
from mlxgpt.layers import Array
from mlxgpt.losses import cross_entropy
from mlxgpt.model import Model
from mlxgpt.probe import Watched, host, put


class Walk:
    """Takes rows of tokens, all of one length, through a model block by block, in float32.

    Each call is given the weights of its place by the model's names (calibration.block_names and the like), takes what
    is quantized as its matrix, and keeps none of them. Nothing is cut: rows are at most block_size long.

    Args:
        config: the model's.
        device: as ``load`` has it.

    Raises:
        UserError: a device that is not here.
    """

    def __init__(self, config: ModelConfig, device: str = "auto"):
        self.config, self.device = config, devices.use(device)
        self._model = Model(dataclasses.replace(config, n_layer=1, no_rope=(), window_layers=()), seed=None)
        self._model.eval()
        self._leave([*params.table(self._model.config)])

    def start(self, weights: Weights, tokens: np.ndarray) -> np.ndarray:
        """What the first block is given, (N, T, C) float32, of tokens (N, T)."""
        model, places, parts = self._model, mx.arange(tokens.shape[1]), []
        self._show(self._arrays(weights, calibration.start_names(self.config)))
        for piece in calibration.batches(*tokens.shape):
            parts.append(host(model.placed(model.wte(mx.array(tokens[piece])), places)))
        self._leave(calibration.start_names(self.config))
        return np.concatenate(parts)

    def block(
        self, n: int, weights: Weights, x: np.ndarray, watch: Collection[str] = ()
    ) -> tuple[np.ndarray, dict[str, Inputs]]:
        """What block ``n`` makes of x (N, T, C), and what it gives the matrices ``watch``, such as attn.q_proj."""
        config, model, T = self.config, self._model, x.shape[1]
        local, places, names = n in config.window_layers, mx.arange(T), calibration.block_names(config, n)
        mask = model.mask(T, T, None, None, config.window if local else 0, not config.attn_softcap)
        turn = None
        if config.position == "rope" and n not in config.no_rope:
            turn = model.rope(places, local, rope.lengths(places, None) if rotary.by_length(config) else None)
        self._show(self._arrays(weights, names))
        watched = {path: Watched(model.at(f"h.0.{path}")) for path in watch}
        sums, y = {path: Sums() for path in watch}, np.empty_like(x)
        for path, module in watched.items():
            put(model, f"h.0.{path}", module)
        try:
            for piece in calibration.batches(len(x), T):
                made = model.h[0](mx.array(x[piece]), mask, turn)
                mx.eval(made, [each._given[0] for each in watched.values()])
                y[piece] = host(made)
                for path, each in watched.items():
                    sums[path].add(*gathered(each._given[0]), made.shape[0] * T)
                    each._given = ()
        finally:
            for path, each in watched.items():
                put(model, f"h.0.{path}", each.module)
            self._leave(names)
        return y, {path: each.inputs() for path, each in sums.items()}

    def head_inputs(self, weights: Weights, x: np.ndarray) -> Inputs:
        """What the head is given where the last block gave x (N, T, C)."""
        sums, names = Sums(), [name for name in calibration.head_names(self.config) if name.startswith("ln_f.")]
        self._show(self._arrays(weights, names))
        for piece in calibration.batches(*x.shape[:2]):
            sums.add(*gathered(self._model.ln_f(mx.array(x[piece]))), x[piece].shape[0] * x.shape[1])
        self._leave(names)
        return sums.inputs()

    def losses(self, stream: Stream, targets: np.ndarray) -> np.ndarray:
        """Next-token losses (N, T) float32 of targets (N, T)."""
        return self.compare(stream, None, targets).before

    def compare(self, before: Stream, after: Stream | None, targets: np.ndarray) -> Compared:
        """Losses of two models on targets (N, T), and how far they are apart; without ``after``, of one."""
        names = calibration.head_names(self.config)
        streams = [(self._arrays(each.weights, names), each.x) for each in (before, after or before)]
        if after is None:
            streams.pop()
        found = Compared(*(np.zeros(targets.shape, np.float32) for _ in range(3)))
        for piece in calibration.batches(*targets.shape):
            for start in range(0, targets.shape[1], HEAD):
                part, labels = (piece, slice(start, start + HEAD)), mx.array(targets[piece, start : start + HEAD])
                made = []
                for (arrays, x), losses in zip(streams, found[:2], strict=False):
                    self._show(arrays)
                    made.append(self._model.head(self._model.ln_f(mx.array(x[part]))))
                    losses[part] = host(cross_entropy(made[-1], labels))
                if after is not None:
                    found.kl[part] = host(divergence(made[0], made[1]))
        self._leave(names)
        return found

    def _names(self, names: Collection[str]) -> dict[str, str]:
        """Where the model of one block has a parameter."""
        return {name: f"h.0.{name.split('.', 2)[2]}" if name.startswith("h.") else name for name in names}

    def _arrays(self, weights: Weights, names: Collection[str]) -> dict[str, Array]:
        """Parameters on the device, by where the model has them."""
        return {place: mx.array(calibration.held(weights, name)) for name, place in self._names(names).items()}

    def _show(self, arrays: Mapping[str, Array]) -> None:
        """Gives the model parameters."""
        for place, array in arrays.items():
            path, _, kind = place.rpartition(".")
            setattr(self._model.at(path), kind, array)

    def _leave(self, names: Collection[str]) -> None:
        """Takes them from it."""
        self._show(dict.fromkeys(self._names(names).values(), mx.zeros((0,))))


def gathered(x: Array) -> tuple[np.ndarray, np.ndarray]:
    """x^T x (n_in, n_in), and the sums of |x| (n_in,), of inputs (..., n_in)."""
    flat = x.reshape(-1, x.shape[-1])
    return host(flat.T @ flat), host(mx.abs(flat).sum(axis=0))


def divergence(before: Array, after: Array) -> Array:
    """KL(before || after) in nats, (...), of the distributions that logits (..., V) in float32 mean."""
    p, q = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (before, after))
    return (mx.exp(p) * (p - q)).sum(axis=-1)
