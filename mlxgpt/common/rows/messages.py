"""Messages and tools of a row, as chat templates read them."""

import json
from typing import Any

from mlxgpt.common.data.corpus import parse_json
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.values import shown, string_at, unicode

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def read_messages(messages: list[Any], where: str) -> tuple[dict[str, Any], ...]:
    """Messages as templates read them: keys whose value is null are dropped, as transformers drops them."""
    made = []
    for number, message in enumerate(messages, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{place} is {shown(message)}: expected an object with role and content")
        message = {key: value for key, value in message.items() if value is not None}
        if "role" not in message:
            raise UserError(f"{place}: no key 'role': found {', '.join(map(repr, message)) or 'nothing'}")
        if message["role"] not in ROLES:
            raise UserError(f"{place}: unknown role {message['role']!r}: expected one of {', '.join(ROLES)}")
        if message["role"] != "assistant" or "tool_calls" not in message:
            string_at(message, "content", place, empty=message["role"] != "assistant")
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise UserError(f"{place}: tool_calls is {shown(calls)}: expected a list of objects")
        unicode(json.dumps(message, ensure_ascii=False), place)
        made.append(message)
    if not any(message["role"] == "assistant" for message in made):
        raise UserError(f"{where}: no assistant turn: expected at least one to train on")
    return tuple(made)


def read_tools(row: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools") or []
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: tools is {shown(tools)}: expected a list of objects")
    return tuple(tools)
