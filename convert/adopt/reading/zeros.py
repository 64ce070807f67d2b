"""Names that count from nothing: linear, linear_1, linear_2, as Haiku and Keras have them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from convert.adopt.rules import Choice, Option, Proposal, Rule, has_number, named

_ONE = re.compile(r"(.*[^\d.])_1")


def numbered(names: Iterable[str]) -> dict[str, str]:
    """linear_0 -> linear, for each name with a word that has no number where others of its place have one."""
    names = list(names)
    places: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            places.setdefault(".".join(parts[:i]), set()).add(part)
    first = {
        (place, found.group(1))
        for place, parts in places.items()
        for part in parts
        if (found := _ONE.fullmatch(part)) and found.group(1) in parts and f"{found.group(1)}_0" not in parts
    }
    made: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        said = [f"{part}_0" if (".".join(parts[:i]), part) in first else part for i, part in enumerate(parts)]
        if said != parts:
            made[".".join(said)] = name
    return made


def restored(proposal: Proposal, real: Mapping[str, str]) -> Proposal:
    """The proposal with the file's own names: where a pattern does not say them, a rule for each block."""
    n_layer = proposal.map.model["n_layer"]

    def spread(theirs: str) -> dict[int, str] | None:
        """block -> name, of a pattern with a name that the file has otherwise."""
        count = n_layer if has_number(theirs, "n") else 1
        said = {n: named(theirs, n) for n in range(count)}
        if has_number(theirs, "h") or not any(name in real for name in said.values()):
            return None
        return {n: real.get(name, name) for n, name in said.items()}

    def rules(given: Iterable[Rule]) -> list[Rule]:
        made: list[Rule] = []
        for rule in given:
            names = spread(rule.theirs)
            if names is None:
                made.append(rule)
            elif not has_number(rule.theirs, "n"):
                made.append(replace(rule, theirs=names[0]))
            else:
                made += [
                    replace(rule, theirs=name, to=tuple(named(each, n) for each in rule.to))
                    for n, name in names.items()
                ]
        return made

    def option(given: Option) -> Option:
        return replace(given, rules={rule.theirs: rule for rule in rules(given.rules.values())})

    left: dict[str, str] = {}
    for theirs, why in proposal.map.left.items():
        names = spread(theirs)
        left |= {theirs: why} if names is None else dict.fromkeys(names.values(), why)
    choices = tuple(
        Choice(choice.name, tuple(option(each) for each in choice.options), choice.why) for choice in proposal.choices
    )
    made = replace(proposal.map, rules=tuple(rules(proposal.map.rules)), left=left)
    return replace(proposal, map=made, choices=choices)
