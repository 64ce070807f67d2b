"""Candidates: a configuration and weights by our names for each combination of options, and how far each is off.

A candidate is a tuple with the number of an option for each choice. What it gives is looked at through a ``View``: the
logits, or a hidden state of a model cut off after some blocks, of all tokens or of the first few.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from convert.adopt import apply
from convert.adopt.evidence import Sample
from convert.adopt.rules import Map, Proposal, chosen
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params

Candidate = tuple[int, ...]
Weights = Mapping[str, np.ndarray]
Gather = Callable[[Map], Weights]
Forward = Callable[[ModelConfig, Weights, np.ndarray, bool], tuple[np.ndarray, list[np.ndarray]]]
"""(config, weights, ids (B, T), whether hidden states are wanted) -> logits (B, T, V), hidden states (B, T, C)."""

_DEFAULTS = {each.name: each.default for each in dataclasses.fields(ModelConfig)}
_SCALING = ("rope_scaling", "rope_factor", "rope_low", "rope_high", "rope_original")
# a field -> the kinds of positions that read it
_READERS: dict[str, tuple[str, ...]] = dict.fromkeys(
    (*_SCALING, "rope_local_theta", "rotary_dim", "no_rope"), ("rope",)
)
_READERS |= {"rope_theta": ("rope", "sinusoidal"), "sinusoid": ("sinusoidal",)}
_READERS |= {"position_multiplier": ("sinusoidal", "learned")}
_LONG_TABLES = ("none", "linear", "llama3")  # scalings that do not look at block_size
_KEPT = 4  # sets of weights that are kept


class View(NamedTuple):
    """Where candidates are compared: ``place`` is a hidden state, -1 the logits; 0 blocks or tokens are all."""

    name: str
    place: int = -1
    blocks: int = 0
    tokens: int = 0


class Score(NamedTuple):
    """How far a candidate is off: ``rms`` relative to the sample's, ``worst`` of the largest number of the sample."""

    rms: float
    worst: float


NONE = Score(float("inf"), float("inf"))


@dataclass(frozen=True)
class Limit:
    """When to stop; whichever comes first."""

    runs: int = 6000
    seconds: float = 180.0


def config_of(model: Mapping[str, Any]) -> ModelConfig:
    """The model that a map's fields describe, its matrices not fused.

    Raises:
        UserError: they contradict each other, or name no field.
    """
    return apply.config_of({"family": "mlxgpt"} | live(model))


def live(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a map without those that another kind of positions reads, which ModelConfig refuses."""
    position = model.get("position", "learned")
    idle = {name for name, kinds in _READERS.items() if position not in kinds}
    return {name: value for name, value in model.items() if name not in idle}


def plain(config: ModelConfig) -> ModelConfig:
    """``config`` with what does nothing in it as it is by default: equal models have equal ones."""
    changed: dict[str, Any] = {name: _DEFAULTS[name] for name in _READERS if config.position not in _READERS[name]}
    if config.rope_local_theta and (not config.window or config.rope_local_theta == config.rope_theta):
        changed["rope_local_theta"] = 0.0
    if abs(config.attn_scale - config.head_dim**-0.5) < 1e-12:
        changed["attn_scale"] = 0.0
    return dataclasses.replace(config, **changed)


def cut(config: ModelConfig, blocks: int) -> ModelConfig:
    """The same model of the first blocks alone."""
    if not blocks or blocks >= config.n_layer:
        return config
    layers = {name: tuple(n for n in getattr(config, name) if n < blocks) for name in ("window_layers", "no_rope")}
    window = config.window if layers["window_layers"] else 0
    return dataclasses.replace(config, n_layer=blocks, window=window, **layers)


class Bench:
    """Makes candidates, runs them, and remembers how far each was off."""

    def __init__(self, proposal: Proposal, gather: Gather, sample: Sample, forward: Forward, limit: Limit):
        self.choices, self._map, self.sample, self.limit = proposal.choices, proposal.map, sample, limit
        self._forward, self._start = forward, time.perf_counter()
        self._gathered = functools.lru_cache(_KEPT)(functools.partial(_gathered, gather))
        self._seen: dict[tuple[Any, ...], Score] = {}
        self._tried: set[tuple[Any, ...]] = set()
        self.runs = 0

    @property
    def candidates(self) -> int:
        """How many different models were tried."""
        return len(self._tried)

    @property
    def seconds(self) -> float:
        """Since the search began."""
        return time.perf_counter() - self._start

    @property
    def over(self) -> bool:
        """Whether the limit is reached."""
        return self.runs >= self.limit.runs or self.seconds > self.limit.seconds

    def labels(self, candidate: Candidate) -> tuple[str, ...]:
        """What its options are called."""
        return tuple(choice.options[n].label for choice, n in zip(self.choices, candidate, strict=True))

    def map(self, candidate: Candidate) -> Map:
        """The map with the candidate's options."""
        options = tuple(choice.options[n] for choice, n in zip(self.choices, candidate, strict=True))
        found = chosen(self._map, options)
        return dataclasses.replace(found, model=live(found.model))

    def made(self, candidate: Candidate) -> tuple[ModelConfig, Map] | None:
        """Its configuration, without what does nothing, and its map; None if its options contradict each other."""
        found = self.map(candidate)
        try:
            config = plain(config_of(found.model))
        except UserError:
            return None
        return config, dataclasses.replace(found, rope=found.rope if config.position == "rope" else "halves")

    def key(self, candidate: Candidate) -> tuple[Any, ...] | None:
        """Equal for candidates that are one model."""
        made = self.made(candidate)
        return made and (made[0], made[1].rules, made[1].rope)

    def weights(self, config: ModelConfig, found: Map) -> Weights | None:
        """Its weights; None if they are not those of the configuration."""
        try:
            weights = self._gathered(_Laid(found, config))
        except UserError:
            return None
        shapes = {name: param.shape for name, param in params.table(config).items()}
        fits = shapes.keys() == weights.keys() and all(weights[name].shape == each for name, each in shapes.items())
        return weights if fits else None

    def output(self, candidate: Candidate, view: View, noise: float = 0.0) -> np.ndarray | None:
        """What the sample has there, of the candidate; ``noise``: each weight is first changed by as much of itself."""
        made = self.made(candidate)
        weights = made and self.weights(*made)
        if not made or weights is None:
            return None
        config, ids = cut(made[0], view.blocks), self.sample.ids[:, : view.tokens or None]
        if config.position != "learned" and config.rope_scaling in _LONG_TABLES:
            config = dataclasses.replace(config, block_size=ids.shape[1])
        weights = {name: weights[name] for name in params.table(config)}
        if noise:
            drawn = np.random.default_rng(0)
            weights = {name: each * _near_one(drawn, each.shape, noise) for name, each in weights.items()}
        self.runs += 1
        with np.errstate(all="ignore"):
            logits, hidden = self._forward(config, weights, ids, view.place >= 0)
        return self.sample.comparable(logits) if view.place < 0 else hidden[view.place]

    def target(self, view: View) -> np.ndarray:
        """What the sample has there."""
        whole = self.sample.logits if view.place < 0 or not self.sample.hidden else self.sample.hidden[view.place]
        return whole[:, : view.tokens] if view.tokens else whole

    def score(self, candidate: Candidate, view: View) -> Score:
        """How far the candidate is off there."""
        key = self.key(candidate)
        if key is None:
            return NONE
        if (*key, view) not in self._seen:
            self.look(candidate, view)
        return self._seen[*key, view]

    def look(self, candidate: Candidate, view: View) -> np.ndarray | None:
        """``output``, of which the distance is remembered."""
        key, output = self.key(candidate), self.output(candidate, view)
        if key is not None:
            self._tried.add(key)
            self._seen[*key, view] = NONE if output is None else distance(output, self.target(view))
        return output


def _near_one(drawn: np.random.Generator, shape: tuple[int, ...], noise: float) -> np.ndarray:
    return (1 + noise * drawn.choice((-1.0, 1.0), shape)).astype(np.float32)


def distance(output: np.ndarray, target: np.ndarray) -> Score:
    """How far numbers are from the sample's; NaN is infinitely far."""
    with np.errstate(all="ignore"):
        difference = output.astype(np.float64) - target
        rms = float(np.sqrt(np.mean(difference**2) / max(np.mean(target.astype(np.float64) ** 2), 1e-60)))
        worst = float(np.abs(difference).max() / max(np.abs(target).max(), 1e-30))
    return Score(rms, worst) if np.isfinite(rms) and np.isfinite(worst) else NONE


class _Laid:
    """A map as far as it says how tensors lie: what its weights depend on."""

    def __init__(self, found: Map, config: ModelConfig):
        self.map = found
        by_head = found.rope != "halves" or any(set("hdg") & set(rule.axes) for rule in found.rules)
        heads = (config.n_head, config.n_kv_head, config.head_dim, config.rotary_dim) if by_head else ()
        self._key = (found.rules, found.rope, heads, tuple(params.table(config)))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Laid) and self._key == other._key


def _gathered(gather: Gather, laid: _Laid) -> Weights:
    return {name: np.asarray(array, np.float32) for name, array in gather(laid.map).items()}
