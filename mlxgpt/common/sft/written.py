"""Lines about what rows hold and a template does not write, and about the form in which it takes what it writes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.messages import REASONING, reasoning_of
from mlxgpt.common.rows.row import Row, as_messages
from mlxgpt.common.sft.template import Template


def lines(template: Template, rows: Sequence[Row], unrolled: bool = False) -> Iterator[str]:
    """A line for each kind of content that the template leaves out, with the first row that has it.

    ``unrolled``: answers stand behind their generation prompt, with their reasoning where the prompt opens it.
    """
    left_out = set()
    for key, has, without, cure in _KINDS:
        if key == "reasoning" and template.opening:
            if unrolled:
                continue
            cure = (
                "it in answers, so it is not trained on: tune.unroll = true trains it behind the prompt that opens it"
            )
        row = next((as_messages(row) for row in rows if has(row)), None)
        if row is not None and _same(template, row, without(row)):
            left_out.add(key)
            yield f"{row.where}: {key}: {template.name} does not write {cure}"
    called = any("tool_calls" in message for row in rows for message in row.messages)
    if called and "tool_calls" not in left_out:
        form = "JSON text" if template.reads().text_arguments else "objects"
        yield f"tool_calls: {template.name} takes arguments as {form}; rows may have either"


def _same(template: Template, row: Row, other: Row) -> bool:
    """Whether both are rendered the same; a template that refuses one needs what the other lacks, or tune.unroll."""
    last = max(k for k, message in enumerate(row.messages) if message["role"] == "assistant") + 1
    try:
        texts = [template.render(each.messages[:last], each.tools, **each.kwargs) for each in (row, other)]
    except UserError:
        return False
    return texts[0] == texts[1]


def _changed(row: Row, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Row:
    return Row(row.where, messages=tuple(map(change, row.messages)), tools=row.tools, kwargs=row.kwargs)


def _lacking(*keys: str) -> Callable[[Row], Row]:
    """A row without some keys of its messages."""
    return lambda row: _changed(row, lambda message: {k: v for k, v in message.items() if k not in keys})


def _has(key: str) -> Callable[[Row], bool]:
    return lambda row: any(message.get(key) for message in row.messages)


def _role(name: str) -> tuple[Callable[[Row], bool], Callable[[Row], Row]]:
    """Whether a row has a message of the role, and the row with another text in its place."""

    def other(message: dict[str, Any]) -> dict[str, Any]:
        return message | {"content": "another text"} if message["role"] == name else message

    return lambda row: any(m["role"] == name and m["content"] for m in row.messages), lambda row: _changed(row, other)


_KINDS: tuple[tuple[str, Callable[[Row], bool], Callable[[Row], Row], str], ...] = (
    ("tools", lambda row: bool(row.tools), lambda row: Row(row.where, messages=row.messages, kwargs=row.kwargs),
     "them, so they are not trained on"),
    ("tool_calls", _has("tool_calls"), _lacking("tool_calls"), "them, so they are not trained on"),
    ("reasoning", lambda row: any(reasoning_of(message) for message in row.messages), _lacking(*REASONING),
     "it, so it is not trained on; in content, as <think>...</think>, it would be"),
    *((f"role {name}", *_role(name), "it, so the model does not see it") for name in ("system", "developer", "tool")),
)  # fmt: skip
