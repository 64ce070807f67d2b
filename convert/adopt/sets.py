"""``--set key=value``: choices that the user makes, and fields of the model that no choice leaves open."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from convert.adopt.rules import ROPES, Choice, Option, Proposal
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.recipes import parse_value


def settle(proposal: Proposal, items: Sequence[str]) -> tuple[Proposal, list[str]]:
    """The proposal with the choices that ``items`` make, and their names.

    Raises:
        UserError: an item is not key=value, names nothing that is open or of the model, or no option of it.
    """
    given: list[str] = []
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        key = key.removeprefix("model.")
        if not equals or not key or not text:
            raise UserError(f"--set {item}: expected key=value, such as n_head=4")
        name = next((choice.name for choice in proposal.choices if key in keys(choice)), "")
        if name in given or key in given:
            raise UserError(f"--set {item}: {key} is set twice")
        proposal = _choose(proposal, name, key, text) if name else _field(proposal, item, key, text)
        given.append(name or key)
    return proposal, given


def keys(choice: Choice) -> list[str]:
    """How a choice may be called in ``--set``, the shortest first: by its name, or by what its options set."""
    fields = {field for option in choice.options for field in option.model}
    turned = ["rope"] if any(option.rope for option in choice.options) else []
    own = [choice.name] if " " not in choice.name else []
    return [*own, *turned, *(sorted(fields) if len(fields) == 1 else ()), _called(choice), choice.name]


def spelled(label: str) -> str:
    """An option as one word of a shell."""
    return re.sub(r"[^\w.+-]+", "_", label).strip("_")


def _called(choice: Choice) -> str:
    """A word for a choice of layout: what the tensor holds, such as qkv or c_proj."""
    held = [name for option in choice.options for rule in option.rules.values() for name in rule.to]
    words = list(dict.fromkeys(name.rpartition(".")[0].rpartition(".")[2].removesuffix("_proj") for name in held))
    return "qkv" if sorted(words) == ["k", "q", "v"] else "_".join(words) or choice.name


def _value(text: str) -> Any:
    found = parse_value(text)
    return tuple(found) if isinstance(found, list) else found


def _choose(proposal: Proposal, name: str, key: str, text: str) -> Proposal:
    """The proposal in which a choice has the one option that ``text`` says."""
    choice = next(choice for choice in proposal.choices if choice.name == name)
    value, option = _value(text), None
    for each in choice.options:
        said = {each.label, spelled(each.label), each.rope, spelled(each.rope or "")}
        if text in said or (key in each.model and each.model[key] == value):
            option = each
            break
    numeric = key in _FIELDS and isinstance(value, int | float) and not isinstance(value, bool)
    if option is None and numeric and all(key in each.model for each in choice.options):
        option = Option(text, {key: value})
    if option is None:
        labels = [spelled(each.label) for each in choice.options]
        raise UserError(f"--set {key}={text}: expected one of {', '.join(labels)}")
    made = dataclasses.replace(choice, options=(option,))
    return dataclasses.replace(proposal, choices=tuple(made if each is choice else each for each in proposal.choices))


_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}


def _field(proposal: Proposal, item: str, key: str, text: str) -> Proposal:
    """The proposal with another value of a field of the model, or of the pairing of rope."""
    found = proposal.map
    if key == "rope":
        if text.replace("_", " ") not in ROPES:
            raise UserError(f"--set {item}: expected one of {', '.join(name.replace(' ', '_') for name in ROPES)}")
        return dataclasses.replace(proposal, map=dataclasses.replace(found, rope=text.replace("_", " ")))
    if key not in _FIELDS or key in ("family", "labels", "fused_qkv", "fused_mlp", "qkv_by_head"):
        known = [*(name for choice in proposal.choices for name in keys(choice)), *_FIELDS]
        raise UserError(f"--set {item}: {key} is no choice of this model{nearest(key, known)}")
    value, kind = _value(text), type(_FIELDS[key].default)
    value = float(value) if kind is float and isinstance(value, int) and not isinstance(value, bool) else value
    if type(value) is not kind:
        raise UserError(f"--set {item}: expected {kind.__name__}, as {_FIELDS[key].default!r}")
    choices = tuple(_overridden(choice, key, value) for choice in proposal.choices)
    return dataclasses.replace(
        proposal, map=dataclasses.replace(found, model={**found.model, key: value}), choices=choices
    )


def _overridden(choice: Choice, key: str, value: Any) -> Choice:
    """The choice, whose options set a field to what was given where they set it at all."""
    options = (
        dataclasses.replace(each, model={**each.model, key: value}) if key in each.model else each
        for each in choice.options
    )
    return dataclasses.replace(choice, options=tuple(options))
