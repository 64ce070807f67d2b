"""MLX's half of training: gradients and updates of one global batch, and the state that a checkpoint holds."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import adapters, losses, optim, policy, preference, quant
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
from mlxgpt.stacks import Stacks


class Engine:
    """See common/batch.py, Engine. Masters and moments are float32; the blocks compute in train.compute_dtype.

    Args:
        recipe: model (with vocab_size), optim and train are read; in fine-tuning also tune and adapter.
        params: float32 arrays by the names of params.table, or quantized matrices, and those of the adapter
            (common/model/adapters.py). What adapters.trainable does not name is frozen: no gradient, no moments.
        device: ``auto``, ``cpu`` or ``gpu``.

        objective: (model, losses.Arrays) -> losses (B, T), in place of the recipe's, in validation too.

    Raises:
        UserError: a parameter is missing, unknown or of another shape.
    """

    def __init__(
        self,
        recipe: Recipe,
        params: Mapping[str, np.ndarray | Quantized],
        device: str = "auto",
        objective: Callable[..., Array] | None = None,
    ):
        self.device = devices.use(device)
        self.unused_limits = devices.limit(self.device, recipe.train)
        self.recipe = recipe
        self.table = adapter_params.trainable(recipe)
        self.adapted = adapter_params.targets(recipe.model, recipe.adapter) if recipe.adapter else {}
        self.adapter_dropout = recipe.adapter.dropout if recipe.adapter else 0.0
        self.own = losses.own(objective) if objective else None
        self.objective = self.own or (losses.classify if recipe.model.labels else losses.lm)
        self.aligned = policy.objective(recipe) or preference.objective(recipe)
        self.temperature = recipe.rl.temperature if recipe.rl else 1.0
        self.neftune = recipe.tune.neftune if recipe.tune else 0.0
        train = recipe.train
        self.model = Model(recipe.model, getattr(mx, train.compute_dtype), train.deterministic, seed=None)
        self.model.checks = False  # a source's tokens are known
        self.muon = {name for name, param in self.table.items() if optim.uses_muon(name, param, recipe.optim)}
        self.stacks = Stacks(self.table, self.muon, self.device)
        self.m = self.stacks.join({name: mx.zeros(param.shape) for name, param in self.table.items()})
        self.v = {name: mx.zeros(m.shape) for name, m in self.m.items() if name not in self.muon}
        self.p: dict[str, Array] = {}  # weights where they are stacked, of which the model has views
        self.t = 0
        parameters.check(adapter_params.shapes(recipe), params)
        base, self.note = quantize_base.prepare(recipe, params, devices.room(self.device))
        self._base = quantize_base.environment(base, self.note)
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
        self.p |= self.stacks.join(self._weights()) if self.stacks.together else {}
        self._settle()
        self._loss_and_grad = nn.value_and_grad(self.model, self._objective)
        self.compiled = recipe.train.compile != "off"
        state = [self.p or self.model.state, self.m, self.v]
        compiled = partial(mx.compile, inputs=state) if self.compiled else lambda function, **_: function
        self._run_step = compiled(self._step, outputs=state)
        self._run_gradients = compiled(self._gradients, outputs=state)
        self._run_update = compiled(self._update, outputs=state)
        self._run_evaluate = compiled(self._evaluate)
        self._run_token_losses = compiled(self._token_losses)
        self._run_logps = compiled(self._logps)

    def _put(self, params: dict[str, np.ndarray]) -> None:
        parameters.check({name: param.shape for name, param in self.table.items()}, params)
        self._show({name: mx.array(params[name]) for name in self.table})
        self.p |= self.stacks.join(self._weights()) if self.p else {}
        self._settle()

    def _weights(self) -> dict[str, Array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def _show(self, weights: dict[str, Array] | None = None) -> None:
        """Gives the model weights by name, or views of those that are stacked."""
        self.model.update(tree_unflatten(list((weights or self.stacks.split(self.p)).items())))

    def _settle(self, *more: Array) -> None:
        """Computes what is pending: MLX is lazy."""
        self._show()
        mx.eval(self.model.parameters(), self.p, self.m, self.v, *more)

    def _arrays(self, batch: Batch) -> losses.Arrays:
        tokens, targets, weights = (mx.array(field) for field in (batch.tokens, batch.targets, batch.weights))
        extra = (None if field is None else mx.array(field) for field in (batch.positions, batch.segments))
        return losses.Arrays(
            tokens, targets, weights, *extra, beside={name: mx.array(a) for name, a in batch.beside.items()}
        )

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

    def _objective(self, batch: losses.Arrays, keys: Array, first_row: Array) -> tuple[Array, Array, preference.Sums]:
        """The weighted sum that is differentiated; its terms, which the host adds in float64, and more of them."""
        drop, sums = self._drop(keys, first_row), {}
        if self.aligned:
            terms, sums = self.aligned(self.model, batch, drop)
        else:
            terms = self.objective(self.model, batch, self.recipe.train, drop) * batch.weights
        return terms.sum(), terms, sums

    def _gradients(
        self, batch: losses.Arrays, keys: Array, first_row: Array, total: dict[str, Array] | None = None
    ) -> tuple[Array, preference.Sums, dict[str, Array]]:
        """Terms and sums of a micro-batch, and its gradients added to ``total``."""
        self._show()
        (_, terms, sums), grads = self._loss_and_grad(batch, keys, first_row)
        flat = dict(tree_flatten(grads))
        return terms, sums, flat if total is None else {name: g + total[name] for name, g in flat.items()}

    def _update(self, terms: Array, grads: dict[str, Array], scalars: Array) -> tuple[Array, Array]:
        """Clips and updates in place unless something is not finite; returns the norm and each tensor's squared norm.

        ``scalars`` holds 1 / weight, then what optim.scalars lists.
        """
        config, grads = self.recipe.optim, self.stacks.join({name: grads[name] for name in self.table})
        means = {name: g * scalars[0] for name, g in grads.items()}
        squares = mx.concatenate([self.stacks.squares(g) for g in means.values()])
        norm = mx.sqrt(squares.sum())
        finite = mx.isfinite(norm) & mx.isfinite(terms.sum())
        clip = mx.minimum(config.clip / (norm + 1e-6), 1.0) if config.clip else mx.array(1.0)
        rates, new = mx.where(finite, scalars[1:], mx.array(optim.NOTHING)), {}
        for name, p in (self.p or self._weights()).items():
            g, m = grads[name] * (scalars[0] * clip) if self.p else means[name] * clip, self.m[name]
            if name in self.muon:
                new[name], self.m[name] = optim.muon(p, g, m, rates, finite, config)
            else:
                param, v = self.table[name], self.v[name]
                new[name], self.m[name], self.v[name] = optim.adamw(p, g, m, v, rates, finite, param, config)
        if self.p:
            self.p |= new
        else:
            self._show(new)
        return norm, squares

    def _step(
        self, batch: losses.Arrays, keys: Array, first_row: Array, scalars: Array
    ) -> tuple[Array, preference.Sums, Array, Array]:
        terms, sums, grads = self._gradients(batch, keys, first_row)
        return terms, sums, *self._update(terms, grads, scalars)

    def _evaluate(self, batch: losses.Arrays) -> list[Any]:
        """The plain loss's terms, and of a classifier its answers (B, T); or the terms of someone's own objective."""
        self._show()
        if self.aligned:
            return [*self.aligned(self.model, batch)]
        if self.own:
            return [self.own(self.model, batch, self.recipe.train) * batch.weights]
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
            terms, sums, norm, squares = self._run_step(self._arrays(micro_batches[0]), keys, firsts[0], scalars)
            found = [sums]
        else:
            parts, found, total = [], [], None
            for batch, first_row in zip(micro_batches, firsts, strict=True):
                part, sums, total = self._run_gradients(self._arrays(batch), keys, first_row, total)
                mx.eval(part, sums, total)
                parts.append(part)
                found.append(sums)
            assert total is not None
            terms = mx.concatenate(parts)
            norm, squares = self._run_update(terms, total, scalars)
        self._settle(terms, norm, squares, *(array for sums in found for array in sums.values()))
        loss_sum, grad_norm = float(np.array(terms).sum(dtype=np.float64)), float(np.array(norm))
        finite = bool(np.isfinite(grad_norm) and np.isfinite(loss_sum))
        devices.trim(self.device, self.recipe.train)
        self.t += finite
        zeros = tuple(name for name, square in zip(self.stacks.names, np.array(squares), strict=True) if square == 0)
        return StepStats(loss_sum, weight, grad_norm, finite, _added(found), zeros)

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Float64 sums of the plain loss: ``loss`` and ``weight``; a classifier's with its confusions."""
        self.model.eval()  # nothing is dropped, attention needs no gradient
        terms, *more = self._run_evaluate(self._arrays(batch))
        self.model.train()
        self._show()
        sums = {"loss": float(np.array(terms).sum(dtype=np.float64)), "weight": batch.weight}
        if self.aligned:
            return sums | _added(more)
        return sums | (confusion.count(batch, np.array(more[0])) if more else {})

    def token_losses(self, batch: Batch) -> np.ndarray:
        """The plain next-token losses (B, T) float32, without dropout and unweighted; with rl.temperature, at it."""
        self.model.eval()
        made = np.array(self._run_token_losses(self._arrays(batch)))
        self.model.train()
        self._show()
        return made

    def logps(self, batch: Batch) -> np.ndarray:
        """Log-probabilities (B,) float32 of the rows' targets, each by its weight, added up as a training step does."""
        made = np.array(self._run_logps(self._arrays(batch)))
        self._show()
        return made

    def _logps(self, batch: losses.Arrays) -> Array:
        self._show()
        return preference.told(self.model, batch, self.recipe.train, None)[0]

    def _token_losses(self, batch: losses.Arrays) -> Array:
        self._show()
        return losses.lm(self.model, batch, self.recipe.train, plain=True, temperature=self.temperature)

    def snapshot(self) -> State:
        """Host copies of weights, moments and the count of updates; the caller owns them."""

        def copy(own: dict[str, Array]) -> dict[str, np.ndarray]:
            group = self.stacks.split(own)
            return {name: np.array(group[name]) for name in self.table if name in group}

        return State(params=copy(self.p or self._weights()), m=copy(self.m), v=copy(self.v), t=self.t)

    def load_state(self, state: State) -> None:
        """Takes a snapshot back.

        Raises:
            UserError: a tensor is missing, unknown, or of another shape or dtype.
        """
        shapes = {name: param.shape for name, param in self.table.items()}
        moments = ((self.m, state["m"], "m"), (self.v, state["v"], "v"))
        for own, given, key in moments:
            parameters.check({name: shapes[name] for name in self.stacks.split(own)}, given, f"optimizer state {key}")
        self._put(state["params"])
        for own, given, _ in moments:
            own |= self.stacks.join({name: mx.array(array) for name, array in given.items()})
        self.t = state["t"]
        self._settle()

    def memory(self) -> dict[str, int]:
        """Bytes: ``active`` and ``peak``."""
        return devices.memory()

    def describe(self) -> dict[str, str]:
        """The parts of the environment key that the framework knows."""
        return {**devices.describe(self.device), "compiled": str(self.compiled), **self._base}


def _added(found: list[preference.Sums]) -> dict[str, float]:
    """Sums of micro-batches in float64, by name."""
    return {name: sum(float(np.array(each[name]).sum(dtype=np.float64)) for each in found) for name in found[0]}
