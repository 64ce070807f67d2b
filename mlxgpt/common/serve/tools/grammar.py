"""Grammars, in llguidance's Lark, of answers that must call tools: what the template writes, with each schema inside.

A control token of the template's literals is asked for as that token (``<[id]>``), never spelled.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlxgpt.common.serve.guided.schema import enforceable
from mlxgpt.common.serve.tools.reasoning import Reasoning
from mlxgpt.common.serve.tools.shape import ARGS, ID, NAME, Parameters, Shape
from mlxgpt.common.serve.tools.values import resolved, type_of, types_of
from mlxgpt.common.sft.template import Template

# as tojson writes it, which is what a model was trained on
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_KINDS = ("integer", "number", "boolean", "array", "object", "null")
_DEEP = 12  # underscores in a rule's name: what lies deeper is JSON


class Grammar:
    """Makes the grammars of one template's shape."""

    def __init__(self, shape: Shape, template: Template) -> None:
        self._shape, self._template = shape, template

    def calls(self, tools: Sequence[dict[str, Any]], many: bool, behind: Reasoning | None = None) -> str:
        """One call of the tools, or ``many``; ``behind`` the end of a reasoning that the prompt opened."""
        rules = self._calls(tools, many)
        if behind is None:
            return _lines("start: calls", f"calls: {self._text(self._shape.opens)} section", *rules)
        thought = self._upto("thought", behind.closes)
        begins = f"calls: {self._text(self._shape.opens)} section"
        return _lines("start: thought GAP calls", "GAP: /[ \\n]{0,2}/", begins, *thought, *rules)

    def free(self, tools: Sequence[dict[str, Any]], many: bool, reasoning: Reasoning | None = None) -> str:
        """Any text, in which calls of strict functions follow their schemas; also tags of reasoning and content."""
        shape, opens = self._shape, self._shape.opens.lstrip()
        tags = (reasoning.opens, reasoning.closes, *reasoning.around) if reasoning else ()
        ids = dict.fromkeys(token for tag in tags for token in self._special(tag))
        before = f"(TEXT ({' | '.join(f'<[{token}]>' for token in ids)}))*" if ids else ""
        rules = ["TEXT: /(?s:.*)/", *self._calls(tools, many, loose=True)]
        if not shape.mark:
            start = f"start: {before} (PLAIN | {self._text(opens)} section)"
            return _lines(start, "PLAIN: /(?s:\\s*[^\\s{].*)?/", *rules)
        first = next((token for token in self._template.control.leading(opens)[:1] if self._special(token)), shape.mark)
        part = f"part: {before} begins {self._text(opens.removeprefix(first))} section"
        start = f"start: part{'*' if many else '?'} {before} TEXT"
        return _lines(start, part, *self._upto("begins", first), *rules)

    def _calls(self, tools: Sequence[dict[str, Any]], many: bool, loose: bool = False) -> list[str]:
        """The rules of calls behind what opens them; ``loose``: only a strict function's schema counts."""
        shape = self._shape
        again = f" ({self._text(shape.between)} call)*" if many and shape.parallel else ""
        call = "call: " + " | ".join(f"f{n}" for n in range(len(tools)))
        rules = [rule for n, tool in enumerate(tools) for rule in self._call(f"f{n}", tool["function"], loose)]
        return [f"section: call{again} {self._text(shape.closes)}", call, *rules]

    def _special(self, text: str) -> list[int]:
        """The token of a text, if it is one that no other text contains."""
        token = self._template.id_of(text) if text else None
        return [token] if token is not None and token in self._template.tokenizer.special else []

    def _upto(self, rule: str, closes: str) -> list[str]:
        """The rule of any text up to and with what closes it."""
        if token := self._special(closes):
            return [f"{rule}: ANY <[{token[0]}]>", "ANY: /(?s:.*)/"]
        return [f"{rule}[suffix={_quoted(closes)}]: /(?s:.*)/"]

    def _text(self, text: str) -> str:
        """A literal: its control tokens as tokens."""
        made, at = [], 0
        for token in self._template.control.all(text):
            place = text.index(token, at)
            made += [_quoted(text[at:place]), f"<[{self._template.id_of(token)}]>"]
            at = place + len(token)
        return " ".join(part for part in [*made, _quoted(text[at:])] if part)

    def _call(self, rule: str, function: dict[str, Any], loose: bool) -> list[str]:
        """The rules of a call of one function."""
        made, more = [], []
        for part in self._shape.parts:
            if isinstance(part, str):
                made.append(self._text(part))
            elif part.kind == NAME:
                made.append(_quoted(function["name"]))
            elif part.kind != ARGS:
                made.append("/[a-zA-Z0-9]{9}/" if part.kind == ID else "/[0-9]{1,3}/")
            elif self._shape.parameters is None:
                any_object = loose and not function.get("strict")
                made.append(_json({"type": "object"} if any_object else arguments_schema(function)))
            else:
                made.append(f"{rule}_a0")
                more = self._one_by_one(f"{rule}_", self._shape.parameters, arguments_schema(function))
        return [f"{rule}: {' '.join(made)}", *more]

    def _one_by_one(self, prefix: str, form: Parameters, schema: dict[str, Any]) -> list[str]:
        """Rules of arguments in the order of the schema's properties; a0 begins, b1 and so on go on behind another."""
        made: list[str] = []
        properties = schema.get("properties") or {}
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        apart = self._text(form.apart)
        for n, (key, given) in enumerate(properties.items()):
            wanted = given if isinstance(given, dict) else {}
            value, rules = self._value(f"{prefix}v{n}", form, wanted, shared)
            argument = f"{self._text(form.before)} {_quoted(key)} {value} {prefix}b{n + 1}"
            skip = "" if key in (schema.get("required") or ()) else n + 1
            for kind, begins in (("a", ""), ("b", apart)):
                made.append(f"{prefix}{kind}{n}: {begins} {argument}" + (f" | {prefix}{kind}{skip}" if skip else ""))
            made += rules
        return [*made, *(f'{prefix}{kind}{len(properties)}: ""' for kind in "ab")]

    def _value(
        self, rule: str, form: Parameters, given: dict[str, Any], shared: dict[str, Any]
    ) -> tuple[str, list[str]]:
        """What stands behind a key, and its rules: a string as the template writes it, else JSON."""
        deep = rule.count("_")
        given, kinds = resolved(given, shared), types_of(given, shared)
        listed = [given["const"]] if "const" in given else given.get("enum")
        if listed is not None and not any(isinstance(each, dict | list) for each in listed):
            texts = [f"{form.begins(type_of(each))}{_literal(each, form)}{form.after}" for each in listed]
            return rule, [f"{rule}: " + " | ".join(self._text(text) for text in texts)]
        if kinds and kinds <= {"boolean", "null"}:
            words = [
                word for word, kind in zip(form.words, ("boolean", "boolean", "null"), strict=True) if kind in kinds
            ]
            begins = self._text(form.begins(min(kinds)))
            return f"{begins} ({' | '.join(map(_quoted, words))}) {self._text(form.after)}", []
        if kinds and "string" not in kinds:
            begins = form.begins(next(kind for kind in _KINDS if kind in kinds))
            held, rules = self._held(rule, form, given, shared) if deep < _DEEP else (None, [])
            rules = rules if held else [f"{rule}: {_json(given | shared)}"]
            return f"{self._text(begins)} {held or rule} {self._text(form.after)}", rules
        begins, quote = self._text(form.begins("string")), form.quotes[0] if form.quotes else ""
        least, most = given.get("minLength", 0), given.get("maxLength", "")
        if len(quote) == 1:
            inside = f"/([^{quote}\\\\\\x00-\\x1f]|\\\\[{quote}\\\\nt]){{{least},{most}}}/"
            return f"{begins} {_quoted(quote)} {rule} {self._text(quote + form.after)}", [f"{rule}: {inside}"]
        stop = quote + form.after
        made = f"/(?s:.{{{least},{most}}})/"
        if "pattern" in given:
            made = f"{_pattern(given['pattern'])} & {made}"
        term = rule.upper()
        token = next((token for token in self._template.control.all(stop) if self._special(token)), "")
        free = stop[: stop.index(token)] if token else stop
        if not free:
            return f"{begins} {self._text(quote)} {term} {self._text(stop)}", [f"{term}: {made}"]
        return f"{begins} {self._text(quote)} {rule} {self._text(stop.removeprefix(free))}", [
            f"{rule}[suffix={_quoted(free)}]: {made}"
        ]

    def _held(
        self, rule: str, form: Parameters, given: dict[str, Any], shared: dict[str, Any]
    ) -> tuple[str | None, list[str]]:
        """A list or an object whose strings stand between marks of the template's; None for what JSON writes."""
        if not form.quotes or len(form.quotes[0]) == 1:
            return None, []
        inside = replace(form, before="", after="")
        properties, items = given.get("properties"), given.get("items")
        if given.get("type") == "object" and properties:
            rules = self._one_by_one(f"{rule}_", inside, given | shared)
            return f'"{{" {rule}_a0 "}}"', rules
        if given.get("type") == "array" and isinstance(items, dict) and "prefixItems" not in given:
            alone = replace(inside, between=tuple((kind, "") for kind, _ in form.between))
            item, rules = self._value(f"{rule}_i", alone, items, shared)
            least, most = given.get("minItems", 0), given.get("maxItems")
            if most == 0:
                return '"[]"', []
            more = f"({self._text(form.apart)} {item}){{{max(0, least - 1)},{'' if most is None else most - 1}}}"
            return f'"[" ({item} {more}){"" if least else "?"} "]"', rules
        return None, []


def arguments_schema(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: an object of its properties and no others, if it does not say more.

    Raises:
        UserError: what a grammar cannot enforce, by its place.
    """
    given = function.get("parameters") or {}
    made = enforceable({"type": "object", "properties": {}, "additionalProperties": False} | given)
    return made if isinstance(made, dict) else {}


def _lines(*rules: str) -> str:
    return "\n".join([*rules, ""])


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': _SPACED})}"


def _pattern(pattern: str) -> str:
    """A pattern of JSON Schema, which may begin and end anywhere if it does not say, as a terminal."""
    begins = "" if pattern.startswith("^") else "(?s:.*)"
    ends = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inside = pattern.removeprefix("^") if not begins else pattern
    inside = inside[:-1] if not ends else inside
    escaped = re.sub(r"(?<!\\)/", r"\\/", inside)
    return f"/{begins}(?:{escaped}){ends}/"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _literal(value: Any, form: Parameters) -> str:
    """A value as the template writes it."""
    if isinstance(value, str):
        quote = form.quotes[0] if form.quotes else ""
        return f"{quote}{_escaped(value, quote)}{quote}"
    if value is None or isinstance(value, bool):
        return form.words[2] if value is None else form.words[not value]
    return json.dumps(value)


def _escaped(text: str, quote: str) -> str:
    """A string between quotes of one character."""
    if len(quote) != 1:
        return text
    return text.replace("\\", "\\\\").replace(quote, "\\" + quote).replace("\n", "\\n")
