"""Their tensors as ours by a map, and back: exact inverses, one tensor in memory at a time.

Ours are named and shaped as params.table says for a model whose matrices are not fused; maps/layout.py says how a
tensor lies.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.adopt.maps.layout import Layout, heads_of, layout
from convert.adopt.rules import ROPES, Map, Rule, has_number, matching, named
from convert.adopt.source import FLOATS, check_finite
from convert.formats.opened import Tensor
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.model import params

_UNFUSED = {"fused_qkv": False, "fused_mlp": False, "qkv_by_head": False}
_TURNED = ("attn.q_proj.weight", "attn.k_proj.weight", "attn.q_proj.bias", "attn.k_proj.bias", "attn.q_norm.weight",
           "attn.k_norm.weight", "attn.q_norm.bias", "attn.k_norm.bias")  # fmt: skip


def config_of(model: Mapping[str, Any]) -> ModelConfig:
    """The model of a map, with q, k, v, gate and up apart.

    Raises:
        UserError: a field that ModelConfig does not have, that is missing or out of its range.
    """
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    for key in model:
        if key not in fields:
            raise UserError(f"model.{key}: unknown{nearest(key, fields)}")
    for key in ("n_layer", "n_head", "n_embd", "vocab_size"):
        if key not in model:
            raise UserError(f"model.{key} is missing: expected a number (--set {key}=...)")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in model.items()}
    return ModelConfig(**{**values, **_UNFUSED})


def promote(kinds: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds the values of all; float32 for float16 and bfloat16."""

    def both(one: np.dtype, other: np.dtype) -> np.dtype:
        return (
            np.dtype(np.float32) if {one.name, other.name} == {"float16", "bfloat16"} else np.promote_types(one, other)
        )

    return functools.reduce(both, kinds)


def _order(rope: str, rotary: int, head_dim: int) -> np.ndarray:
    """Where our dimensions of a head lie in theirs."""
    half = rotary // 2
    order = np.arange(head_dim)
    if rope.startswith("pairs"):
        order[:rotary] = np.concatenate([np.arange(0, rotary, 2), np.arange(1, rotary, 2)])
    if rope.endswith("reversed"):
        order[:rotary] = np.concatenate([order[half:rotary], order[:half]])
    return order


def _turn(array: np.ndarray, name: str, order: np.ndarray | None) -> np.ndarray:
    """q's and k's rows, of every head, in another order."""
    if order is None or not name.endswith(_TURNED):
        return array
    by_head = array.reshape(-1, len(order), *array.shape[1:])
    return by_head[:, order].reshape(array.shape)


class Plan:
    """A map held against names and shapes: where each of our tensors comes from, and each of theirs."""

    def __init__(self, made: Map, shapes: Mapping[str, tuple[int, ...]] | None = None, partial: bool = False):
        """``shapes`` are those of their tensors, if there are some to hold the map against.

        With ``partial`` a tensor may be missing where another one gives the same of ours: moments of tied matrices.

        Raises:
            UserError: names the rule or the tensor: see ``layout``; no or two rules for a tensor; no tensor for a rule;
                none of theirs for one of ours; another shape.
        """
        self.map = made
        self.config = config = config_of(made.model)
        self.table = params.table(config)
        if made.rope not in ROPES:
            raise UserError(f"rope = {made.rope!r}: expected one of {', '.join(ROPES)}")
        rotary = config.rotary_dim or config.head_dim
        order = _order(made.rope, rotary, config.head_dim)
        plain = made.rope == "halves"
        self._to_ours = None if plain else order
        self._to_theirs = None if plain else np.argsort(order)
        # our name -> (layout, names of theirs, piece, block in a stack) of each place that gives it
        self.sources: dict[str, list[tuple[Layout, tuple[str, ...], int, int]]] = {}
        # their names that are one tensor -> (layout, our names by piece and block)
        self.targets: dict[tuple[str, ...], tuple[Layout, list[list[str]]]] = {}
        self.rule_of: dict[str, Rule] = {}
        for rule in made.rules:
            self._add(rule, layout(rule, config, self.table), shapes, partial)
        self._check(shapes)

    def _add(self, rule: Rule, lies: Layout, shapes: Mapping[str, tuple[int, ...]] | None, partial: bool) -> None:
        blocks = range(self.config.n_layer) if has_number(rule.theirs, "n") else range(1)
        for n in blocks:
            names = tuple(named(rule.theirs, n, h) for h in range(lies.heads or 1))
            for name in names:
                if name in self.rule_of:
                    raise UserError(f"{name}: maps twice, by {self.rule_of[name].theirs!r} and {rule.theirs!r}")
                self.rule_of[name] = rule
            if shapes is not None and partial and not any(name in shapes for name in names):
                continue
            for name in names:
                if shapes is not None and name not in shapes:
                    raise UserError(f"{rule.theirs}: no tensor {name}{nearest(name, shapes)}")
                if shapes is not None and tuple(shapes[name]) != lies.one:
                    axes = f" as axes {rule.axes!r} says" if rule.axes else ""
                    what = (
                        f"has shape {list(shapes[name])}, expected {list(lies.one)} for {' and '.join(rule.to)}{axes}"
                    )
                    raise UserError(f"{name}: {what}")
            inside = range(self.config.n_layer) if lies.stacked else [n]
            ours = [[named(name, block) for block in inside] for name in rule.to]
            self.targets[names] = lies, ours
            for j, each in enumerate(ours):
                for at, name in enumerate(each):
                    if name not in self.table:
                        raise UserError(f"{rule.theirs}: {name} is no tensor of this model{nearest(name, self.table)}")
                    self.sources.setdefault(name, []).append((lies, names, j, at))

    def _check(self, shapes: Mapping[str, tuple[int, ...]] | None) -> None:
        left = [matching(name) for name in self.map.left]
        for name in shapes or ():
            known = name in self.rule_of
            buffer = any(each.fullmatch(name) for each in left)
            if known and buffer:
                raise UserError(f"{name}: maps twice, by {self.rule_of[name].theirs!r} and as left out")
            if not known and not buffer:
                found = f"{name} {list((shapes or {})[name])}"
                raise UserError(f"{found}: no rule takes it: expected one, or a line under [left]")
        for name, param in self.table.items():
            if name not in self.sources:
                raise UserError(f"{name} {list(param.shape)}: no tensor of theirs gives it, which the model has")

    def gather(self, read: Callable[[str], np.ndarray], name: str) -> np.ndarray:
        """One of our tensors; ``read`` gives theirs.

        Raises:
            UserError: two of theirs that should be one differ, or see ``check_finite``.
        """
        made: np.ndarray | None = None
        first = ""
        for lies, names, piece, at in self.sources[name]:
            part = lies.apart(_stacked(read, names, lies))[piece]
            array = _turn(part[at] if lies.stacked else part, name, self._to_ours)
            if made is None:
                made, first = np.ascontiguousarray(array), names[0]
            elif array.astype(made.dtype).tobytes() != made.tobytes():
                raise UserError(f"{names[0]}: differs from {first}, and both are {name} here: expected equal values")
        assert made is not None, name
        return made

    def scatter(self, read: Callable[[str], np.ndarray], names: tuple[str, ...]) -> np.ndarray:
        """Their tensor of ``names``, with a leading axis where there is one a head; ``read`` gives ours."""
        lies, ours = self.targets[names]
        pieces = []
        for each in ours:
            blocks = [_turn(read(name), name, self._to_theirs) for name in each]
            pieces.append(np.stack(blocks) if lies.stacked else blocks[0])
        wide = promote(piece.dtype for piece in pieces)
        return lies.together([piece.astype(wide, copy=False) for piece in pieces])


def _stacked(read: Callable[[str], np.ndarray], names: tuple[str, ...], lies: Layout) -> np.ndarray:
    return np.stack([read(name) for name in names]) if lies.heads else read(names[0])


def _reader(tensors: Mapping[str, Tensor], where: str) -> Callable[[str], np.ndarray]:
    """Reads tensors as floats of at most 32 bits, finite; the last one is kept, as its pieces are asked for in turn."""
    kept: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        if name not in kept:
            kept.clear()
            array = tensors[name].read()
            if array.dtype.name not in FLOATS:
                raise UserError(f"{where}{name} is {array.dtype}: expected floats, as it is a weight")
            check_finite(where + name, array)
            if array.dtype == np.float64:
                with np.errstate(over="ignore"):
                    array = array.astype(np.float32)
                check_finite(f"{where}{name}, rounded to float32", array)
            kept[name] = array
        return kept[name]

    return read


def fused(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our unfused names as ``config`` has them, in params.table's order; each is read when asked for."""
    made = back_lazily(fusion(config), tensors)
    return {name: made[name] for name in params.table(config)}


def lazily(made: Map, tensors: Mapping[str, Tensor], where: str = "", partial: bool = False) -> dict[str, Tensor]:
    """Our tensors, in the order of params.table; each is read from theirs when it is asked for.

    Raises:
        UserError: see ``Plan``; ``where`` stands before what reading says.
    """
    plan = Plan(made, {name: tensor.shape for name, tensor in tensors.items()}, partial)
    read = _reader(tensors, where)

    def tensor(name: str) -> Tensor:
        kinds = [tensors[each].dtype for each in plan.sources[name][0][1]]
        kind = promote(kinds)
        kind = np.dtype(np.float32) if kind == np.float64 else kind
        return Tensor(tuple(plan.table[name].shape), kind, lambda: plan.gather(read, name))

    return {name: tensor(name) for name in plan.table}


def gather(made: Map, tensors: Mapping[str, Tensor], where: str = "") -> dict[str, np.ndarray]:
    """Our tensors as arrays, by our unfused names, as wide as theirs are, float64 as float32.

    Raises:
        UserError: see ``lazily``.
    """
    return {name: tensor.read() for name, tensor in lazily(made, tensors, where).items()}


class Pieces:
    """``gather`` for many maps of the same tensors, in float32: what a rule gives is kept until it lies otherwise."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str = ""):
        self._read = functools.cache(_reader(tensors, where))
        self._kept: dict[str, tuple[tuple[Any, ...], dict[str, np.ndarray]]] = {}

    def gather(self, made: Map) -> dict[str, np.ndarray]:
        """Our tensors, by our unfused names; whether they are all is not looked at.

        Raises:
            UserError: a rule does not fit, or two of theirs that should be one differ.
        """
        config = config_of(made.model)
        sizes = (config.n_layer, config.n_embd, config.n_hidden, config.vocab_size, config.block_size)
        heads = (config.n_head, config.n_kv_head, config.head_dim, config.rotary_dim)
        found: dict[str, np.ndarray] = {}
        for rule in made.rules:
            turned = made.rope if any(name.endswith(_TURNED) for name in rule.to) else "halves"
            by_head = turned != "halves" or set("hdg") & set(rule.axes) or has_number(rule.theirs, "h")
            key = (rule, sizes, turned, heads if by_head else heads[1:2] if len(rule.to) > 1 else ())
            if rule.theirs not in self._kept or self._kept[rule.theirs][0] != key:
                self._kept[rule.theirs] = key, self._one(made, rule, config)
            for name, array in self._kept[rule.theirs][1].items():
                if name in found and not np.array_equal(found[name], array):
                    raise UserError(f"{rule.theirs}: differs from what another tensor gives as {name}")
                found.setdefault(name, array)
        return found

    def _one(self, made: Map, rule: Rule, config: ModelConfig) -> dict[str, np.ndarray]:
        """What one rule gives."""
        lies = layout(rule, config, params.table(config))
        plain = made.rope == "halves"
        order = None if plain else _order(made.rope, config.rotary_dim or config.head_dim, config.head_dim)
        found: dict[str, np.ndarray] = {}
        for n in range(config.n_layer) if has_number(rule.theirs, "n") else range(1):
            names = tuple(named(rule.theirs, n, h) for h in range(lies.heads or 1))
            theirs = _stacked(self._read, names, lies)
            if theirs.shape != lies.shape:
                raise UserError(f"{names[0]}: has shape {list(theirs.shape)}, expected {list(lies.shape)}")
            for name, part in zip(rule.to, lies.apart(theirs), strict=True):
                blocks = enumerate(part) if lies.stacked else [(n, part)]
                for block, array in blocks:
                    ours = named(name, block)
                    found[ours] = np.ascontiguousarray(_turn(array, ours, order), np.float32)
        return found


def back_lazily(made: Map, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors out of ours, in the rules' order; each is made when it is asked for.

    Raises:
        UserError: see ``Plan``.
    """
    plan = Plan(made)
    found: dict[str, Tensor] = {}
    kept: dict[tuple[str, ...], np.ndarray] = {}

    def read(names: tuple[str, ...], h: int) -> np.ndarray:
        if names not in kept:
            kept.clear()
            kept[names] = plan.scatter(lambda name: ours[name].read(), names)
        return np.ascontiguousarray(kept[names][h]) if plan.targets[names][0].heads else kept[names]

    for names, (lies, pieces) in plan.targets.items():
        kind = promote(ours[name].dtype for each in pieces for name in each)
        for h, name in enumerate(names):
            found[name] = Tensor(lies.one, kind, functools.partial(read, names, h))
    return {name: found[name] for name in in_order(made, found)}


def scatter(made: Map, ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their tensors as arrays, by their names without prefix; the inverse of ``gather``.

    Raises:
        UserError: see ``Plan``.
    """
    lazy = {
        name: Tensor(array.shape, array.dtype, functools.partial(np.asarray, array)) for name, array in ours.items()
    }
    return {name: tensor.read() for name, tensor in back_lazily(made, lazy).items()}


def fusion(config: ModelConfig) -> Map:
    """The map from the tensors of ``config`` to those of the same model whose matrices are not fused."""
    rules: dict[str, Rule] = {}
    for name in params.table(config):
        line = re.sub(r"^h\.\d+\.", "h.{n}.", name)
        module, _, kind = line.rpartition(".")
        stem, _, last = module.rpartition(".")
        to, axes = (line,), ""
        if last == "c_attn":
            to = tuple(f"{stem}.{each}_proj.{kind}" for each in "qkv")
            axes = "(h p d)" if config.qkv_by_head else "(p o)"
        elif last == "c_gate_fc":
            to, axes = (f"{stem}.c_gate.{kind}", f"{stem}.c_fc.{kind}"), "(p o)"
        rules[line] = Rule(line, to, f"{axes} i" if axes and kind == "weight" else axes)
    return Map(tuple(rules.values()), vars(config) | _UNFUSED)


def in_order(made: Map, names: Mapping[str, Any]) -> Iterator[str]:
    """Their names in the order of their file: the map's, or rule after rule and block after block."""
    if made.order:
        known = [name for name in made.order if name in names]
        yield from known
        yield from (name for name in names if name not in set(known))
        return
    yield from sorted(names, key=_place_of(made))


def _place_of(made: Map) -> Callable[[str], tuple[int, ...]]:
    """Rules that lie in one list of blocks stand together, block after block; and so do heads within a block."""
    found: dict[str, tuple[int, ...]] = {}
    config = config_of(made.model)
    firsts: dict[str, int] = {}
    before, start = "", 0
    for at, rule in enumerate(made.rules):
        list_of = rule.theirs.partition("{")[0] if has_number(rule.theirs, "n") else ""
        if not list_of or list_of != before:
            firsts.clear()
            start = at
        before = list_of
        heads = heads_of(rule.to[0], config) if has_number(rule.theirs, "h") else 1
        inner = firsts.setdefault(rule.theirs.partition("{h")[0], at) if heads > 1 else at
        for n in range(config.n_layer if list_of else 1):
            for h in range(heads):
                found[named(rule.theirs, n, h)] = start, n, inner, h, at
    return lambda name: found.get(name, (len(made.rules),))
