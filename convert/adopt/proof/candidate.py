"""Candidates: a configuration and weights by our names for each combination of options, and how far each is off.

A candidate is a tuple with the number of an option for each choice. What it gives is looked at through a ``View``: the
logits, or a hidden state of a model cut off after some blocks, of all tokens or of the first few.
"""

import dataclasses
import functools
import itertools
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
_LAST = {"logit_scale", "final_softcap"}
_FEW = 400_000  # logits that are scaled and capped in all ways at once
_LONG_TABLES = ("none", "linear", "llama3")  # scalings that do not look at block_size


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
        self._gather = gather
        self._made: dict[Candidate, tuple[ModelConfig, Map] | None] = {}
        self._seen: dict[tuple[Any, ...], Score] = {}
        self._tried: set[tuple[Any, ...]] = set()
        self._finishes: dict[tuple[Candidate, View], Candidate] = {}
        self.runs = 0
        self.refused = ""  # why a candidate did not run, the first time

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
        if candidate not in self._made:
            found = self.map(candidate)
            try:
                config = plain(config_of(found.model))
                rope = found.rope if config.position == "rope" else "halves"
                self._made[candidate] = config, dataclasses.replace(found, rope=rope)
            except UserError:
                self._made[candidate] = None
        return self._made[candidate]

    def key(self, candidate: Candidate) -> tuple[Any, ...] | None:
        """Equal for candidates that are one model."""
        made = self.made(candidate)
        return made and (made[0], made[1].rules, made[1].rope)

    def weights(self, config: ModelConfig, found: Map) -> Weights | None:
        """Its weights; None if they are not those of the configuration."""
        shapes = {name: param.shape for name, param in table_of(config).items()}
        try:
            weights = self._gather(found)
        except UserError as error:
            self.refused = self.refused or str(error)
            return None
        wrong = [name for name in shapes if name not in weights or weights[name].shape != shapes[name]]
        wrong += [name for name in weights if name not in shapes]
        if wrong:
            self.refused = self.refused or f"{wrong[0]}: no tensor of theirs gives it as this model has it"
        return None if wrong else weights

    def output(self, candidate: Candidate, view: View, noise: float = 0.0) -> np.ndarray | None:
        """What the sample has there, of the candidate; ``noise``: each weight is first changed by as much of itself."""
        made = self.made(candidate)
        raw = made and self._run(made[0], made[1], view, noise)
        if not made or raw is None:
            return None
        return raw if view.place >= 0 else self.sample.comparable(finish(raw, made[0]))

    def _run(self, config: ModelConfig, found: Map, view: View, noise: float) -> np.ndarray | None:
        """A hidden state, or logits before their scale and cap."""
        weights = self.weights(config, found)
        if weights is None:
            return None
        config, ids = cut(config, view.blocks), self.sample.ids[:, : view.tokens or None]
        if config.position != "learned" and config.rope_scaling in _LONG_TABLES:
            config = dataclasses.replace(config, block_size=ids.shape[1])
        weights = {name: weights[name] for name in table_of(config)}
        if noise:
            drawn = np.random.default_rng(0)
            weights = {name: each * _near_one(drawn, each.shape, noise) for name, each in weights.items()}
        self.runs += 1
        with np.errstate(all="ignore"):
            logits, hidden = self._forward(raw_head(config), weights, ids, view.place >= 0)
        return logits if view.place < 0 else hidden[view.place]

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
        """``output``, of which the distance is remembered; and of logits the best scale and cap."""
        made = self.made(candidate)
        if not made:
            return None
        raw = self._run(made[0], made[1], view, 0.0)
        output = raw if raw is None or view.place >= 0 else self.sample.comparable(finish(raw, made[0]))
        self._note(candidate, view, output)
        if raw is not None and view.place < 0 and raw.size <= _FEW:
            self._finish_best(candidate, made[0], raw, view)
        return output

    def _finish_best(self, candidate: Candidate, config: ModelConfig, raw: np.ndarray, view: View) -> None:
        """Remembers which scale and cap of the logits bring a candidate nearest: that takes no run."""
        target, found = self.target(view), dict[Candidate, float]()
        last = [n for n in range(len(self.choices)) if self.is_last(n)]
        for options in itertools.product(*(range(len(self.choices[n].options)) for n in last)):
            other, fields = list(candidate), dict[str, float]()
            for n, option in zip(last, options, strict=True):
                other[n] = option
                fields |= dict(self.choices[n].options[option].model)
            scale = fields.get("logit_scale", config.logit_scale)
            cap = fields.get("final_softcap", config.final_softcap)
            found[tuple(other)] = distance(self.sample.comparable(_finished(raw, scale, cap)), target).rms
        best = min(found, key=lambda each: found[each], default=candidate)
        made = self.made(best)
        if made and best != candidate:
            self._note(best, view, self.sample.comparable(finish(raw, made[0])))
            self._finishes[candidate, view] = best

    def finished(self, candidate: Candidate, view: View) -> Candidate:
        """The candidate with the scale and cap of logits that bring it nearest, as far as that is known."""
        return self._finishes.get((candidate, view), candidate)

    def _note(self, candidate: Candidate, view: View, output: np.ndarray | None) -> None:
        key = self.key(candidate)
        assert key is not None
        self._tried.add(key)
        self._seen[*key, view] = NONE if output is None else distance(output, self.target(view))

    def is_last(self, n: int) -> bool:
        """Whether a choice is of what is done to the logits last."""
        options = self.choices[n].options
        return all(option.model.keys() <= _LAST and not option.rules and not option.rope for option in options)


def raw_head(config: ModelConfig) -> ModelConfig:
    """The same model without scale and cap of its logits."""
    if not config.logit_scale and not config.final_softcap:
        return config
    return dataclasses.replace(config, logit_scale=0.0, final_softcap=0.0)


def finish(logits: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Scale and cap of logits, as layers.finish does it."""
    return _finished(logits, config.logit_scale, config.final_softcap)


def _finished(logits: np.ndarray, scale: float, cap: float) -> np.ndarray:
    if scale:
        logits = logits * np.float32(scale)
    return np.float32(cap) * np.tanh(logits / np.float32(cap)) if cap else logits


@functools.lru_cache(64)
def table_of(config: ModelConfig) -> Mapping[str, params.Param]:
    """params.table, which candidates ask for again and again."""
    return params.table(config)


def _near_one(drawn: np.random.Generator, shape: tuple[int, ...], noise: float) -> np.ndarray:
    return (1 + noise * drawn.choice((-1.0, 1.0), shape)).astype(np.float32)


def distance(output: np.ndarray, target: np.ndarray) -> Score:
    """How far numbers are from the sample's; NaN, and those of another vocabulary, are infinitely far."""
    if output.shape != target.shape:
        return NONE
    with np.errstate(all="ignore"):
        difference = output.astype(np.float64) - target
        rms = float(np.sqrt(np.mean(difference**2) / max(np.mean(target.astype(np.float64) ** 2), 1e-60)))
        worst = float(np.abs(difference).max() / max(np.abs(target).max(), 1e-30))
    return Score(rms, worst) if np.isfinite(rms) and np.isfinite(worst) else NONE
