"""Maps that are ready: of projects whose names are known, beside this file. Sizes come from shapes.

[ready] says what a file is of, and which rules need not be there; [choices] what its weights do not say, the likeliest
first; ``tied`` in [model], if it is there, what the file must be. The other sections are those of a map.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from convert.adopt.maps.layout import parse
from convert.adopt.reading import choices, hints
from convert.adopt.rules import Choice, Map, Option, Proposal, Rule, chosen, has_number, matching, named
from convert.adopt.source import State
from mlxgpt.common.recipes import read_toml

_SIZES = {
    "wte.weight": ("vocab_size", "n_embd"),
    "lm_head.weight": ("vocab_size", "n_embd"),
    "wpe.weight": ("block_size", "n_embd"),
    "attn.q_proj.weight": ("width", "n_embd"),
    "attn.k_proj.weight": ("kv", "n_embd"),
    "mlp.c_fc.weight": ("n_hidden", "n_embd"),
    "attn.q_norm.weight": ("head_dim",),
}  # of our tensors, which is what each axis is
_TABLE = "table of sinusoids"  # in [left], whose length is that of the context
_LENGTH = 1024  # of a context that no tensor tells
# values of TOML's text that follow from sizes
_DERIVED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "n_embd ** -0.5": lambda model: model["n_embd"] ** -0.5,
    "(2 / n_embd) ** 0.5": lambda model: (2 / model["n_embd"]) ** 0.5,
    "odd blocks": lambda model: tuple(range(1, model["n_layer"], 2)),
}


def files() -> dict[str, Path]:
    """The ready maps by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}


@cache
def _read(path: Path) -> dict[str, Any]:
    return read_toml(path)


def propose(state: State) -> Proposal | None:
    """What a ready map says of a state dict whose names are that map's; None where none has these names."""
    for path in files().values():
        made = _propose(state, _read(path))
        if made:
            return made
    return None


def ahead(proposal: Proposal, known: Proposal) -> Proposal:
    """A proposal whose choices begin with what the ready map ``known`` says, to be proved by evidence."""
    rules = {rule.theirs: rule for rule in known.map.rules}
    made = []
    for choice in proposal.choices:
        said = [each for each in choice.options if _says(each, known.map, rules)]
        made.append(replace(choice, options=(*said, *(each for each in choice.options if each not in said))))
    open_ = {field for choice in made for option in choice.options for field in option.model}
    more = [each for each in known.choices if not open_ & {field for option in each.options for field in option.model}]
    fields = {key: value for key, value in known.map.model.items() if key not in open_}
    firsts = chosen(
        replace(proposal.map, model={**proposal.map.model, **fields}), tuple(each.options[0] for each in made)
    )
    return Proposal(firsts, (*made, *more), (known.notes[0], *proposal.notes))


def _says(option: Option, made: Map, rules: Mapping[str, Rule]) -> bool:
    same = all(key in made.model and made.model[key] == value for key, value in option.model.items())
    return (
        same and option.rope in (None, made.rope) and all(rules.get(key) == rule for key, rule in option.rules.items())
    )


def _propose(state: State, values: Mapping[str, Any]) -> Proposal | None:
    optional = values["ready"].get("optional", [])
    all_rules = [rule_of(theirs.removeprefix(state.prefix), value) for theirs, value in values["tensors"].items()]
    counts = {rule.theirs: _count(rule.theirs, state) for rule in all_rules}
    n_layer = max((found[0] for theirs, found in counts.items() if has_number(theirs, "n")), default=0)
    rules = [rule for rule in all_rules if counts[rule.theirs][0]]
    absent = [rule for rule in all_rules if not counts[rule.theirs][0]]
    if not n_layer or any(not any(fnmatch.fnmatch(rule.theirs, each) for each in optional) for rule in absent):
        return None
    if any(counts[rule.theirs][0] != n_layer for rule in rules if has_number(rule.theirs, "n")):
        return None
    said = {name.removeprefix(state.prefix): why for name, why in values.get("left", {}).items()}
    left = {name: why for name, why in said.items() if _any(name, state)}
    known = [matching(name) for name in [*(rule.theirs for rule in rules), *left]]
    if not all(any(each.fullmatch(name) for each in known) for name in state.tensors):
        return None
    sizes = _sizes(rules, counts, state)
    if sizes is None:
        return None
    settings = hints.read(state.extras)
    model = {"family": "mlxgpt", "n_layer": n_layer, **values["model"]}
    tied = _tied(rules, state)
    if model.get("tied", tied) != tied:
        return None
    rules = [_with_tied(rule) if tied else rule for rule in rules]
    notes = [f"recognized as {values['ready']['of']}"]
    model |= {name: size for name, size in sizes.items() if name not in ("width", "kv", "head_dim")}
    for name in (name for name, why in left.items() if why == _TABLE):
        model["block_size"] = max(state.tensors[name].shape[:-1])
    model |= flags(rules) | {"tied": tied}
    rope = values["source"]["rope"] if "source" in values else "halves"
    heads, choice = choices.n_head(
        sizes["width"], sizes.get("kv", sizes["width"]), sizes.get("head_dim", 0), settings, model["position"] == "rope"
    )
    model |= heads
    if "block_size" not in model:
        model["block_size"] = settings.get("block_size", _LENGTH)
        if "block_size" not in settings:
            notes.append(f"block_size = {_LENGTH}: nothing tells the longest context; --set block_size=N does")
    model |= {name: settings[name] for name in ("norm_eps", "rope_theta") if name in settings}
    model = {name: derived(value, model) for name, value in model.items()}
    open_ = [choice] if choice else []
    open_ += [
        _choice(name, options, model) for name, options in values.get("choices", {}).items() if name not in settings
    ]
    for each in open_:
        model |= each.options[0].model
    made = Map(tuple(rules), model, left, rope, state.under, state.prefix)
    return Proposal(made, tuple(open_), tuple(notes))


def rule_of(theirs: str, value: Any) -> Rule:
    """A line of [tensors]."""
    if isinstance(value, str):
        return Rule(theirs, (value,))
    to = value["to"]
    return Rule(theirs, (to,) if isinstance(to, str) else tuple(to), value.get("axes", ""))


def _count(theirs: str, state: State) -> tuple[int, int]:
    """For how many blocks, and heads, there is a tensor of this name."""
    blocks = heads = 0
    if named(theirs) in state.tensors:
        blocks = heads = 1
    while has_number(theirs, "n") and named(theirs, blocks) in state.tensors:
        blocks += 1
    while has_number(theirs, "h") and named(theirs, 0, heads) in state.tensors:
        heads += 1
    return blocks, heads


def _any(name: str, state: State) -> bool:
    return any(matching(name).fullmatch(each) for each in state.tensors)


def _sizes(rules: list[Rule], counts: Mapping[str, tuple[int, int]], state: State) -> dict[str, int] | None:
    """The sizes that the tensors' shapes say; None where a tensor has other axes, or two say different ones."""
    made: dict[str, int] = {}
    for rule in rules:
        for size, value in _sizes_of(rule, counts[rule.theirs][1], state) or ():
            if made.setdefault(size, value) != value or value < 1:
                return None
    return made if {"width", "n_embd", "n_hidden", "vocab_size"} <= made.keys() else None


def _sizes_of(rule: Rule, heads: int, state: State) -> Iterator[tuple[str, int]]:
    ours = next((name.removeprefix("h.{n}.") for name in rule.to if name.removeprefix("h.{n}.") in _SIZES), None)
    if ours is None:
        return
    by_head, dims = has_number(rule.theirs, "h"), _SIZES[ours]
    groups, shape = parse(rule, len(dims), by_head), state.tensors[named(rule.theirs)].shape
    groups = groups[1:] if by_head else groups
    if len(groups) != len(shape):
        yield "", 0
        return
    sizes: dict[str, int] = {}
    for group, size in zip(groups, shape, strict=True):
        letters = [letter for letter in group if letter not in "p1"]
        if len(letters) == 1:
            sizes[letters[0]] = size // len(rule.to) if "p" in group else size
    if by_head:
        yield "head_dim", sizes["d"]
        sizes["o"] = sizes["d"] * heads
    yield from ((dim, sizes[letter]) for dim, letter in zip(dims, "oi", strict=False))
    if ours == "attn.q_proj.weight" and len(rule.to) > 1:
        yield "kv", sizes["o"]


def _tied(rules: list[Rule], state: State) -> bool:
    """Whether the head is not there, or the embedding's."""
    heads = [rule.theirs for rule in rules if rule.to == ("lm_head.weight",)]
    table = next(rule.theirs for rule in rules if rule.to == ("wte.weight",))
    return not heads or any({heads[0], table} <= set(group) for group in state.tied)


def _with_tied(rule: Rule) -> Rule:
    return Rule(rule.theirs, ("wte.weight",)) if rule.to == ("lm_head.weight",) else rule


def flags(rules: list[Rule]) -> dict[str, bool]:
    """Which biases there are."""
    given = {name for rule in rules for name in rule.to}
    return {
        "qkv_bias": "h.{n}.attn.q_proj.bias" in given,
        "out_bias": "h.{n}.attn.c_proj.bias" in given,
        "mlp_bias": "h.{n}.mlp.c_fc.bias" in given,
        "norm_bias": "h.{n}.ln_1.bias" in given,
        "head_bias": "lm_head.bias" in given,
        "final_norm": "ln_f.weight" in given,
    }


def derived(value: Any, model: Mapping[str, Any]) -> Any:
    """A value that follows from sizes, where the map says so in words."""
    return _DERIVED[value](model) if isinstance(value, str) and value in _DERIVED else value


def _choice(name: str, options: list[dict[str, Any]], model: Mapping[str, Any]) -> Choice:
    made = []
    for each in options:
        fields = {key: derived(value, model) for key, value in each.items() if key != "label"}
        made.append(Option(each.get("label", str(next(iter(fields.values())))), fields))
    return Choice(name, tuple(made), "versions of the project differ")
