"""The state of ``torch.optim.AdamW``, which knows its parameters by position only, as moments by name and back."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from convert import torch_file
from convert.model import Options, Tensor
from mlxgpt.common.errors import UserError


def read(
    where: str, value: Any, groups: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """First and second moments by the names of ``groups``, in whose order positions count, and the updates made.

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
        steps.add(_number(own["step"]))
        for key, made in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            made[name] = torch_file.lazy(where, f"parameter {i}, {name}: {key}", own[key], shapes[name])
            if made[name].dtype != np.float32:
                raise UserError(f"{where}: parameter {i}, {name}: {key} is {made[name].dtype}, expected float32")
    step = steps.pop() if len(steps) == 1 else -1.0
    if not 0 <= step < 2**53 or step != int(step):
        raise UserError(f"{where}: step: expected one whole number for all parameters")
    return *moments, int(step)


def _number(value: Any) -> float:
    """A number, or a tensor of one; NaN for anything else."""
    import torch

    plain = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    return float(plain) if type(plain) in (int, float) else math.nan


def write(
    groups: Sequence[tuple[Sequence[str], float]],
    m: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    t: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``AdamW.state_dict()`` is after ``t`` updates of these (names, weight decay); before the first it has none.

    ``settings`` has lr, beta1, beta2 and eps; what else a group says is AdamW's default in the PyTorch that writes.
    """
    import torch

    empty = [{"params": [torch.nn.Parameter(torch.empty(0))], "weight_decay": decay} for _, decay in groups]
    betas = settings["beta1"], settings["beta2"]
    made = torch.optim.AdamW(empty, lr=settings["lr"], betas=betas, eps=settings["eps"]).state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    start = 0
    for group, (names, _) in zip(made, groups, strict=True):
        group["params"] = list(range(start, start + len(names)))
        start += len(names)
        for i, name in zip(group["params"], names, strict=True):
            if t:
                state[i] = {
                    "step": torch.tensor(float(t)),
                    "exp_avg": torch_file.as_torch(f"m.{name}", m[name], Options()),
                    "exp_avg_sq": torch_file.as_torch(f"v.{name}", v[name], Options()),
                }
    return {"state": state, "param_groups": made}
