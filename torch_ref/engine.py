"""PyTorch's half of training: gradients and updates of one global batch, and the state that a checkpoint holds."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import _foreach_norm  # type: ignore[reportPrivateImportUsage]

from mlxgpt.common import rng
from mlxgpt.common.batch import Batch, State, StepStats
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import RunError
from mlxgpt.common.model import adapters as adapter_params
from mlxgpt.common.model import params as parameters
from mlxgpt.common.model import quantize_base
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.scores import confusion
from torch_ref import adapters, fast, fused, losses, optim, policy, preference, quant, sampled, transfer
from torch_ref import device as devices
from torch_ref.layers import Array, Dropout
from torch_ref.model import Model
from torch_ref.noise import SITES


class Engine:
    """See common/batch.py, Engine. Masters and moments are float32; the blocks compute in train.compute_dtype.

    Args:
        recipe: model (with vocab_size), optim and train are read; in fine-tuning also tune and adapter.
        params: float32 arrays by the names of params.table, or quantized matrices, and those of the adapter
            (common/model/adapters.py). What adapters.trainable does not name is frozen: no gradient, no moments.
        device: ``auto``, ``cpu``, ``gpu``, ``mps``, ``cuda`` or ``cuda:N``.

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
        if recipe.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.recipe = recipe
        self.table = adapter_params.trainable(recipe)
        self.adapted = adapter_params.targets(recipe.model, recipe.adapter) if recipe.adapter else {}
        self.adapter_dropout = recipe.adapter.dropout if recipe.adapter else 0.0
        self.own = losses.own(objective) if objective else None
        self.objective = self.own or (losses.classify if recipe.model.labels else losses.lm)
        self.aligned = policy.objective(recipe) or preference.objective(recipe)
        self.temperature = recipe.rl.temperature if recipe.rl else 1.0
        self.neftune = recipe.tune.neftune if recipe.tune else 0.0
        self.model = Model(recipe.model, getattr(torch, recipe.train.compute_dtype), seed=None)
        self.model.checks = False  # a source's tokens are known
        self.model.requires_grad_(False)
        parameters.check(adapter_params.shapes(recipe), params)
        base, self.note = quantize_base.prepare(recipe, params, devices.room(self.device))
        self._base = quantize_base.environment(base, self.note)
        for name, each in base.items():
            path, _, kind = name.rpartition(".")
            if isinstance(each, Quantized):
                quant.place(self.model, path, each)
            else:
                getattr(self.model.at(path), kind).data = torch.from_numpy(each).to(copy=name in self.table)
        adapters.adapt(self.model, self.adapted, params)
        self.model.to(self.device)
        own = dict(self.model.named_parameters())
        self.weights = {name: own[name].requires_grad_() for name in self.table}
        self.muon = {name for name, param in self.table.items() if optim.uses_muon(name, param, recipe.optim)}
        self.m = {name: torch.zeros_like(self.weights[name]) for name in self.table}
        self.v = {name: torch.zeros_like(self.weights[name]) for name in self.table if name not in self.muon}
        self.t = 0
        kind = fast.kind(self.device)
        self.compiled = recipe.train.compile == "on" or (recipe.train.compile == "auto" and kind == "cuda")
        # elsewhere the bits of a curve stay those of one tensor at a time
        self.fused = kind == "cuda" or (self.compiled and kind == "cpu")
        compiled = torch.compile if self.compiled else lambda function: function
        self._run_objective = compiled(self._objective)
        self._run_evaluate = compiled(self._evaluate)
        self._run_token_losses = compiled(self._token_losses)
        self._run_logps = compiled(self._logps)

    @torch.no_grad()
    def _put(self, params: dict[str, np.ndarray]) -> None:
        parameters.check({name: param.shape for name, param in self.table.items()}, params)
        for name in self.table:
            self.weights[name].copy_(torch.from_numpy(params[name]))

    def _arrays(self, batch: Batch) -> losses.Arrays:
        fields = (batch.tokens, batch.targets, batch.weights, batch.positions, batch.segments)
        placed = transfer.put([*fields, *batch.beside.values()], self.device)
        return losses.Arrays(*placed[: len(fields)], beside=dict(zip(batch.beside, placed[len(fields) :], strict=True)))

    def _keys(self, step: int) -> Array:
        """A 32-bit key a site of dropout or noise of this step, in the order of _drop; 0 where nothing is drawn."""
        recipe, layers = self.recipe, range(self.recipe.model.n_layer)
        sites: list[tuple[object, ...]] = [("dropout", step, "embedding")]
        sites += [("dropout", step, layer, site) for layer in layers for site in range(SITES)]
        sites += [("neftune", step), *(("adapter-dropout", step, path) for path in self.adapted)]
        rates = {"dropout": recipe.train.dropout, "neftune": self.neftune, "adapter-dropout": self.adapter_dropout}
        keys = [rng.key32(recipe.train.seed, *site) if rates[str(site[0])] else 0 for site in sites]
        if not any(rates.values()):
            return torch.zeros(len(keys), dtype=torch.int32, device=self.device)
        return transfer.put([np.array(keys, dtype=np.uint32).view(np.int32)], self.device)[0]

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
        return terms.sum(), terms.detach(), sums

    def _gradients(self, batch: losses.Arrays, keys: Array, first_row: Array) -> tuple[Array, preference.Sums]:
        """Terms and sums of a micro-batch; its gradients are added to the tensors' own."""
        loss, terms, sums = self._run_objective(batch, keys, first_row)
        if not loss.requires_grad:
            raise RunError("objective: its losses come from no weight: the gradient would be zero; expected no detach")
        loss.backward()
        return terms, sums

    @torch.no_grad()
    def _update(self, terms: Array, weight: float, lr: float) -> tuple[float, float, list[float]]:
        """Clips and updates in place unless something is not finite.

        Returns all that the host reads of a step, in one copy: the sum of the terms, the norm, each tensor's squared.
        """
        config, scalars = self.recipe.optim, optim.scalars(self.recipe.optim, lr, self.t + 1)
        grads = {name: p.grad for name, p in self.weights.items() if p.grad is not None}
        squares = torch.stack(_foreach_norm([grads[name] for name in self.table])).square().mul((1 / weight) ** 2)
        fetched = transfer.fetch(torch.cat([terms.flatten(), squares]))
        if self.fused:
            shrink, skip = fused.verdict(terms, squares, weight, config.clip)
            for names in fused.groups(self.table, self.muon):
                each = [(self.weights[name], grads[name], self.m[name]) for name in names]
                if names[0] in self.muon:
                    fused.muon(each, shrink, skip, scalars, config)
                else:
                    each = [(*three, self.v[name]) for three, name in zip(each, names, strict=True)]
                    fused.adamw(each, lr, self.t + 1, shrink, skip, self.table[names[0]], config)
        host = fetched()
        loss_sum, found = float(host[: terms.numel()].sum(dtype=np.float64)), host[terms.numel() :].tolist()
        norm = sum(found) ** 0.5
        if not self.fused and np.isfinite(norm) and np.isfinite(loss_sum):
            clip = min(config.clip / (norm + 1e-6), 1.0) if config.clip else 1.0
            for name, p in self.weights.items():
                g, m = grads[name].mul_(1 / weight * clip), self.m[name]
                if name in self.muon:
                    optim.muon(p, g, m, scalars, config)
                else:
                    optim.adamw(p, g, m, self.v[name], scalars, self.table[name], config)
        self.model.zero_grad(set_to_none=True)
        return loss_sum, norm, found

    @torch.no_grad()
    def _evaluate(self, batch: losses.Arrays) -> list[Any]:
        """The plain loss's terms, and of a classifier its answers (B, T); or the terms of someone's own objective."""
        if self.aligned:
            return [*self.aligned(self.model, batch)]
        if self.own:
            return [self.own(self.model, batch, self.recipe.train) * batch.weights]
        if not self.recipe.model.labels:
            return [losses.lm(self.model, batch, self.recipe.train, plain=True) * batch.weights]
        logits = losses.scores(self.model, batch, self.recipe.train)
        return [losses.cross_entropy(logits, batch.targets) * batch.weights, logits.argmax(-1)]

    @sampled.watched
    def train_step(self, step: int, micro_batches: list[Batch], lr: float) -> StepStats:
        """One update from the micro-batches of a global batch, skipped if its loss or gradient is not finite."""
        keys = self._keys(step)
        weight = sum(batch.weight for batch in micro_batches)
        parts = []
        for batch in micro_batches:
            first_row = torch.full((), batch.first_row, dtype=torch.int32, device=self.device)
            parts.append(self._gradients(self._arrays(batch), keys, first_row))
        terms, found = torch.cat([part for part, _ in parts]), [sums for _, sums in parts]
        loss_sum, norm, squares = self._update(terms, weight, lr)
        finite = bool(np.isfinite(norm) and np.isfinite(loss_sum))
        devices.trim(self.device, self.recipe.train)
        self.t += finite
        zeros = tuple(name for name, square in zip(self.table, squares, strict=True) if square == 0)
        return StepStats(loss_sum, weight, norm, finite, _added(found), zeros)

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Float64 sums of the plain loss: ``loss`` and ``weight``; a classifier's with its confusions."""
        self.model.eval()  # nothing is dropped
        terms, *more = self._run_evaluate(self._arrays(batch))
        self.model.train()
        sums = {"loss": float(terms.cpu().numpy().sum(dtype=np.float64)), "weight": batch.weight}
        if self.aligned:
            return sums | _added(more)
        return sums | (confusion.count(batch, more[0].cpu().numpy()) if more else {})

    def token_losses(self, batch: Batch) -> np.ndarray:
        """The plain next-token losses (B, T) float32, without dropout and unweighted; with rl.temperature, at it."""
        self.model.eval()
        made = self._run_token_losses(self._arrays(batch)).cpu().numpy()
        self.model.train()
        return made

    def logps(self, batch: Batch) -> np.ndarray:
        """Log-probabilities (B,) float32 of the rows' targets, each by its weight, added up as a training step does."""
        return self._run_logps(self._arrays(batch)).cpu().numpy()

    @torch.no_grad()
    def _logps(self, batch: losses.Arrays) -> Array:
        return preference.told(self.model, batch, self.recipe.train, None)[0]

    @torch.no_grad()
    def _token_losses(self, batch: losses.Arrays) -> Array:
        return losses.lm(self.model, batch, self.recipe.train, plain=True, temperature=self.temperature)

    def snapshot(self) -> State:
        """Host copies of weights, moments and the count of updates; the caller owns them."""

        def copy(group: Mapping[str, Array]) -> dict[str, np.ndarray]:
            return {name: group[name].detach().cpu().numpy().copy() for name in self.table if name in group}

        return State(params=copy(self.weights), m=copy(self.m), v=copy(self.v), t=self.t)

    @torch.no_grad()
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
                own[name].copy_(torch.from_numpy(given[name]))
        self.t = state["t"]

    def memory(self) -> dict[str, int]:
        """Bytes: ``active`` and ``peak``."""
        return devices.memory(self.device)

    def describe(self) -> dict[str, str]:
        """The parts of the environment key that the framework knows."""
        return {**devices.describe(self.device), "compiled": str(self.compiled), **self._base}


def _added(found: list[preference.Sums]) -> dict[str, float]:
    """Sums of micro-batches in float64, by name."""
    return {name: sum(float(each[name].cpu().numpy().sum(dtype=np.float64)) for each in found) for name in found[0]}
