"""Grammars, in llguidance's Lark, of answers that must call tools: what the template writes, with each schema inside.

A control token of the template's literals is asked for as that token (``<[id]>``), never spelled.
"""

import json
from collections.abc import Sequence
from typing import Any

from mlxgpt.common.serve.tools.reasoning import Reasoning
from mlxgpt.common.serve.tools.shape import ARGS, ID, NAME, Shape
from mlxgpt.common.sft.template import Template

# as tojson writes it, which is what a model was trained on
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """Makes the grammars of one template's shape."""

    def __init__(self, shape: Shape, template: Template) -> None:
        self._shape, self._template = shape, template

    def calls(self, tools: Sequence[dict[str, Any]], many: bool, behind: Reasoning | None = None) -> str:
        """One call of the tools, or ``many``; ``behind`` the end of a reasoning that the prompt opened."""
        shape = self._shape
        rules = [self._call(f"f{n}", tool["function"]) for n, tool in enumerate(tools)]
        again = f" ({self._text(shape.between)} call)*" if many and shape.parallel else ""
        start = f"start: {self._text(shape.opens)} call{again} {self._text(shape.closes)}"
        if behind is not None:
            start = start.replace("start: ", "start: thought SPACE ", 1)
            rules += self._thought(behind)
        return "\n".join([start, "call: " + " | ".join(f"f{n}" for n in range(len(tools))), *rules, ""])

    def _thought(self, reasoning: Reasoning) -> list[str]:
        """Any text up to the end of the reasoning."""
        token = self._template.id_of(reasoning.closes)
        made = ["SPACE: /[ \\n]{0,2}/"]
        if token is not None:
            return [*made, f"thought: ANY <[{token}]>", "ANY: /(.|\\n)*/"]
        return [*made, f"thought[lazy]: ANY {_quoted(reasoning.closes)}", "ANY: /(.|\\n)*/"]

    def _text(self, text: str) -> str:
        """A literal: its control tokens as tokens."""
        made, at = [], 0
        for token in self._template.control.all(text):
            place = text.index(token, at)
            made += [_quoted(text[at:place]), f"<[{self._template.id_of(token)}]>"]
            at = place + len(token)
        return " ".join(part for part in [*made, _quoted(text[at:])] if part)

    def _call(self, rule: str, function: dict[str, Any]) -> str:
        """The rule of a call of one function."""
        made = []
        for part in self._shape.parts:
            if isinstance(part, str):
                made.append(self._text(part))
            elif part.kind == NAME:
                made.append(_quoted(function["name"]))
            elif part.kind == ARGS:
                made.append(f"%json {json.dumps(arguments_schema(function) | {'x-guidance': _SPACED})}")
            else:
                made.append("/[a-zA-Z0-9]{9}/" if part.kind == ID else "/[0-9]{1,3}/")
        return f"{rule}: {' '.join(made)}"


def arguments_schema(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: an object of its properties and no others, if it does not say more."""
    given = function.get("parameters") or {}
    return {"type": "object", "properties": {}, "additionalProperties": False} | given


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
