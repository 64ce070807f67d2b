"""The state of a torch.optim.AdamW beside their tensors as moments of ours, and back.

It knows parameters by position: the order of ``model.parameters()``, which is that of the state dict without buffers
and without the copies of tied tensors, in one of the groupings of rules.GROUPS.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from convert.adopt import apply
from convert.adopt.rules import GROUPS, Map, Optimizer
from convert.adopt.source import State
from convert.formats.opened import Moments, Tensor
from convert.formats.torch_files import adamw
from mlxgpt.common.config import ModelConfig, OptimConfig
from mlxgpt.common.errors import UserError

_STEPS = ("iter_num", "iteration", "iter", "global_step", "step", "steps")
_EMBEDDINGS = ("wte.weight", "wpe.weight")


def parameters(plan: apply.Plan, names: Sequence[str], copies: bool) -> list[str]:
    """Those of ``names`` that are parameters of their own, in the order of ``model.parameters()``."""
    seen: set[str] = set()
    made = []
    for name in names:
        ours = plan.rule_of[name].to
        tied = len(ours) == 1 and len(plan.sources.get(ours[0], ())) > 1
        if not tied or copies or ours[0] not in seen:
            made.append(name)
        seen |= set(ours) if tied else set()
    return made


def groups_of(kind: str, plan: apply.Plan, names: Sequence[str], ndim: Callable[[str], int]) -> list[list[str]]:
    """``names`` in an optimizer's groups, see ``rules.GROUPS``."""
    if kind == "one":
        return [list(names)]
    if kind == "matrices":
        return [[name for name in names if ndim(name) >= 2], [name for name in names if ndim(name) < 2]]
    linear = {name for name in names if ndim(name) >= 2 and not set(plan.rule_of[name].to) & set(_EMBEDDINGS)}
    return [sorted(linear), sorted(set(names) - linear)]


def read(made: Map, state: State) -> tuple[Optimizer | None, Moments | None, list[str]]:
    """Where the optimizer's state lies, the moments by our unfused names, and notes; what does not fit is left behind.

    ``made`` is complete, see ``buffers.complete``.
    """
    if state.optimizer is None:
        return None, None, []
    where = f"{state.path}: {'.'.join(state.optimizer_at)}"
    if not state.optimizer.get("state"):
        return None, None, []  # no update was made yet
    plan = apply.Plan(made)
    weights = list(apply.in_order(made, plan.rule_of))
    shapes = {name: state.tensors[name].shape for name in weights}
    refused: list[str] = []
    for kind in GROUPS:
        for copies in (False, True):
            names = parameters(plan, weights, copies)
            groups = groups_of(kind, plan, names, lambda name: len(shapes[name]))
            wanted = {name: shapes[name] for name in names}
            try:
                m, v, t = adamw.read_moments(where, state.optimizer, groups, wanted)
                own = parameters(plan, weights, False)
                ours = [_ours(made, {name: each[name] for name in own}, where) for each in (m, v)]
            except UserError as error:
                refused.append(str(error))
                continue
            return _read(made, state, where, kind, copies, ours, t)
    return None, None, [f"{_likeliest(state.optimizer, refused)}; the moments are left behind"]


def _ours(made: Map, theirs: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    return apply.lazily(made, theirs, f"{where}: ", partial=True)


def _likeliest(optimizer: Mapping[str, Any], refused: Sequence[str]) -> str:
    """What the grouping of as many groups says: the first two are of one."""
    count = len(optimizer["param_groups"])
    return refused[0] if count == 1 else refused[2]


def _read(
    made: Map, state: State, where: str, kind: str, copies: bool, ours: list[dict[str, Tensor]], t: int
) -> tuple[Optimizer, Moments, list[str]]:
    assert state.optimizer
    found = tuple(adamw.settings(group) for group in state.optimizer["param_groups"])
    step_at, step = _step(state.beside, t)
    decays = {each.get("weight_decay", 0.0) for each in found}
    settings = found[0] | {"weight_decay": max(decays)}
    moments = adamw.moments(ours[0], ours[1], t, step, "PyTorch", settings)
    flags = " ".join(f"--set optim.{key}={value}" for key, value in settings.items())
    notes = [f"{where}: AdamW after {t} updates; as there: {flags}"]
    if kind == "one" and settings["weight_decay"]:
        notes[0] += "; it decayed biases and norms too, which is not done here"
    if any(group.get("amsgrad") for group in state.optimizer["param_groups"]):
        notes.append(f"{where}: amsgrad's largest moments are left behind")
    if any(
        group.get("decoupled_weight_decay") is False and group.get("weight_decay")
        for group in state.optimizer["param_groups"]
    ):
        notes.append(f"{where}: of Adam, whose weight_decay adds to the gradient; here it is AdamW's")
    return Optimizer(state.optimizer_at, kind, found, copies, step_at), moments, notes


def _step(beside: Mapping[str, Any], t: int) -> tuple[tuple[str, ...], int]:
    """Where the file says the number of steps, and it; else the number of updates."""
    for key in _STEPS:
        if type(beside.get(key)) is int and 0 <= beside[key] < 2**53:
            return (key,), beside[key]
    for key, value in beside.items():
        if isinstance(value, Mapping) and (found := _step(value, t))[0]:
            return (key, *found[0]), found[1]
    return (), t


def fused(moments: Moments, config: ModelConfig) -> Moments:
    """Moments by our unfused names, as ``config`` has them."""
    return dataclasses.replace(moments, m=apply.fused(config, moments.m), v=apply.fused(config, moments.v))


def write(made: Map, moments: Moments, config: ModelConfig, add: Callable[[str, Tensor], Any]) -> dict[str, Any]:
    """The state dict of their optimizer; ``moments`` are those of ``config``, ``add`` gives PyTorch's tensor for one.

    Raises:
        UserError: see ``apply.Plan``.
    """
    assert made.optimizer
    plan = apply.Plan(made)
    fusion = apply.fusion(config)
    m, v = (apply.back_lazily(made, apply.lazily(fusion, each)) for each in (moments.m, moments.v))
    names = parameters(plan, list(apply.in_order(made, plan.rule_of)), made.optimizer.copies)
    groups = groups_of(made.optimizer.groups, plan, names, lambda name: len(m[name].shape))
    given = (moments.state or {}).get("recipe", {}).get("optim", {})
    first = made.optimizer.settings[0] if made.optimizer.settings else {}
    settings = dataclasses.asdict(OptimConfig()) | dict(first) | given
    decays = [each.get("weight_decay", 0.0) for each in made.optimizer.settings]
    decays += [settings["weight_decay"]] * (len(groups) - len(decays))
    ms, vs = ({n: add(f"{key}.{n}", each[n]) for n in names} for key, each in (("m", m), ("v", v)))
    return adamw.write_moments(list(zip(groups, decays, strict=False)), ms, vs, moments.t, settings)


def set_step(beside: dict[str, Any], at: Sequence[str], step: int) -> None:
    """Sets the number of steps where the file says it."""
    if at:
        functools.reduce(lambda here, key: here[key], at[:-1], beside)[at[-1]] = step
