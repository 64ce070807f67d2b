"""What the schemas of a schema mean for each other: which exclude each other, which only lead back to themselves."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mlxgpt.common.errors import UserError

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
MOST_FACTOR = 10_000  # of multipleOf, in units of its last digit: the automaton has a state for each remainder
_TOGETHER = 6  # expressions that one text must match: their common automaton grows with the product

Node = Any  # of JSON
T = TypeVar("T")


def factor(value: float) -> float:
    """A multipleOf in units of its last digit."""
    digits = f"{value:.15g}"
    return float("inf") if "e" in digits else round(value * 10 ** len(digits.partition(".")[2]))


def check_together(root: Node, made: Mapping[str, Node]) -> None:
    """Refuses expressions, and factors, that one value must fit at once and that take too long to join.

    Raises:
        UserError: says which of the two.
    """
    known = _settled(made, _together, (0, 1))
    stack = [root, *made.values()]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, Mapping):
            patterns, factors = _together(node, known)
            if patterns > _TOGETHER or factors > MOST_FACTOR:
                what = f"more than {_TOGETHER} patterns" if patterns > _TOGETHER else "several multipleOf"
                raise UserError(f"#: {what} that one value must fit at once: expected one that says it all")
            stack += _inner(node)


def _inner(schema: Mapping[str, Node]) -> Iterator[Node]:
    """The schemas in a schema, and lists of them."""
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            yield from value.values()
        elif key not in ("const", "enum"):
            yield value


def _together(schema: Node, known: Mapping[str, tuple[int, float]]) -> tuple[int, float]:
    """How many patterns a value must match at once, at most, and the product of the factors that divide it."""
    if not isinstance(schema, Mapping):
        return 0, 1
    patterns, factors = int("pattern" in schema), factor(schema["multipleOf"]) if "multipleOf" in schema else 1
    parts = [_together(one, known) for one in schema.get("allOf", ())]
    if "$ref" in schema:
        parts.append(known[_name(schema)])
    for key in ("anyOf", "oneOf"):
        options = [_together(one, known) for one in schema.get(key, ())]
        if options:
            parts.append((max(one[0] for one in options), max(one[1] for one in options)))
    for more, times in parts:
        patterns, factors = patterns + more, factors * times
    return min(patterns, _TOGETHER + 1), min(factors, MOST_FACTOR + 1)


def _name(schema: Mapping[str, Node]) -> str:
    """The definition that a reference names."""
    return schema["$ref"].rpartition("/")[2]


def _settled(made: Mapping[str, Node], value_of: Callable[[Node, dict[str, T]], T], least: T) -> dict[str, T]:
    """What ``value_of`` says of each definition, whose values only grow as those that it refers to do."""
    users: dict[str, list[str]] = {name: [] for name in made}
    for name, schema in made.items():
        stack = [schema]
        while stack:
            node = stack.pop()
            if isinstance(node, list):
                stack += node
            elif isinstance(node, Mapping):
                if "$ref" in node:
                    users[_name(node)].append(name)
                stack += _inner(node)
    values, queue = dict.fromkeys(made, least), deque(made)
    waiting = set(queue)
    while queue:
        name = queue.pop()
        waiting.discard(name)
        found = value_of(made[name], values)
        if found != values[name]:
            values[name] = found
            more = [user for user in users[name] if user not in waiting]
            waiting.update(more)
            queue += dict.fromkeys(more)
    return values


def as_any_of(node: dict[str, Node], made: Mapping[str, Node], at: str) -> None:
    """Writes a oneOf whose schemas exclude each other as anyOf.

    Raises:
        UserError: two of them may both fit.
    """
    options = node.pop("oneOf")
    for i, one in enumerate(options):
        for j, other in enumerate(options[:i]):
            if not _exclusive(_followed(one, made), _followed(other, made)):
                raise UserError(
                    f"{at}/oneOf: {j} and {i} may both fit: expected anyOf, or schemas that exclude each other by type "
                    "or by a required property with const or enum"
                )
    if "anyOf" in node:
        node.setdefault("allOf", []).append({"anyOf": options})
    else:
        node["anyOf"] = options


def _followed(schema: Node, made: Mapping[str, Node]) -> Node:
    """What a schema that is a reference refers to."""
    seen: set[str] = set()
    while isinstance(schema, Mapping) and set(schema) == {"$ref"} and schema["$ref"] not in seen:
        seen.add(schema["$ref"])
        schema = made[_name(schema)]
    return schema


def _exclusive(one: Node, other: Node) -> bool:
    """Whether no value fits both, as far as types, values and required properties of one value say."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one is False or other is False
    kinds, theirs = _kinds(one), _kinds(other)
    if not kinds & theirs:
        return True
    values, others = _values(one), _values(other)
    if values is not None and others is not None:
        return not values & others
    if kinds & theirs != {"object"}:
        return False
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    pairs = ((one.get("properties", {}).get(name), other.get("properties", {}).get(name)) for name in shared)
    return any(a is not None and b is not None and _exclusive(a, b) for a, b in pairs)


def _kinds(schema: Mapping[str, Node]) -> set[str]:
    """The types that fit; an integer is a number."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
        return {names.get(type(value), "number") for value in values}
    said = schema.get("type", TYPES)
    return {"number" if kind == "integer" else kind for kind in ([said] if isinstance(said, str) else said)}


def _values(schema: Mapping[str, Node]) -> set[str] | None:
    """The only values that fit, as JSON; None where others may."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return None if values is None else {json.dumps(_plain(value), sort_keys=True) for value in values}


def _plain(value: Node) -> Node:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def pruned(root: Node, made: dict[str, Node]) -> Node:
    """The schema without choices that no value with an end can take: what only ever requires itself is false.

    Changes ``made`` and what is in ``root``.
    """
    known = _settled(made, _ends, False)
    stack = [holder for holder in (root, *made.values()) if isinstance(holder, dict)]
    while stack:
        schema = stack.pop()
        for key, value in schema.items():
            if key in ("const", "enum"):
                continue
            holder, names = (schema, [key]) if _is_one(key, value) else (value, _places(value))
            for name in names:
                if not _ends(holder[name], known):
                    holder[name] = False
                elif isinstance(holder[name], dict):
                    stack.append(holder[name])
    for name in made:
        made[name] = made[name] if known[name] else False
    return _ends(root, known) and root


def _is_one(key: str, value: Node) -> bool:
    """Whether a keyword's value is a schema itself."""
    return isinstance(value, bool | Mapping) and key in ("items", "additionalItems", "additionalProperties")


def _places(value: Node) -> list[Any]:
    """The places of the schemas in a keyword's value."""
    if isinstance(value, dict):
        return list(value)
    return [i for i, one in enumerate(value) if isinstance(one, dict)] if isinstance(value, list) else []


def _ends(schema: Node, known: Mapping[str, bool]) -> bool:
    """Whether a value of this schema has an end, where the definitions have one as far as ``known``."""
    if not isinstance(schema, Mapping):
        return schema is not False
    if "$ref" in schema and not known[_name(schema)]:
        return False
    if not all(_ends(one, known) for one in schema.get("allOf", ())):
        return False
    if not all(any(_ends(one, known) for one in schema[key]) for key in ("anyOf", "oneOf") if key in schema):
        return False
    types = schema.get("type", TYPES)
    types = [types] if isinstance(types, str) else types
    return any(_ends_as(one, schema, known) for one in types)


def _ends_as(kind: str, schema: Mapping[str, Node], known: Mapping[str, bool]) -> bool:
    """The same, of one type."""
    if kind == "object":
        named, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(_ends(named.get(name, rest), known) for name in schema.get("required", ()))
    if kind == "array":
        items = schema.get("prefixItems", schema.get("items", []))
        items = items if isinstance(items, list) else []
        rest = (
            schema.get("items", True)
            if not isinstance(schema.get("items"), list)
            else schema.get("additionalItems", True)
        )
        least = schema.get("minItems", 0)
        return all(_ends(one, known) for one in items[:least]) and (least <= len(items) or _ends(rest, known))
    return True
