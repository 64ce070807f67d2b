"""What a chat template reads of a message: names, and text or parts; messages are given to it in that form.

Nothing is looked up by the model's name: a template is asked by rendering a word that no text contains and looking
whether it is written.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2.meta

from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.rows.messages import REASONING, reasoning_of, text_of

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages], str]

_WORD = "q7kz2b6f"  # that no template writes of its own
_ASKED = {"role": "user", "content": "Hello"}
# what the caller of a template gives it, and arguments of apply_chat_template that are no values of a template
_RESERVED = {
    "messages": "they are the row's",
    "conversation": "messages are the row's",
    "tools": "they are the row's key tools",
    "documents": "no row has them",
    "add_generation_prompt": "it follows from what is rendered",
    "continue_final_message": "it follows from what is rendered",
    "chat_template": "tune.template and chat --template name a template",
    "tokenize": "it is no value of a template",
    "return_dict": "it is no value of a template",
}
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}


class Reads:
    """What a template reads, found by rendering with ``render``."""

    def __init__(self, render: Render) -> None:
        self._render = render

    def _written(self, *messages: dict[str, Any]) -> str:
        """The rendered text; "" where the template refuses the messages."""
        try:
            return self._render(messages)
        except UserError:
            return ""

    @functools.cached_property
    def parts(self) -> bool:
        """Whether content may be a list of parts; a template that prints lists writes Python's form of them."""
        text = self._written({"role": "user", "content": [{"type": "text", "text": _WORD}]})
        return _WORD in text and "'text'" not in text and '"text"' not in text

    @functools.cached_property
    def strings(self) -> bool:
        """Whether content may be text; a template that iterates over parts alone writes nothing of it."""
        return not self.parts or _WORD in self._written({"role": "user", "content": _WORD})

    @functools.cached_property
    def developer(self) -> bool:
        """Whether it writes a developer's message."""
        return _WORD in self._written({"role": "developer", "content": _WORD}, _ASKED)

    @functools.cached_property
    def text_arguments(self) -> bool:
        """Whether a tool call's arguments must be text: the template joins them to others, or prints them."""
        asked, printed = (self._called(given) for given in ({_WORD: 1}, json.dumps({_WORD: 1})))
        return _WORD in printed and (_WORD not in asked or f"{{'{_WORD}': 1}}" in asked)

    def _called(self, arguments: object) -> str:
        call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "search", "arguments": arguments}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        answer = {"role": "tool", "tool_call_id": "a1b2c3d4e", "name": "search", "content": "1"}
        return self._written(_ASKED, message) or self._written(_ASKED, message, answer)

    def fitted(self, messages: Messages) -> list[dict[str, Any]]:
        """``messages`` in the form that the template reads.

        Reasoning stands under every name for it, as in transformers; a list of text parts is joined where the template
        takes text, and text becomes a part where it takes parts alone; arguments of tool calls become JSON text where
        it takes text; a developer is a system where it knows no developer.
        """
        return [self._fitted(message) for message in messages]

    def _fitted(self, message: dict[str, Any]) -> dict[str, Any]:
        reasoning = reasoning_of(message)
        if reasoning is not None:
            own = {name: message[name] for name in REASONING if message.get(name)}
            message = message | dict.fromkeys(REASONING, reasoning) | own | {REASONING[0]: reasoning}
        content = message.get("content")
        if isinstance(content, list) and not self.parts:
            message = message | {"content": text_of(content)}
        elif isinstance(content, str) and not self.strings:
            message = message | {"content": [{"type": "text", "text": content}]}
        if message.get("role") == "developer" and not self.developer:
            message = message | {"role": "system"}
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls and self.text_arguments:
            message = message | {"tool_calls": [_with_text(call) for call in calls]}
        return message


def _with_text(call: Any) -> Any:
    """A tool call whose arguments are JSON text."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("arguments"), (dict, list)):
        return call
    inner = inner | {"arguments": json.dumps(inner["arguments"], ensure_ascii=False)}
    return call | {"function": inner} if "function" in call else inner


def variables(environment: jinja2.Environment, sources: Sequence[str]) -> set[str]:
    """Names of the values that templates read and that no row gives them, such as enable_thinking."""
    found = [jinja2.meta.find_undeclared_variables(environment.parse(source)) for source in sources]
    return {name for names in found for name in names} - _GIVEN


def check_kwargs(kwargs: Mapping[str, Any], known: set[str], where: str) -> None:
    """Refuses what a template would not read.

    Raises:
        UserError: a name that the row or the caller gives, or one that the template does not read.
    """
    for name in kwargs:
        if name in _RESERVED:
            raise UserError(f"{where}: {name}: {_RESERVED[name]}: expected values that the template reads")
        if name not in known:
            reads = ", ".join(sorted(known)) or "no values"
            raise UserError(f"{where}: {name}{nearest(name, known)}: the template does not read it: it reads {reads}")
