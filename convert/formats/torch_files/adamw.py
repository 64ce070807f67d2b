"""The state of ``torch.optim.AdamW``, which knows its parameters by position only, as moments by name and back."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np

from convert.formats.opened import Moments, Tensor
from convert.formats.torch_files import file as torch_file
from mlxgpt.common.errors import UserError
from mlxgpt.common.runs import checkpoint


def read_moments(
    where: str, value: Any, groups: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """First and second moments by the names of ``groups``, in whose order positions count, and the updates made.

    ``shapes`` has these names, too, in the order in which they are returned.

    Raises:
        UserError: other groups, shapes or counts than these, or another optimizer's state.
    """
    state, found = (value.get(key) if isinstance(value, Mapping) else None for key in ("state", "param_groups"))
    if not isinstance(state, Mapping) or not isinstance(found, list):
        raise UserError(f"{where}: expected an optimizer's state and param_groups")
    ids = [group.get("params") if isinstance(group, Mapping) else None for group in found]
    if [len(one) if isinstance(one, list) else 0 for one in ids] != [len(names) for names in groups]:
        counts = " and ".join(str(len(names)) for names in groups)
        raise UserError(f"{where}: {len(ids)} groups of parameters, expected {counts} in {len(groups)}")
    moments: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    steps = set()
    for i, name in zip(chain.from_iterable(one or () for one in ids), chain(*groups), strict=True):
        own = state.get(i) if isinstance(i, int) else None
        if not isinstance(own, Mapping) or not {"step", "exp_avg", "exp_avg_sq"} <= set(own):
            raise UserError(f"{where}: parameter {i}, {name}: expected step, exp_avg and exp_avg_sq, as AdamW has")
        steps.add(torch_file.number(own["step"]))
        for key, made in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            made[name] = torch_file.lazy(f"{where}: parameter {i}, {name}: {key}", own[key], shapes[name])
            if made[name].dtype != np.float32:
                raise UserError(f"{where}: parameter {i}, {name}: {key} is {made[name].dtype}, expected float32")
    step = steps.pop() if len(steps) == 1 else -1.0
    if not 0 <= step < 2**53 or step != int(step):
        raise UserError(f"{where}: step: expected one whole number for all parameters")
    m, v = ({name: made[name] for name in shapes} for made in moments)
    return m, v, int(step)


def moments(
    m: dict[str, Tensor],
    v: dict[str, Tensor],
    t: int,
    step: int,
    framework: str,
    settings: dict[str, Any],
    best: dict[str, float] | None = None,
) -> Moments:
    """Moments with as much of a run's state as another's file says: the ``settings`` of its updates, its best."""
    state = checkpoint.RunState(0, {}, {"optim": settings}, framework, {}, step, t, best=best, evaluated=step)
    return Moments(m, v, t, step, dataclasses.asdict(state))


def settings(group: Mapping[str, Any]) -> dict[str, float]:
    """Our settings of the update rule that a group of parameters says."""
    betas = group.get("betas")
    made: dict[str, Any] = {key: group.get(key) for key in ("lr", "eps", "weight_decay")}
    if isinstance(betas, tuple | list) and len(betas) == 2:
        made |= {"beta1": betas[0], "beta2": betas[1]}
    return {key: float(value) for key, value in made.items() if type(value) in (int, float) and math.isfinite(value)}


def write_moments(
    groups: Sequence[tuple[Sequence[str], float]],
    m: Mapping[str, Any],
    v: Mapping[str, Any],
    t: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``AdamW.state_dict()`` is after ``t`` updates of these (names, weight decay); before the first it has none.

    ``m`` and ``v`` are PyTorch's tensors; ``settings`` has lr, beta1, beta2 and eps. What else a group says is AdamW's
    default in the PyTorch that writes.
    """
    import torch

    empty = [{"params": [torch.nn.Parameter(torch.empty(0))], "weight_decay": decay} for _, decay in groups]
    betas = settings["beta1"], settings["beta2"]
    made = torch.optim.AdamW(empty, lr=settings["lr"], betas=betas, eps=settings["eps"]).state_dict()["param_groups"]
    names = list(chain.from_iterable(group for group, _ in groups))
    starts = accumulate((len(group) for group, _ in groups), initial=0)
    for group, (own, _), start in zip(made, groups, starts, strict=False):
        group["params"] = list(range(start, start + len(own)))
    state = {
        i: {"step": torch.tensor(float(t)), "exp_avg": m[name], "exp_avg_sq": v[name]}
        for i, name in enumerate(names if t else ())
    }
    return {"state": state, "param_groups": made}
