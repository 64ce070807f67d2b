"""One model from its first block to its head: each matrix is rounded by what those before it, rounded, give it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from convert.quantize import awq
from convert.quantize.hessians import Hessians
from convert.quantize.source import Source
from convert.quantize.spool import Spool
from convert.quantize.windows import Windows
from convert.quantize.work import Inputs, Method, Scheme
from mlxgpt.common.inference import calibration
from mlxgpt.common.inference.calibration import Compared, Stream
from mlxgpt.common.model.affine import Quantized

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Course:
    """What one quantization works with.

    Args:
        source: the model.
        walk: a backend's calibrate.Walk.
        schemes: of the matrices to quantize, by module.
        method: None rounds to nearest, which needs no inputs.
        spool: where the results go; those of rounding to nearest are made again while they are written.
        hessians: where inputs are kept, or come from.
        say: is told of each place before its turn.
    """

    source: Source
    walk: Any
    schemes: Mapping[str, Scheme]
    method: Method | None
    spool: Spool
    hessians: Hessians | None
    say: Callable[[str], None]

    def run(self, windows: Windows | None) -> Compared | None:
        """Quantizes everything; with ``windows`` also measures, on those that are held out."""
        config, source, walk = self.source.config, self.source, self.walk
        held = None if windows is None else windows.evaluation
        tokens = windows.calibration[:, :-1] if windows is not None and self._gathers() else None
        start = source.take(calibration.start_names(config))
        head = self._head_of(start, tokens) if config.tied and self._rounds("wte") else None
        table = self._rounded(start, {"wte": head} if head else {}, ("wte", "wpe"))
        x = None if tokens is None else walk.start(table, tokens)
        before, after = (None if held is None else walk.start(each, held[:, :-1]) for each in (start, table))
        for n in range(config.n_layer):
            self.say(f"block {n + 1} of {config.n_layer}")
            plain = source.take(calibration.block_names(config, n))
            made = self._block(n, plain, x)
            x = None if x is None else walk.block(n, made, x)[0]
            before = None if before is None else walk.block(n, plain, before)[0]
            after = None if after is None else walk.block(n, made, after)[0]
        self.say("the head")
        names = [name for name in calibration.head_names(config) if name not in start]
        plain = source.take(names)
        inputs = self._head_inputs(plain, x) if self._rounds("lm_head") else {}
        made = self._rounded(*self._scaled(plain, inputs), ("lm_head",))
        if held is None or before is None or after is None:
            return None
        return walk.compare(Stream(start | plain, before), Stream(table | made, after), held[:, 1:])

    def _rounds(self, module: str) -> bool:
        """Whether the method rounds a module by its inputs."""
        return self.method is not None and module in self.schemes

    def _gathers(self) -> bool:
        """Whether inputs are gathered: none are saved yet."""
        return self.method is not None and not (self.hessians and self.hessians.complete)

    def _inputs(self, place: str, gather: Callable[[], Inputs]) -> Inputs:
        """Saved ones, or those that are gathered now, and saved."""
        if self.hessians and self.hessians.complete:
            return self.hessians.load(place)
        found = gather()
        if self.hessians:
            self.hessians.save(place, found)
        return found

    def _head_of(self, start: Weights, tokens: np.ndarray | None) -> Inputs:
        """What the head of the model as it was is given: a tied table is rounded first, by what it does last."""

        def gather() -> Inputs:
            assert tokens is not None
            self.say("what the head is given")
            x = self.walk.start(start, tokens)
            for n in range(self.source.config.n_layer):
                x = self.walk.block(n, self.source.take(calibration.block_names(self.source.config, n)), x)[0]
            norm = [name for name in calibration.head_names(self.source.config) if name.startswith("ln_f.")]
            return self.walk.head_inputs(self.source.take(norm), x)

        return self._inputs("head", gather)

    def _head_inputs(self, weights: Weights, x: np.ndarray | None) -> dict[str, Inputs]:
        def gather() -> Inputs:
            assert x is not None
            return self.walk.head_inputs(weights, x)

        return {"lm_head": self._inputs("head", gather)}

    def _block(self, n: int, weights: Weights, x: np.ndarray | None) -> Weights:
        """The parameters of block ``n`` rounded, each by what the block gives it once those before are."""
        ready: dict[str, Inputs] = {}
        if self._scales():
            weights, ready = self._scaled(weights, self._all_given(n, weights, x))
        made = dict(weights)
        for site, group in calibration.sites(self.source.config).items():
            modules = [f"h.{n}.{name}" for name in group if f"h.{n}.{name}" in self.schemes]
            inputs = {name: ready[name] for name in modules if name in ready}
            if self.method and modules and not inputs:
                gather = partial(self._given, n, made, x, site)
                inputs = dict.fromkeys(modules, self._inputs(f"h.{n}.{site}", gather))
            made |= self._rounded({f"{name}.weight": weights[f"{name}.weight"] for name in modules}, inputs, modules)
        return made

    def _scales(self) -> bool:
        """Whether channels are scaled before their matrices are rounded."""
        return self.method is awq.quantize

    def _scaled(self, weights: Weights, given: dict[str, Inputs]) -> tuple[Weights, dict[str, Inputs]]:
        """A place with its channels scaled, and what its matrices are then given; what stays whole is stored."""
        if not self._scales():
            return weights, given
        changed, inputs = awq.scale_channels(self.source.config, weights, given, self.schemes)
        for name, each in changed.items():
            if name.removesuffix(".weight") not in self.schemes:
                array = each.astype(self.source.dtype(name))
                self.spool.put(name, array)
                changed[name] = array.astype(np.float32)
        return weights | changed, inputs

    def _all_given(self, n: int, weights: Weights, x: np.ndarray | None) -> dict[str, Inputs]:
        """What block ``n`` gives each of its matrices while all of them are as they were."""
        sites = calibration.sites(self.source.config)

        @cache
        def once() -> dict[str, Inputs]:
            assert x is not None
            return self.walk.block(n, weights, x, [*sites])[1]

        found: dict[str, Inputs] = {}
        for site, group in sites.items():
            modules = [f"h.{n}.{name}" for name in group if f"h.{n}.{name}" in self.schemes]
            if modules:
                found |= dict.fromkeys(modules, self._inputs(f"h.{n}.{site}", lambda site=site: once()[site]))
        return found

    def _given(self, n: int, weights: Weights, x: np.ndarray | None, site: str) -> Inputs:
        assert x is not None
        return self.walk.block(n, weights, x, [site])[1][site]

    def _rounded(self, weights: Weights, inputs: Mapping[str, Inputs], modules: Any) -> Weights:
        """``weights`` with the matrices of ``modules`` as they will be; one without inputs has them all alike."""
        made = dict(weights)
        for module in modules:
            name = f"{module}.weight"
            if module not in self.schemes or name not in weights:
                continue
            scheme, weight = self.schemes[module], weights[name].astype(self.source.dtype(name), copy=False)
            if self.method is None:
                made[name] = Quantized.of(weight, scheme.bits, scheme.group_size).dequantize()
                continue
            width = weight.shape[1]
            alike = Inputs(np.eye(width), np.ones(width), 1)
            result = self.method(weight, inputs.get(module, alike), scheme)
            self.spool.put(name, result)
            made[name] = result.dequantize()
        return made
