"""Chat templates as transformers compiles them: jinja2, sandboxed, with {% generation %} and tojson."""

import functools
import json
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

BEGIN, END = "\ufdd0", "\ufdd1"  # noncharacters, around what {% generation %} encloses
ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, RecursionError)
"""What a template may raise for a conversation."""


class _Generation(jinja2.ext.Extension):
    """{% generation %}: what it encloses, between BEGIN and END if the environment has marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}" if getattr(self.environment, "marks", False) else caller()


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(16)
def compiled(source: str, marks: bool) -> jinja2.Template:
    """The template, compiled as transformers does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.extend(marks=marks)
    return environment.from_string(source)


@functools.lru_cache(16)
def tags(source: str) -> frozenset[str]:
    """Names of the block tags in a template."""
    tokens = list(compiled(source, False).environment.lex(source))
    names = [
        next((value for _, kind, value in tokens[n + 1 :] if kind != "whitespace"), "")
        for n, (_, kind, _) in enumerate(tokens)
        if kind == "block_begin"
    ]
    return frozenset(names)


@functools.lru_cache(16)
def literals(source: str) -> str:
    """The text that a template itself writes or compares: its literals, each apart from the next."""
    tree = compiled(source, False).environment.parse(source)
    found = {node.data for node in tree.find_all(nodes.TemplateData)}
    found |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(found))


def said(error: Exception) -> str:
    """An error of jinja in one line."""
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return " ".join(str(error).split())[:200] + line
