"""Answers held to a schema: valid whatever the model draws, from any tokenizer, the same in both backends."""

import datetime
import enum
import ipaddress
import json
import random
import re
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import numpy as np
import pydantic
import pytest
import tokenizer_folders
from decoding import BACKENDS, make_config
from serving import running, served_model, submit
from test_tokenizer_folders import SHAPES

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.serve.guided import schema as schemas
from mlxgpt.common.serve.guided.guide import Guide
from mlxgpt.common.serve.guided.vocabulary import Vocabulary
from mlxgpt.common.serve.work import Constraint, Served
from mlxgpt.common.tokenizers.char import CharTokenizer
from mlxgpt.common.tokenizers.hf import made_of_bytes
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

PRINTED = "".join(map(chr, range(32, 127))) + "\n"


def tokenizers() -> dict[str, Tokenizer]:
    import tempfile

    made: dict[str, Tokenizer] = {"bytes": made_of_bytes(), "char": CharTokenizer(PRINTED)}
    for name, shape in (("byte-level", "json"), ("sentencepiece", "model, Llama"), ("gaps", "model, Gemma")):
        with tempfile.TemporaryDirectory() as folder:
            made[name] = load_tokenizer(tokenizer_folders.write(SHAPES[shape], Path(folder)))
    return made


TOKENIZERS = tokenizers()


def served(tokenizer: Tokenizer, ends: Any = None) -> Served:
    found = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return Served(
        "tiny", None, tokenizer, None, frozenset(found if ends is None else ends), tokenizer.n_vocab, "0" * 64
    )


BYTES = Guide(served(TOKENIZERS["bytes"]))


def walked(tokenizer: Tokenizer, constraint: Constraint, rng: random.Random, most: int = 3000) -> str:
    """A text that any tokens make that are allowed, closers more often, so that it ends."""
    made: list[int] = []
    closers = [i for i in range(tokenizer.n_vocab) if tokenizer.bytes_of(i)[-1:] in (b'"', b"}", b"]")]
    while not constraint.over:
        allowed = constraint.allowed()
        assert allowed.shape == (tokenizer.n_vocab,) and allowed.dtype == bool and allowed.any()
        few = [i for i in closers if allowed[i]]
        token = rng.choice(few if few and rng.random() < 0.3 else np.flatnonzero(allowed).tolist())
        if token == tokenizer.eos_id:
            break
        constraint.take(token)
        made.append(token)
        assert len(made) < most
    return b"".join(map(tokenizer.bytes_of, made)).decode()


class Color(enum.Enum):
    RED = "red"
    BLUE = 'bl\u00fce "quoted" \\ and\ttab'


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, pydantic.Field(ge=1, le=9)]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    name: Annotated[str, pydantic.Field(min_length=2, max_length=5)]


class Times(pydantic.BaseModel):
    day: datetime.date
    moment: datetime.datetime
    clock: datetime.time
    lasts: datetime.timedelta
    who: uuid.UUID
    where: ipaddress.IPv4Address | ipaddress.IPv6Address


class Everything(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    color: Color
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
    ratio: Annotated[float, pydantic.Field(gt=-1.5, lt=2.25)]
    tags: Annotated[
        list[Annotated[str, pydantic.Field(pattern="^[a-z]{1,6}(-[0-9]+)?$")]], pydantic.Field(max_length=3)
    ]
    maybe: int | None = None
    times: Times | None
    more: dict[str, bool] = {}


class Tree(pydantic.BaseModel):
    """A tree."""

    value: Annotated[int, pydantic.Field(multiple_of=7)]
    children: Annotated[list["Tree"], pydantic.Field(max_length=2)]


def strict(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """As OpenAI's client writes it for ``response_format=Model``."""
    from openai.lib._pydantic import to_strict_json_schema

    return to_strict_json_schema(model)


SCHEMAS: dict[str, Any] = {
    "nested": {
        "type": "object", "required": ["a", "z"], "additionalProperties": False,
        "properties": {
            "a": {"type": "object", "properties": {"b": {"type": "array", "items": {"type": "boolean"}}}},
            "z": {"type": ["string", "null"], "maxLength": 4},
        },
    },
    "bounds": {"type": "array", "minItems": 2, "maxItems": 4,
               "items": {"type": "integer", "minimum": -3, "maximum": 12}},
    "enum": {"enum": ["a", "\u00e9\u4f60\U0001f525", 1, -2.5, None, True, {"x": [1]}, "quote\" \\ \n\u0001"]},
    "const": {"type": "object", "properties": {"k": {"const": {"deep": ["\u2028", 0]}}}, "required": ["k"]},
    "any of": {"anyOf": [{"type": "string", "maxLength": 3},
                         {"type": "object", "properties": {"n": {"type": "null"}}}]},
    "recursion": {
        "$defs": {"node": {"type": "object", "additionalProperties": False, "required": ["v"], "properties": {
            "v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}},
        "$ref": "#/$defs/node",
    },
    "references": {
        "type": "object", "required": ["a/b", "c%d"], "additionalProperties": False,
        "properties": {
            "a/b": {"type": "integer", "exclusiveMinimum": 0},
            "c%d": {"$ref": "#/properties/a~1b", "description": "as the other"},
            "e": {"$ref": "#/definitions/x%20y"},
        },
        "definitions": {"x y": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
    },
    "patterns": {
        "type": "object", "additionalProperties": False, "required": ["a", "b"],
        "properties": {
            "a": {"type": "string", "pattern": "^(foo|ba[rz])\\d{2,3}\\s?[\"\\\\]$"},
            "b": {"type": "string", "pattern": "x{3}", "minLength": 5, "maxLength": 9},
        },
    },
    "formats": {
        "type": "array", "minItems": 9, "maxItems": 9, "items": False,
        "prefixItems": [{"type": "string", "format": name} for name in (
            "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")],
    },
    "numbers": {
        "type": "array", "minItems": 5, "maxItems": 5,
        "prefixItems": [{"type": "number"}, {"type": "number", "minimum": 0.5, "exclusiveMaximum": 0.75},
                        {"type": "integer", "multipleOf": 12}, {"type": "number", "multipleOf": 0.25},
                        {"type": "integer", "minimum": 99, "maximum": 1001}],
    },
    "maps": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3},
    "named by pattern": {"type": "object", "patternProperties": {"^x_[a-z]+$": {"type": "boolean"}}, "maxProperties": 4,
                         "additionalProperties": False},
    "both": {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                       {"properties": {"a": {"minimum": 5}, "b": {"type": "string", "maxLength": 2}},
                        "required": ["b"]}],
             "type": "object"},
    "one of": {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}, {"enum": [None, True]}]},
    "format and pattern": {"type": "string", "format": "date", "pattern": "^2024-02"},
    "strict": strict(Everything),
    "pydantic": Everything.model_json_schema(),
    "tree": Tree.model_json_schema(),
    "anything": True,
    "object": {"type": "object"},
}  # fmt: skip
CLASSES: dict[str, type[pydantic.BaseModel]] = {"strict": Everything, "pydantic": Everything, "tree": Tree}
WIDE = ("enum", "const", "strict", "pydantic")  # with characters that no ASCII has


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_allowed_tokens_make_valid_json(name: str) -> None:
    validator = jsonschema.Draft202012Validator(
        SCHEMAS[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for kind, tokenizer in TOKENIZERS.items():
        # a number has no end of its own, where no token ends texts
        if (kind == "char" and name in WIDE) or (tokenizer.eos_id is None and name in ("anything", "one of")):
            continue
        constrain, rng = Guide(served(tokenizer)).schema(SCHEMAS[name]), random.Random(kind)
        for _ in range(4):
            text = walked(tokenizer, constrain(), rng)
            value = json.loads(text)
            validator.validate(value)
            if name in CLASSES:
                CLASSES[name].model_validate_json(text)
            assert not re.search(r"\s\s|[^:,] |\n", re.sub(r'"(?:[^"\\]|\\.)*"', '""', text))


def written(text: str, constraint: Constraint, tokenizer: Tokenizer = TOKENIZERS["bytes"]) -> str | None:
    """Where a grammar stops a text that is written token by token; None if it may end behind it."""
    for at, token in enumerate(tokenizer.encode(text)):
        if constraint.over or not constraint.allowed()[token]:
            return text[at:]
        constraint.take(token)
    return None if constraint.over else ""


@pytest.mark.parametrize(("schema", "text"), [
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}, '{"a":1}'),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}, '{"a": -12}'),
    ({"type": "array", "items": {"type": "boolean"}}, "[true, false,true]"),
    ({"propertyNames": {"type": "string"}, "additionalProperties": {"format": "password"}}, '{"a":"b"}'),
    ({"const": "\u00e9\n"}, '"\u00e9\\n"'),
    (Everything.model_json_schema(), '{"color": "red", "pet": {"kind": "dog", "name": "ab"}, "ratio": 1, "tags": [], '
                                     '"times": null}'),
])  # fmt: skip
def test_what_fits_can_be_written(schema: Any, text: str) -> None:
    assert written(text, BYTES.schema(schema)()) is None


@pytest.mark.parametrize(("schema", "text", "left"), [
    ({"type": "object"}, " {", " {"),
    ({"type": "object"}, "[", "["),
    ({"type": "object"}, "{  ", "  "),
    ({"type": "object"}, '{"a":  ', " "),
    ({"type": "object"}, '{"a":1,\n', "\n"),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, "{}", "}"),
    ({"type": "integer", "minimum": 10, "maximum": 20}, "21", "1"),
    ({"type": "string", "maxLength": 2}, '"abc', "c"),
    ({"type": "string"}, '"\\ud800', "d800"),
    ({"type": "string"}, '"a\n', "\n"),
    ({"enum": ["red", "blue"]}, '"rex', "x"),
    ({"type": "string", "format": "date"}, '"2023-02-29', "9"),
    ({"type": "object", "additionalProperties": False}, '{"', '"'),
    ({"type": "array", "items": {"type": "number", "exclusiveMaximum": 0}}, "[-0]", "]"),
    ({"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}}, "[0]", "]"),
    ({"type": "array", "items": {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5}}, "[1]", "]"),
    ({"type": "array", "items": {"type": "number", "minimum": -5.5, "exclusiveMaximum": -5}}, "[-5]", "]"),
    ({"type": "integer", "format": "int32"}, "2147483648", "8"),
    ({"type": "integer", "format": "int32", "maximum": 5}, "6", "6"),
    ({"type": "number", "format": "double"}, "1.5e", ""),
    ({"type": "number", "maximum": 3, "exclusiveMaximum": True}, "3", "3"),
    ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"items": {"$ref": "#/$defs/a"}, "minItems": 1,
      "type": "array"}}, "additionalProperties": False}, '{"a', '"a'),
])  # fmt: skip
def test_what_does_not_fit_is_stopped_where_it_leaves(schema: Any, text: str, left: str) -> None:
    assert written(text, BYTES.schema(schema)()) == left


@pytest.mark.parametrize(("schema", "said"), [
    ([], "#: expected a schema (an object, true or false), found a list"),
    ({"type": "objekt"}, "#/type: 'objekt': expected one of null, boolean, integer, number, string, array, object "
                         "(did you mean 'object'?)"),
    ({"properties": {"a/b": {"not": {}}}}, "#/properties/a~1b/not: not supported"),
    ({"if": {}}, "#/if: this keyword is not supported"),
    ({"requred": ["a"]}, "#/requred: this keyword is not supported (did you mean 'required'?)"),
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems: not supported: a grammar cannot compare items"),
    ({"type": "string", "nullable": True}, '#/nullable: not supported: expected "type": ["string", "null"]'),
    ({"x-guidance": {"lenient": True}}, "#/x-guidance: not supported"),
    ({"$defs": {"unused": {"contains": {}}}}, "#/$defs/unused/contains: this keyword is not supported"),
    ({"type": "string", "format": "iri"}, "#/format: 'iri': expected one of date, "),
    ({"$ref": "https://example.com/schema.json"}, "#/$ref: 'https://example.com/schema.json': expected a reference "
                                                  "into this schema"),
    ({"$ref": "#/$defs/lost"}, "#/$ref: '#/$defs/lost': no such place in this schema"),
    ({"$ref": "#name"}, "#/$ref: '#name': expected a path such as #/$defs/name"),
    ({"$ref": "#"}, "#: no value fits"),
    ({"$defs": {"t": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"},
     "#: no value fits"),
    ({"type": "object", "required": ["a"], "properties": {"a": False}}, "#: no value fits"),
    ({"const": [2**53 + 1]}, "#/const: 9007199254740993: more digits than a double holds exactly"),
    ({"minimum": 10**17}, "#/minimum: 100000000000000000: expected at most 1000000000000000"),
    ({"prefixItems": [{"multipleOf": n} for n in (9973, 9967, 9949)]}, "too many large numbers in multipleOf"),
    ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "#: several multipleOf that one value must fit at once"),
    ({"allOf": [{"pattern": f"a.*{c}"} for c in "abcdefg"]}, "#: more than 6 patterns that one value must fit at once"),
    ({"$ref": "#/$defs/d0", "$defs": {
        **{f"d{i}": {"$ref": f"#/$defs/d{i + 1}", "pattern": f"a{i}"} for i in range(9)}, "d9": True}},
     "#: more than 6 patterns that one value must fit at once"),
    ({"type": "string", "pattern": "^[a-z]+( [a-z]+)*$", "minLength": 5000, "maxLength": 9000}, "a pattern is too"),
    ({"oneOf": [{"const": i} for i in range(201)]}, "#/oneOf: 201 schemas, expected at most 200"),
    ({"prefixItems": [{"prefixItems": [{}] * 1500}] * 2}, "#: more than 3000 schemas in one"),
    ({"items": {"minimum": "3"}}, "#/items/minimum: expected a number, found a text"),
    ({"minLength": -1}, "#/minLength: expected a whole number, 0 or more, found -1"),
    ({"enum": []}, "#/enum: expected a list of values, found none"),
    ({"required": "a"}, "#/required: expected a list of names, found 'a'"),
    ({"type": "integer", "multipleOf": 4294967}, "#/multipleOf: 4294967: expected a number over 0 of at most four"),
    ({"multipleOf": 0}, "#/multipleOf: 0: expected a number over 0"),
    ({"type": "number", "minimum": float("nan")}, "#: nan: expected"),
    ({"const": "\ud800"}, "half of a surrogate pair is no character"),
    ({"minProperties": 3, "type": "object"}, "#/minProperties: a grammar cannot count names that differ"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf: 0 and 1 may both fit: expected anyOf"),
    ({"oneOf": [{"enum": [1, 2]}, {"enum": ["a", 2.0]}]}, "#/oneOf: 0 and 1 may both fit"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
    ({"type": "string", "pattern": "^a{5}$", "maxLength": 3}, "Unsatisfiable schema"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable schema"),
    (False, "#: no value fits"),
    ({"description": "x" * schemas.LONGEST}, "#: too large: expected at most 512 KiB of JSON"),
    ({"enum": list(range(schemas.MOST_VALUES + 1))}, "#/enum: more than 10000 values in all enums"),
    ({"properties": {f"k{i}": {} for i in range(401)}}, "#/properties: 401 that may be left out, expected at most 400"),
    ({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for i in range(9)]} for j in range(8)]}, "schema too large"),
])  # fmt: skip
def test_what_cannot_be_enforced_is_refused_by_place_and_name(schema: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        BYTES.schema(schema)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_schema_of_many_levels_is_refused_without_recursion() -> None:
    deep: Any = {"type": "null"}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(UserError, match="#: nested deeper than 100 levels"):
        BYTES.schema(deep)


def test_references_that_multiply_are_cheap() -> None:
    """Each definition refers to the next one twice: 2^60 paths."""
    names = [f"d{i}" for i in range(60)]
    pairs = zip(names, [*names[1:], "end"], strict=True)
    made: dict[str, Any] = {name: {"anyOf": [{"$ref": f"#/$defs/{other}"}] * 2} for name, other in pairs}
    made["end"] = {"const": 1}
    assert written("1", BYTES.schema({"$ref": "#/$defs/d0", "$defs": made})()) is None


def test_long_chains_of_references_do_not_end_the_process() -> None:
    """llguidance follows them by recursion; a stack of 8 MiB is too small for this one."""
    made: dict[str, Any] = {
        f"d{i}": {"properties": {"x": {"items": {"$ref": f"#/$defs/d{i + 1}"}}}} for i in range(980)
    }
    made["d980"] = {"type": "null"}
    assert written("null", BYTES.schema({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/d0"}], "$defs": made})()) is None


def test_bounds_that_no_double_has_are_drawn_in() -> None:
    constrain = BYTES.schema({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1})
    assert written("-1000000000000000", constrain()) is None
    assert written("1000000000000001", constrain()) == "1"


def test_what_the_tokenizer_cannot_write_is_refused() -> None:
    lost = Guide(served(CharTokenizer(PRINTED.replace("{", ""))))
    with pytest.raises(UserError, match=r"char tokenizer cannot write JSON: it has no token for '\{'"):
        lost.json_object()
    guide = Guide(served(TOKENIZERS["char"]))
    with pytest.raises(UserError, match="cannot write 'na\u00efve': it has no token for '\u00ef'"):
        guide.schema({"type": "object", "properties": {"a": {"enum": ["plain", "na\u00efve"]}}})
    with pytest.raises(RunError, match="no token with which the answer can go on"):
        constraint = guide.schema({"type": "string", "pattern": "^a\u00e9$"})()
        for c in '"a':
            constraint.take(ord(c) - 32)
        constraint.allowed()
    with pytest.raises(UserError, match="tiny has no tokenizer"):
        Guide(Served("tiny", None, None, None, frozenset(), 300, "")).json_object()
    Guide(Served("tiny", None, None, None, frozenset(), 300, "")).ready()


def test_a_vocabulary_that_no_grammar_has_room_for_is_a_request_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(*_: Any, **__: Any) -> None:
        raise type("PanicException", (BaseException,), {})("assertion failed: size")

    monkeypatch.setattr("llguidance.LLTokenizer", panics)
    monkeypatch.setattr("llguidance.LLTokenizer.json_slices", list, raising=False)
    guide = Guide(served(CharTokenizer(PRINTED + "\u00a3")))
    guide.ready()
    with pytest.raises(UserError, match="no grammar over this vocabulary: llguidance says: assertion failed: size"):
        guide.json_object()


def test_few_compiled_grammars_are_kept_the_latest() -> None:
    shared = BYTES._shared()
    for i in range(40):
        BYTES.schema({"const": i})
    kept = [*shared._matchers]
    assert len(kept) == 16 and '"const": 39' in kept[-1]
    BYTES.schema({"const": 24})
    assert len(shared._matchers) == 16 and '"const": 24' in [*shared._matchers][-1]


def test_every_end_is_allowed_where_the_answer_may_end_and_nowhere_else() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ends = [tokenizer.encode("%")[0], tokenizer.eos_id, tokenizer.n_vocab - 1]
    constraint = Guide(served(tokenizer, ends)).schema({"type": "integer"})()
    assert not constraint.allowed()[ends].any()
    constraint.take(tokenizer.encode("4")[0])
    assert constraint.allowed()[ends].all() and not constraint.over
    over = Guide(served(tokenizer, ends)).schema({"const": 4})()
    over.take(tokenizer.encode("4")[0])
    assert over.over and np.flatnonzero(over.allowed()).tolist() == sorted(ends)
    over.take(ends[0])  # an end changes nothing
    assert over.over


def test_two_tokens_of_the_same_bytes_are_both_allowed() -> None:
    class Twice(CharTokenizer):
        def bytes_of(self, i: int) -> bytes:
            return super().bytes_of(i - 97 + 2 if 97 <= i < 99 else i)  # 97 and 98 are " and #, too

    tokenizer = Twice(PRINTED + "\u0400\u0401\u0402\u0403")
    constraint = Guide(served(tokenizer)).schema({"const": "#"})()
    assert np.flatnonzero(constraint.allowed()).tolist() == [2, 97]
    constraint.take(97)
    assert np.flatnonzero(constraint.allowed()).tolist() == [3, 98]
    constraint.take(98)
    constraint.take(2)
    assert constraint.over


def test_special_tokens_and_broken_characters_are_no_part_of_a_text() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    constraint = Guide(served(tokenizer, [])).schema({"type": "string"})()
    constraint.take(tokenizer.encode('"')[0])
    allowed = constraint.allowed()
    assert all(tokenizer.bytes_of(i).isascii() for i in tokenizer.special)  # text that a string could have
    assert not allowed[list(tokenizer.special)].any()
    one = {tokenizer.bytes_of(i): i for i in range(tokenizer.n_vocab)}
    assert not any(allowed[one[bytes([byte])]] for byte in (0x80, 0xBF, 0xC0, 0xC1, 0xF5, 0xFF, 0x0A, 0x00))
    constraint.take(one[b"\xf0"])
    assert {bytes([b]) for b in range(256) if constraint.allowed()[one[bytes([b])]]} == {
        bytes([b]) for b in range(0x90, 0xC0)
    }


def test_a_special_token_in_a_grammar_is_written_by_its_id() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    special = next(iter(tokenizer.special))
    constraint = Guide(served(tokenizer, [])).grammar(f'start: "a" <[{special}]> "b"')()
    for token in (tokenizer.encode("a")[0], special, tokenizer.encode("b")[0]):
        assert np.flatnonzero(constraint.allowed()).tolist() == [token]
        constraint.take(token)
    assert constraint.over
    with pytest.raises(UserError, match="unknown name"):
        BYTES.grammar("start: a")


@pytest.mark.parametrize("special", [False, True])
def test_a_schema_waits_for_the_end_of_the_reasoning(special: bool) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    closing = next(iter(tokenizer.special)) if special else 0
    tag = tokenizer.token_of(closing) or "" if special else "</think>"
    constraint = Guide(served(tokenizer, [])).schema({"const": [1]}, tag)()
    text = tokenizer.encode("so { \n") + tokenizer.encode(tag) + tokenizer.encode("\n\n[")
    for token in [*text[:-1], tokenizer.encode("[")[0]]:
        assert constraint.allowed()[token]
        constraint.take(token)
    assert not constraint.allowed()[tokenizer.encode("2")[0]]
    for text in ("1", "]"):
        constraint.take(tokenizer.encode(text)[0])
    assert constraint.over


def test_choices_of_one_request_do_not_touch_each_other() -> None:
    constrain = BYTES.schema({"type": "string"})
    one, other = constrain(), constrain()
    one.take(34)
    assert one.allowed()[97] and not other.allowed()[97] and other.allowed()[34]


def test_a_vocabulary_is_read_once_for_all_that_share_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    true = Vocabulary.__init__

    def counted(self: Vocabulary, *given: Any) -> None:
        made.append(1)
        true(self, *given)

    monkeypatch.setattr(Vocabulary, "__init__", counted)
    tokenizer = CharTokenizer(PRINTED + "\u20ac")
    for ends in ([], [], [5]):  # of the last, a token more is no text
        Guide(served(tokenizer, ends)).ready()
        Guide(served(tokenizer, ends)).json_object()
    assert made == [1, 1]


ENGINE_SCHEMAS = ("nested", "enum", "patterns", "tree", "references")


def drawn_by(backend: str, tokenizer: Tokenizer) -> list[tuple[list[int], str, str]]:
    """Tokens, text and reason of an answer to each schema, drawn at temperature 2 in one batch."""
    config = make_config("llama", vocab_size=tokenizer.n_vocab, block_size=128)
    ends = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    with running(backend, lambda: served_model(backend, config, tokenizer=tokenizer, ends=ends), max_batch=8) as engine:
        served = engine.served["tiny"]
        guide, answers = Guide(served), []
        for number, name in enumerate(ENGINE_SCHEMAS):
            sample = SampleConfig(max_tokens=100, temperature=2.0, seed=number)
            constrain = guide.schema(SCHEMAS[name])
            answers.append(submit(engine, served, [5, 6, number], sample, constrain=constrain, copies=(0, 1)))
        return [
            (answer.wait().tokens[choice], answer.texts[choice], answer.reasons[choice] or answer.errors[choice])
            for answer in answers
            for choice in (0, 1)
        ]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "bytes"])
def test_both_backends_draw_the_same_valid_answers(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    theirs = [drawn_by(backend, tokenizer) for backend in BACKENDS]
    assert theirs[0] == theirs[-1]
    complete = 0
    for (tokens, text, reason), name in zip(theirs[0], [name for name in ENGINE_SCHEMAS for _ in (0, 1)], strict=True):
        assert reason in ("stop", "eos", "length") and len(tokens) <= 100
        assert text == b"".join(map(tokenizer.bytes_of, tokens)).decode("utf-8", "replace")
        if reason != "length":
            jsonschema.validate(json.loads(text), SCHEMAS[name])
            complete += 1
    assert complete >= 4
