"""A JSON Schema as it may be enforced: checked, with what cannot be honored refused by its place and name.

What comes out has no annotations, every referred-to schema flat in ``$defs``, and formats that are patterns where
formats.py has one. llguidance, which ignores words that it does not know and reads no escaped references, gets that.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.serve.guided import formats, relations
from mlxgpt.common.serve.guided.relations import MOST_FACTOR, TYPES

LONGEST = 1 << 19  # bytes of a schema
DEEPEST = 100  # objects and arrays in each other; llguidance's reader has 128
MOST_SCHEMAS = 3_000  # each may be a level of llguidance's recursion: see guide.STACK
MOST_VALUES = 10_000  # of all enums
MOST_OPTIONAL = 400  # properties of an object that may be left out: each is a way to go on
MOST_OPTIONS = 500  # of one anyOf; of oneOf fewer, which are compared two by two
MOST_EXCLUSIVE = 200
MOST_PATTERNS = 100  # of one patternProperties: no two may fit the same name
_PATTERN = 4_096  # characters of a regular expression

_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_ONE = ("items", "additionalItems", "additionalProperties")  # a schema
_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties")
_OTHERS = ("$ref", "const", "enum", "type", "required", "pattern", "format")
ENFORCED = (*_NUMBER, *_COUNTS, *_ONE, *_LIST, *_NAMED, *_OTHERS)
# what describes and restricts nothing
_SAID = frozenset((
    "$schema", "$id", "id", "$comment", "$vocabulary", "title", "description", "default", "examples", "example",
    "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator", "externalDocs",
    "markdownDescription", "propertyOrdering", "xml", "$anchor",
))  # fmt: skip
_DEFINITIONS = ("$defs", "definitions")
_CURES = {
    "nullable": 'expected "type": ["string", "null"] or anyOf with null',
    "uniqueItems": "a grammar cannot compare items; leave it out and check the answer",
    "not": "a grammar cannot say what a value is not; expected what it is",
    "x-guidance": "settings of the grammar are the server's",
}

Node = Any  # of JSON


def enforceable(schema: Node) -> dict[str, Any] | bool:
    """The schema as llguidance enforces it, literally or not at all.

    Raises:
        UserError: what is not a schema, has a keyword that is not enforced, or that no value can satisfy.
    """
    _limit(schema)
    reader = _Reader(schema)
    root = reader.read(schema, "#")
    while reader.pending:
        pointer, name = reader.pending.pop()
        reader.made[name] = reader.read(reader.found[pointer], pointer)
    for at, node in reader.choices:
        relations.as_any_of(node, reader.made, at)
    relations.check_together(root, reader.made)
    root = relations.pruned(root, reader.made)
    if root is False:
        raise UserError("#: no value fits: what is required is false, or refers to itself without another choice")
    if isinstance(root, bool):
        return root
    return {**root, "$defs": reader.made} if reader.made else root


def literals(schema: Node) -> Iterable[str]:
    """The names and texts that an answer may have to write."""
    if isinstance(schema, Mapping):
        yield from schema.get("required", ())
        for key, value in schema.items():
            if key in ("const", "enum"):
                yield from _texts(value)
            elif key in (*_NAMED, "$defs"):
                yield from (text for one in value.values() for text in literals(one))
            else:
                yield from literals(value)
    elif isinstance(schema, list):
        yield from (text for one in schema for text in literals(one))


def _texts(value: Node) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    for one in value if isinstance(value, list) else (*value, *value.values()) if isinstance(value, Mapping) else ():
        yield from _texts(one)


def _limit(schema: Node) -> None:
    """Refuses what is not plain JSON, too deep or too much, without recursion."""
    stack, size = [(schema, 0)], 0
    while stack:
        value, depth = stack.pop()
        if depth > DEEPEST:
            raise UserError(f"#: nested deeper than {DEEPEST} levels")
        size += 8 + (len(value) if isinstance(value, str) else 0)
        if size > LONGEST:
            raise UserError(f"#: too large: expected at most {LONGEST >> 10} KiB of JSON")
        if isinstance(value, Mapping):
            stack += [(one, depth + 1) for pair in value.items() for one in pair]
        elif isinstance(value, list):
            stack += [(one, depth + 1) for one in value]
        elif isinstance(value, str):
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                raise UserError(f"#: {value[:40]!r}: half of a surrogate pair is no character")
        elif not (value is None or isinstance(value, bool | int | float)) or value in (_ENDLESS, -_ENDLESS):
            raise UserError(f"#: {_shown(value)}: expected JSON")
        elif value != value or (isinstance(value, int) and abs(value) > _HUGE):
            raise UserError(f"#: {_shown(value)}: expected a number of at most 300 digits")


_ENDLESS, _HUGE, _EXACT, _LEAST = float("inf"), 10**300, 10**15, 1e-12


class _Reader:
    """One schema on its way: what its references found, and the definitions that they became."""

    def __init__(self, root: Node) -> None:
        self._root, self._schemas, self._values, self._factors = root, 0, 0, 0
        self.found: dict[str, Node] = {}  # by pointer
        self.made: dict[str, Node] = {}  # by name in $defs
        self.pending: list[tuple[str, str]] = []
        self.choices: list[tuple[str, dict[str, Node]]] = []  # schemas with oneOf
        self._names: dict[str, str] = {}

    def read(self, schema: Node, at: str) -> Node:
        """The schema at a pointer."""
        self._schemas += 1
        if self._schemas > MOST_SCHEMAS:
            raise UserError(f"#: more than {MOST_SCHEMAS} schemas in one")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise UserError(f"{at}: expected a schema (an object, true or false), found {_kind(schema)}")
        made: dict[str, Any] = {}
        for key, value in schema.items():
            if key in ENFORCED:
                made[key] = _READ[key](self, value, f"{at}/{_escaped(key)}")
            elif key in _DEFINITIONS:
                self._definitions(value, f"{at}/{key}")
            elif not self._ignored(key, value):
                raise UserError(f"{at}/{_escaped(key)}: {self._refusal(key)}")
        self._fit(made, at)
        return made

    def _ignored(self, key: str, value: Node) -> bool:
        """Whether a keyword restricts nothing, by its name or its value."""
        if key in ("uniqueItems", "nullable") and value is False:
            return True
        if key == "propertyNames" and value in (True, {}, {"type": "string"}):
            return True
        return key in _SAID or (key.startswith("x-") and key != "x-guidance")

    def _refusal(self, key: str) -> str:
        if key in _CURES:
            return f"not supported: {_CURES[key]}"
        return f"this keyword is not supported{nearest(key, ENFORCED)}"

    def _fit(self, made: dict[str, Any], at: str) -> None:
        """What keywords mean together: a format that is a pattern, an object with too much freedom."""
        if (name := made.get("format")) in formats.PATTERNS:
            del made["format"]
            texts = {"pattern": formats.PATTERNS[name]}
            if "pattern" in made:
                made.setdefault("allOf", []).append(texts)
            else:
                made.update(texts)
        if "oneOf" in made:
            self.choices.append((at, made))
        if name in formats.BOUNDS:
            del made["format"]
            if bounds := formats.BOUNDS[name]:
                made["minimum"] = max(made.get("minimum", bounds[0]), bounds[0])
                made["maximum"] = min(made.get("maximum", bounds[1]), bounds[1])
        for bound, edge in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if isinstance(made.get(bound), bool):  # draft 4 has a flag, and the bound beside it
                exclusive = made.pop(bound) and edge in made
                made |= {bound: made.pop(edge)} if exclusive else {}
            value, least = made.get(bound), bound == "exclusiveMinimum"
            if value is not None and made.get("type") != "integer" and float(value).is_integer():
                # llguidance lets such a bound itself through where the other is near, and -0 for less than 0
                inside = value + (_LEAST if least else -_LEAST) * max(1, abs(value))
                made[edge] = (max if least else min)(made.get(edge, inside), inside)
                del made[bound]
        required, named = made.get("required", []), made.get("properties", {})
        optional = len([name for name in named if name not in required])
        if optional > MOST_OPTIONAL:
            raise UserError(f"{at}/properties: {optional} that may be left out, expected at most {MOST_OPTIONAL}")
        if made.get("minProperties", 0) > len(required) + 1:
            raise UserError(
                f"{at}/minProperties: a grammar cannot count names that differ: expected at most one more than required"
            )

    def _definitions(self, value: Node, at: str) -> None:
        """Definitions that nothing refers to are looked at, too."""
        if not isinstance(value, Mapping):
            raise UserError(f"{at}: expected an object of schemas, found {_kind(value)}")
        for name, one in value.items():
            pointer = f"{at}/{_escaped(name)}"
            if pointer not in self.found:
                self.found[pointer] = one
                self._name(pointer)

    def _name(self, pointer: str) -> str:
        if pointer not in self._names:
            self._names[pointer] = str(len(self._names))
            self.pending.append((pointer, self._names[pointer]))
        return self._names[pointer]

    def ref(self, value: Node, at: str) -> str:
        """A reference into this schema."""
        if not isinstance(value, str):
            raise UserError(f"{at}: expected a text, found {_kind(value)}")
        if not value.startswith("#"):
            raise UserError(f"{at}: {_shown(value)}: expected a reference into this schema, such as #/$defs/name")
        node, pointer = self._root, "#"
        parts = unquote(value[1:]).split("/")
        if parts[0]:
            raise UserError(f"{at}: {_shown(value)}: expected a path such as #/$defs/name")
        for part in parts[1:] if value not in ("#", "#/") else []:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, Mapping) and key in node:
                node = node[key]
            else:
                raise UserError(f"{at}: {_shown(value)}: no such place in this schema")
            pointer += f"/{_escaped(key)}"
        self.found[pointer] = node
        return f"#/$defs/{self._name(pointer)}"

    def number(self, value: Node, at: str) -> float:
        """A bound; multipleOf is kept to what an automaton has states for."""
        draft4 = at.endswith(("exclusiveMinimum", "exclusiveMaximum")) and isinstance(value, bool)
        if not draft4 and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{at}: expected a number, found {_kind(value)}")
        if at.endswith("multipleOf"):
            if value <= 0 or relations.factor(value) > MOST_FACTOR:
                raise UserError(f"{at}: {_shown(value)}: expected a number over 0 of at most four digits")
            self._factors += relations.factor(value)
            if self._factors > 2 * MOST_FACTOR:
                raise UserError(f"{at}: too many large numbers in multipleOf")
        elif at.endswith("imum") and not draft4 and abs(value) > _EXACT:
            # a bound that is farther out than doubles are exact is drawn in, which only narrows what may be said
            outer = (value < 0) == at.endswith(("minimum", "exclusiveMinimum"))
            if not outer:
                raise UserError(f"{at}: {_shown(value)}: expected at most {_EXACT}, which a double holds exactly")
            return _EXACT if value > 0 else -_EXACT
        return value

    def count(self, value: Node, at: str) -> int:
        """A number of things; 3.0 is 3."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"{at}: expected a whole number, 0 or more, found {_shown(value)}")
        if value > 1 << 31:
            raise UserError(f"{at}: {value}: expected at most {1 << 31}")
        return value

    def several(self, value: Node, at: str) -> list[Node]:
        """Schemas in a row, at least one."""
        if not isinstance(value, list) or not value:
            raise UserError(f"{at}: expected a list of schemas, found {_kind(value) if value != [] else 'none'}")
        most = {"anyOf": MOST_OPTIONS, "oneOf": MOST_EXCLUSIVE}.get(at.rpartition("/")[2], MOST_SCHEMAS)
        if len(value) > most:
            raise UserError(f"{at}: {len(value)} schemas, expected at most {most}")
        return [self.read(one, f"{at}/{i}") for i, one in enumerate(value)]

    def one(self, value: Node, at: str) -> Node:
        """A schema; of items also a list, as drafts before 2020-12 have it."""
        return self.several(value, at) if isinstance(value, list) and at.endswith("/items") else self.read(value, at)

    def named(self, value: Node, at: str) -> dict[str, Node]:
        """Schemas by name, or by what names match."""
        if not isinstance(value, Mapping):
            raise UserError(f"{at}: expected an object of schemas, found {_kind(value)}")
        if at.endswith("/patternProperties"):
            if len(value) > MOST_PATTERNS:
                raise UserError(f"{at}: {len(value)} patterns, expected at most {MOST_PATTERNS}")
            for pattern in value:
                self.pattern(pattern, at)
        return {name: self.read(one, f"{at}/{_escaped(name)}") for name, one in value.items()}

    def const(self, value: Node, at: str) -> Node:
        """Any value, of whole numbers one that a double holds exactly: llguidance computes with doubles."""
        stack = [value]
        while stack:
            one = stack.pop()
            if isinstance(one, int) and int(float(one)) != one:
                raise UserError(f"{at}: {_shown(one)}: more digits than a double holds exactly")
            stack += one if isinstance(one, list) else one.values() if isinstance(one, Mapping) else ()
        return value

    def enum(self, value: Node, at: str) -> list[Node]:
        """Values, at least one."""
        if not isinstance(value, list) or not value:
            raise UserError(f"{at}: expected a list of values, found {_kind(value) if value != [] else 'none'}")
        self._values += len(value)
        if self._values > MOST_VALUES:
            raise UserError(f"{at}: more than {MOST_VALUES} values in all enums")
        return self.const(value, at)

    def types(self, value: Node, at: str) -> Node:
        """One of the seven, or several."""
        for one in value if isinstance(value, list) and value else [value]:
            if one not in TYPES:
                hint = nearest(one, TYPES) if isinstance(one, str) else ""
                raise UserError(f"{at}: {_shown(one)}: expected one of {', '.join(TYPES)}{hint}")
        return value

    def required(self, value: Node, at: str) -> list[str]:
        """Names."""
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise UserError(f"{at}: expected a list of names, found {_shown(value)}")
        return value

    def pattern(self, value: Node, at: str) -> str:
        """A regular expression; llguidance reads it."""
        if not isinstance(value, str):
            raise UserError(f"{at}: expected a text, found {_kind(value)}")
        if len(value) > _PATTERN:
            raise UserError(f"{at}: {len(value)} characters, expected at most {_PATTERN} of a regular expression")
        return value

    def format(self, value: Node, at: str) -> str:
        """One that a grammar can enforce."""
        if value not in formats.KNOWN:
            hint = nearest(value, formats.KNOWN) if isinstance(value, str) else ""
            raise UserError(f"{at}: {_shown(value)}: expected one of {', '.join(formats.KNOWN)}{hint}")
        return value


_READ: dict[str, Callable[[_Reader, Node, str], Node]] = {
    **dict.fromkeys(_NUMBER, _Reader.number),
    **dict.fromkeys(_COUNTS, _Reader.count),
    **dict.fromkeys(_ONE, _Reader.one),
    **dict.fromkeys(_LIST, _Reader.several),
    **dict.fromkeys(_NAMED, _Reader.named),
    "$ref": _Reader.ref,
    "const": _Reader.const,
    "enum": _Reader.enum,
    "type": _Reader.types,
    "required": _Reader.required,
    "pattern": _Reader.pattern,
    "format": _Reader.format,
}


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _shown(value: Node) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < _HUGE else "a number of many digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: Node) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
