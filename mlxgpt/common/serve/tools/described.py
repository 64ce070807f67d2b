"""Calls that a template describes to the model and does not write: by the tags that its text about tools names.

SmolLM3's says that calls stand between <tool_call> and </tool_call>, Granite 3's that a list follows <|tool_call|>.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from mlxgpt.common.serve.tools.shape import ARGS, NAME, Shape, Slot

_TAG = re.compile(r"<\|?(tool_?calls?|function_?calls?)\|?>|\[(TOOL_CALLS)\]", re.IGNORECASE)


def learn(about: str) -> Shape | None:
    """The form that a text about tools names; None where it names none."""
    found = _TAG.search(about)
    if found is None:
        return None
    tag = found.group()
    closing = tag[0] + "/" + tag[1:]
    closed = closing if closing in about else ""
    key = "parameters" if re.search(r'"parameters"\s*:\s*[<a-z]', about) else "arguments"
    listed = not closed or re.search(r"\[\s*\{|JSON list", about[found.end() :][:200]) is not None
    begins, ends = ('[{"name": "', "}]") if listed else ('\n{"name": "', "}\n")
    between = '}, {"name": "' if listed else f"}}\n{closed}\n{tag}\n" + '{"name": "'
    parts = (Slot(NAME), f'", "{key}": ', Slot(ARGS))
    return Shape(tag + begins, parts, between, ends + closed, tag, closed, (("name",), (key,)), listed)


def written(shape: Shape, message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message with its calls as text, for a template that leaves calls out."""
    calls: Sequence[dict[str, Any]] = message.get("tool_calls") or ()
    if not calls:
        return message
    said = [shape.opens]
    for n, call in enumerate(calls):
        function = call.get("function", call)
        said.append(shape.between if n else "")
        for part in shape.parts:
            if isinstance(part, str):
                said.append(part)
            elif part.kind == NAME:
                said.append(function["name"])
            else:
                said.append(json.dumps(function["arguments"], ensure_ascii=False))
    text = "".join([*said, shape.closes])
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    made = {key: value for key, value in message.items() if key != "tool_calls"}
    return made | {"content": f"{content}\n{text}" if content else text}
