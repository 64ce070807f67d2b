"""MLX's half of training: gradients and updates of one global batch, and the state that a checkpoint holds."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import adapters, losses, optim, quant
from mlxgpt import device as devices
from mlxgpt.common import rng
from mlxgpt.common.batch import Batch, State, StepStats
from mlxgpt.common.config import Recipe
from mlxgpt.common.model import adapters as adapter_params
from mlxgpt.common.model import params as parameters
from mlxgpt.common.model import quantize_base
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.scores import confusion
from mlxgpt.layers import Array, Dropout
from mlxgpt.model import Model
from mlxgpt.noise import SITES


class Engine:
    """See common/batch.py, Engine. Masters and moments are float32; the blocks compute in train.compute_dtype.

    Args:
        recipe: model (with vocab_size), optim and train are read; in fine-tuning also tune and adapter.
        params: float32 arrays by the names of params.table, or quantized matrices, and those of the adapter
            (common/model/adapters.py). What adapters.trainable does not name is frozen: no gradient, no moments.
        device: ``auto``, ``cpu`` or ``gpu``.

    Raises:
        UserError: a parameter is missing, unknown or of another shape.
    """

    def __init__(self, recipe: Recipe, params: Mapping[str, np.ndarray | Quantized], device: str = "auto"):
        self.device = devices.use(device)
        self.unused_limits = devices.limit(self.device, recipe.train)
        self.recipe = recipe
        self.table = adapter_params.trainable(recipe)
        self.adapted = adapter_params.targets(recipe.model, recipe.adapter) if recipe.adapter else {}
        self.adapter_dropout = recipe.adapter.dropout if recipe.adapter else 0.0
        self.objective = losses.classify if recipe.model.labels else losses.lm
        self.neftune = recipe.tune.neftune if recipe.tune else 0.0
        train = recipe.train
        self.model = Model(recipe.model, getattr(mx, train.compute_dtype), train.deterministic)
        self.muon = {name for name, param in self.table.items() if optim.uses_muon(name, param, recipe.optim)}
        self.m = {name: mx.zeros(param.shape) for name, param in self.table.items()}
        self.v = {name: mx.zeros(param.shape) for name, param in self.table.items() if name not in self.muon}
        self.t = 0
        parameters.check(adapter_params.shapes(recipe), params)
        base, self.note = quantize_base.prepare(recipe, params, self.device == mx.Device(mx.cpu))
        for name, each in base.items():
            path, _, kind = name.rpartition(".")
            if isinstance(each, Quantized):
                quant.place(self.model, path, each)
            else:
                setattr(self.model.at(path), kind, mx.array(each))
        adapters.adapt(self.model, self.adapted, params)
        self.model.freeze()
        for name in self.table:
            path, _, kind = name.rpartition(".")
            self.model.at(path).unfreeze(recurse=False, keys=kind)
        self._settle()
        self._loss_and_grad = nn.value_and_grad(self.model, self._objective)
        self.compiled = recipe.train.compile != "off"
        state = [self.model.state, self.m, self.v]
        compiled = partial(mx.compile, inputs=state) if self.compiled else lambda function, **_: function
        self._run_step = compiled(self._step, outputs=state)
        self._run_gradients = compiled(self._gradients, outputs=state)
        self._run_update = compiled(self._update, outputs=state)
        self._run_evaluate = compiled(self._evaluate)

    def _put(self, params: dict[str, np.ndarray]) -> None:
        parameters.check({name: param.shape for name, param in self.table.items()}, params)
        self.model.update(tree_unflatten([(name, mx.array(params[name])) for name in self.table]))
        self._settle()

    def _weights(self) -> dict[str, Array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def _settle(self, *more: Array) -> None:
        """Computes what is pending: MLX is lazy."""
        mx.eval(self.model.parameters(), self.m, self.v, *more)

    def _arrays(self, batch: Batch) -> losses.Arrays:
        tokens, targets, weights = (mx.array(field) for field in (batch.tokens, batch.targets, batch.weights))
        extra = (None if field is None else mx.array(field) for field in (batch.positions, batch.segments))
        return losses.Arrays(tokens, targets, weights, *extra)

    def _keys(self, step: int) -> Array:
        """A 32-bit key a site of dropout or noise of this step, in the order of _drop; 0 where nothing is drawn."""
        recipe, layers = self.recipe, range(self.recipe.model.n_layer)
        sites: list[tuple[object, ...]] = [("dropout", step, "embedding")]
        sites += [("dropout", step, layer, site) for layer in layers for site in range(SITES)]
        sites += [("neftune", step), *(("adapter-dropout", step, path) for path in self.adapted)]
        rates = {"dropout": recipe.train.dropout, "neftune": self.neftune, "adapter-dropout": self.adapter_dropout}
        keys = [rng.key32(recipe.train.seed, *site) if rates[str(site[0])] else 0 for site in sites]
        return mx.array(np.array(keys, dtype=np.uint32))

    def _drop(self, keys: Array, first_row: Array) -> Dropout | None:
        """What is random in a step."""
        rate = self.recipe.train.dropout
        if not (rate or self.neftune or self.adapter_dropout):
            return None
        sites = 1 + SITES * self.recipe.model.n_layer
        adapter = (self.adapter_dropout, keys[sites + 1 :])
        return Dropout(rate, keys[:sites], first_row, self.neftune, keys[sites], *adapter)

    def _objective(self, batch: losses.Arrays, keys: Array, first_row: Array) -> tuple[Array, Array]:
        """The weighted sum that is differentiated, and its terms (B, T), which the host adds in float64."""
        terms = self.objective(self.model, batch, self.recipe.train, self._drop(keys, first_row)) * batch.weights
        return terms.sum(), terms

    def _gradients(
        self, batch: losses.Arrays, keys: Array, first_row: Array, total: dict[str, Array] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Row losses of a micro-batch, and its gradients added to ``total``."""
        (_, terms), grads = self._loss_and_grad(batch, keys, first_row)
        flat = dict(tree_flatten(grads))
        return terms, flat if total is None else {name: g + total[name] for name, g in flat.items()}

    def _update(self, terms: Array, grads: dict[str, Array], scalars: Array) -> tuple[Array, Array]:
        """Clips and updates in place unless something is not finite; returns the norm and each tensor's squared norm.

        ``scalars`` holds 1 / weight, then what optim.scalars lists.
        """
        config = self.recipe.optim
        grads = {name: grads[name] * scalars[0] for name in self.table}
        squares = mx.stack([mx.square(g).sum(axis=-1).sum() for g in grads.values()])
        norm = mx.sqrt(squares.sum())
        finite = mx.isfinite(norm) & mx.isfinite(terms.sum())
        clip = mx.minimum(config.clip / (norm + 1e-6), 1.0) if config.clip else 1.0
        new = {}
        for name, p in self._weights().items():
            g, m = grads[name] * clip, self.m[name]
            if name in self.muon:
                p_new, m_new = optim.muon(p, g, m, scalars[1:], config)
            else:
                v = self.v[name]
                p_new, m_new, v_new = optim.adamw(p, g, m, v, scalars[1:], self.table[name], config)
                self.v[name] = mx.where(finite, v_new, v)
            self.m[name] = mx.where(finite, m_new, m)
            new[name] = mx.where(finite, p_new, p)
        self.model.update(tree_unflatten(list(new.items())))
        return norm, squares

    def _step(self, batch: losses.Arrays, keys: Array, first_row: Array, scalars: Array) -> tuple[Array, Array, Array]:
        terms, grads = self._gradients(batch, keys, first_row)
        return terms, *self._update(terms, grads, scalars)

    def _evaluate(self, batch: losses.Arrays) -> list[Array]:
        """The plain loss's terms, and of a classifier its answers (B, T)."""
        if not self.recipe.model.labels:
            return [losses.lm(self.model, batch, self.recipe.train, plain=True) * batch.weights]
        logits = losses.scores(self.model, batch, self.recipe.train)
        return [losses.cross_entropy(logits, batch.targets) * batch.weights, logits.argmax(-1)]

    def train_step(self, step: int, micro_batches: list[Batch], lr: float) -> StepStats:
        """One update from the micro-batches of a global batch, skipped if its loss or gradient is not finite."""
        keys = self._keys(step)
        weight = sum(batch.weight for batch in micro_batches)
        scalars = mx.array([1 / weight, *optim.scalars(self.recipe.optim, lr, self.t + 1)], mx.float32)
        firsts = [mx.array(batch.first_row, mx.uint32) for batch in micro_batches]
        if len(micro_batches) == 1:
            terms, norm, squares = self._run_step(self._arrays(micro_batches[0]), keys, firsts[0], scalars)
        else:
            parts, total = [], None
            for batch, first_row in zip(micro_batches, firsts, strict=True):
                part, total = self._run_gradients(self._arrays(batch), keys, first_row, total)
                mx.eval(part, total)
                parts.append(part)
            assert total is not None
            terms = mx.concatenate(parts)
            norm, squares = self._run_update(terms, total, scalars)
        self._settle(terms, norm, squares)
        loss_sum, grad_norm = float(np.array(terms).sum(dtype=np.float64)), float(np.array(norm))
        finite = bool(np.isfinite(grad_norm) and np.isfinite(loss_sum))
        devices.trim(self.device, self.recipe.train)
        self.t += finite
        zeros = tuple(name for name, square in zip(self.table, np.array(squares), strict=True) if square == 0)
        return StepStats(loss_sum, weight, grad_norm, finite, zero_grads=zeros)

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Float64 sums of the plain loss: ``loss`` and ``weight``; a classifier's with its confusions."""
        self.model.eval()  # attention that needs no gradient
        terms, *answers = (np.array(each) for each in self._run_evaluate(self._arrays(batch)))
        self.model.train()
        sums = {"loss": float(terms.sum(dtype=np.float64)), "weight": batch.weight}
        return sums | (confusion.count(batch, answers[0]) if answers else {})

    def snapshot(self) -> State:
        """Host copies of weights, moments and the count of updates; the caller owns them."""

        def copy(group: dict[str, Array]) -> dict[str, np.ndarray]:
            return {name: np.array(group[name]) for name in self.table if name in group}

        return State(params=copy(self._weights()), m=copy(self.m), v=copy(self.v), t=self.t)

    def load_state(self, state: State) -> None:
        """Takes a snapshot back.

        Raises:
            UserError: a tensor is missing, unknown, or of another shape or dtype.
        """
        shapes = {name: param.shape for name, param in self.table.items()}
        moments = ((self.m, state["m"], "m"), (self.v, state["v"], "v"))
        for own, given, key in moments:
            parameters.check({name: shapes[name] for name in own}, given, f"optimizer state {key}")
        self._put(state["params"])
        for own, given, _ in moments:
            for name in own:
                own[name] = mx.array(given[name])
        self.t = state["t"]
        self._settle()

    def memory(self) -> dict[str, int]:
        """Bytes: ``active`` and ``peak``."""
        return devices.memory()

    def describe(self) -> dict[str, str]:
        """The parts of the environment key that the framework knows."""
        return {**devices.describe(self.device), "compiled": str(self.compiled)}
