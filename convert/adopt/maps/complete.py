"""A map with everything that its file says, so that the file can be written again."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from convert.adopt import apply
from convert.adopt.maps import buffers, moments
from convert.adopt.rules import Map
from convert.adopt.source import State
from convert.formats.opened import Moments, Tensor


@dataclass(frozen=True)
class Complete:
    """A map with all that says how to write a file again, and what does not fit into it.

    ``kept`` are the buffers that lie beside it, ``moments`` an optimizer's by our unfused names, see ``moments.fused``.
    """

    map: Map
    kept: Mapping[str, np.ndarray]
    moments: Moments | None
    notes: tuple[str, ...]


def complete(made: Map, state: State) -> Complete:
    """The map with everything that the file of ``state`` says.

    Raises:
        UserError: see ``apply.Plan``.
    """
    plan = apply.Plan(made, {name: tensor.shape for name, tensor in state.tensors.items()})
    at = {name: place for place, name in enumerate(state.tensors)}
    first = {rule.theirs: min(at[name] for name, own in plan.rule_of.items() if own is rule) for rule in made.rules}
    rules = tuple(sorted(made.rules, key=lambda rule: first[rule.theirs]))
    left, found, kept = buffers.lines(made, state, plan)
    weights = [name for name in state.tensors if name in plan.rule_of]
    whole = Map(
        rules, made.model, left, made.rope, state.under, state.prefix, state.kind, state.separator,
        _dtypes(plan, state.tensors), found, (), state.nested, state.beside,
    )  # fmt: skip
    if list(apply.in_order(whole, dict.fromkeys(weights))) != weights:
        whole = dataclasses.replace(whole, order=tuple(weights))
    optimizer, read, notes = moments.read(whole, state)
    return Complete(dataclasses.replace(whole, optimizer=optimizer), kept, read, tuple(notes))


def _dtypes(plan: apply.Plan, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The dtype of most weights under "", and of the others by name or rule."""
    kinds = {name: tensors[name].dtype.name for name in plan.rule_of}
    usual = Counter(kinds.values()).most_common(1)[0][0]
    made = {"": usual}
    for rule in plan.map.rules:
        own = {name: kinds[name] for name, other in plan.rule_of.items() if other is rule}
        if set(own.values()) == {usual}:
            continue
        made |= {rule.theirs: next(iter(own.values()))} if len(set(own.values())) == 1 else own
    return made
