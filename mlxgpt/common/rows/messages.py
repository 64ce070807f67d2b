"""Messages and tools of a row, in one form: roles and keys of other tools' rows become OpenAI's.

A message has ``role``, ``content`` (text, or a list of text parts) and what templates read beside them: ``tool_calls``
whose arguments are objects, ``tool_call_id``, ``name``, and reasoning under one of REASONING.
"""

import json
from typing import Any

from mlxgpt.common.data.corpus import parse_json
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.values import list_at, shown, string_at, unicode

ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # ShareGPT: its value is the call
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
REASONING = ("reasoning_content", "thinking", "reasoning", "thought")  # the first is what most templates read

Message = dict[str, Any]


def read_messages(row: dict[str, Any], key: str, where: str) -> tuple[tuple[Message, ...], tuple[bool, ...]]:
    """The messages at ``key``, and of each whether it is trained on.

    Raises:
        UserError: names the message and the key that is not as expected.
    """
    made, train = [], []
    for number, message in enumerate(list_at(row, key, where), 1):
        place = f"{where}: message {number}" if key == "messages" else f"{where}: {key}: message {number}"
        message = _as_role_and_content(message, place)
        weight = _weight(message, place)
        train.append(message["role"] == "assistant" if weight is None else weight)
        made.append(_checked(message, place))
    return tuple(made), tuple(train)


def reasoning_of(message: Message) -> str | None:
    """The reasoning of a message, under whichever name."""
    found = [message[name] for name in REASONING if message.get(name) is not None]
    return next((each for each in found if each), found[0]) if found else None


def text_of(content: Any) -> str:
    """The text of a message's content; parts follow each other as they are."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _as_role_and_content(message: object, place: str) -> Message:
    """A message under the keys role and content; keys whose value is null are dropped, as transformers drops them."""
    if not isinstance(message, dict):
        raise UserError(f"{place} is {shown(message)}: expected an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        if "value" not in message:
            raise UserError(f"{place}: no key 'value': found {', '.join(map(repr, message))}")
        names = {"from": "role", "value": "content"}
        message = {names.get(str(key), str(key)): value for key, value in message.items()}
    if "role" not in message:
        raise UserError(f"{place}: no key 'role': found {', '.join(map(repr, message)) or 'nothing'}")
    role = message["role"]
    if role == "function_call":
        message["tool_calls"] = _sharegpt_calls(message.pop("content", ""), place)
    if not isinstance(role, str) or _ALIASES.get(role, role) not in ROLES:
        known = ", ".join((*ROLES, *_ALIASES))
        raise UserError(f"{place}: unknown role {role!r}: expected one of {known}")
    message["role"] = _ALIASES.get(role, role)
    return message


def _sharegpt_calls(value: object, place: str) -> list[Any]:
    """The calls of a function_call turn: JSON of {name, arguments}, or a list of them."""
    called = parse_json(value, f"{place}: function_call") if isinstance(value, str) else value
    calls = called if isinstance(called, list) else [called]
    for call in calls:
        if not isinstance(call, dict) or "name" not in call:
            raise UserError(f"{place}: function_call is {shown(value)}: expected JSON with name and arguments")
    return calls


def _weight(message: Message, place: str) -> bool | None:
    """What ``weight``, ``train`` and ``loss`` say; None where none is there. They are taken out of the message.

    OpenAI's rows have ``weight``, axolotl's ``train`` and ms-swift's ``loss``.
    """
    said: dict[str, bool] = {}
    for key, of in (("weight", "0 or 1"), ("train", "true or false"), ("loss", "true or false")):
        if key not in message:
            continue
        value = message.pop(key)
        if isinstance(value, bool) == (key == "weight") or value not in (0, 1):
            raise UserError(f"{place}: {key} is {shown(value)}: expected {of}")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise UserError(f"{place}: {' and '.join(said)} contradict each other: expected one of them")
    found = next(iter(said.values()), None)
    if found and message["role"] != "assistant":
        key = next(iter(said))
        raise UserError(
            f"{place}: {key} = {'1' if key == 'weight' else 'true'} of a {message['role']}: only the assistant's turns "
            "are trained on: expected none (tune.train_on_prompt = true trains on everything)"
        )
    return found


def _checked(message: Message, place: str) -> Message:
    """A message whose values have the types that templates expect."""
    assistant = message["role"] == "assistant"
    if assistant and "function_call" in message:  # OpenAI's form before tool_calls
        call = message.pop("function_call")
        if not isinstance(call, dict):
            raise UserError(f"{place}: function_call is {shown(call)}: expected an object with name and arguments")
        message.setdefault("tool_calls", [call])
    if not message.get("tool_calls", True):
        del message["tool_calls"]  # an empty list, which some templates take for calls
    if isinstance(message.get("content"), list):
        message["content"] = _parts(message["content"], place)
        if assistant and "tool_calls" not in message and not text_of(message["content"]).strip():
            raise UserError(f"{place}: content is empty: expected text")
    elif not assistant or "tool_calls" not in message:
        string_at(message, "content", place, empty=not assistant)
    elif not isinstance(message.get("content", ""), str):
        raise UserError(f"{place}: content is {shown(message['content'])}: expected text, or a list of text parts")
    _check_reasoning(message, place)
    if "tool_calls" in message:
        message["tool_calls"] = read_calls(message["tool_calls"], place)
    unicode(json.dumps(message, ensure_ascii=False), place)
    return message


def _parts(parts: list[Any], place: str) -> list[Any]:
    for number, part in enumerate(parts, 1):
        where = f"{place}: content part {number}"
        if not isinstance(part, dict):
            raise UserError(f'{where} is {shown(part)}: expected {{"type": "text", "text": ...}}')
        kind = part.get("type", "text" if "text" in part else None)
        if kind != "text":
            cure = "its text under the message's key reasoning_content" if kind == "thinking" else "text parts alone"
            raise UserError(f"{where}: type {kind!r}: expected {cure}: models here read text")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where}: text is {shown(part.get('text'))}: expected a string")
    return [{"type": "text", **part} for part in parts]


def _check_reasoning(message: Message, place: str) -> None:
    found = {name: message[name] for name in REASONING if name in message}
    for name, value in found.items():
        if not isinstance(value, str):
            raise UserError(f"{place}: {name} is {shown(value)}: expected a string")
        if value and message["role"] != "assistant":
            raise UserError(f"{place}: {name} of a {message['role']}: expected it in the assistant's turns")
    if len({value for value in found.values() if value}) > 1:
        raise UserError(f"{place}: {' and '.join(found)} differ: expected the reasoning once")


def read_calls(calls: object, place: str) -> list[Any]:
    """Tool calls in OpenAI's form, their arguments as objects."""
    if isinstance(calls, str) and calls.lstrip().startswith("["):
        calls = parse_json(calls, f"{place}: tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{place}: tool_calls is {shown(calls)}: expected a list of objects")
    return [_call(call, f"{place}: tool_calls[{number}]") for number, call in enumerate(calls)]


def _call(call: Message, where: str) -> Message:
    bare = "function" not in call
    function = {key: call[key] for key in ("name", "arguments") if key in call} if bare else call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} is {shown(call)}: expected a function with name and arguments")
    arguments, where = function.get("arguments"), f"{where}.function.arguments"
    if isinstance(arguments, str):
        arguments = parse_json(arguments, where) if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, dict):
        raise UserError(f"{where} is {shown(arguments)}: expected a JSON object, as text or as it is")
    if bare:
        call = {"type": "function", **{key: value for key, value in call.items() if key not in function}}
    return call | {"function": function | {"arguments": arguments or {}}}


def read_tools(row: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The tools of a row: objects, or JSON text of each or of all; ``functions`` are OpenAI's form before ``tools``."""
    key = "tools" if row.get("tools") or not row.get("functions") else "functions"
    tools: Any = row.get(key) or []
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: {key}") if tools.strip() else []
    if isinstance(tools, list):
        tools = [parse_json(tool, f"{where}: {key}") if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: {key} is {shown(tools)}: expected a list of objects")
    return tuple({"type": "function", "function": tool} if key == "functions" else tool for tool in tools)


def read_kwargs(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row's chat_template_kwargs, as trl's rows have them."""
    kwargs = row.get("chat_template_kwargs") or {}
    if isinstance(kwargs, str):
        kwargs = parse_json(kwargs, f"{where}: chat_template_kwargs")
    if not isinstance(kwargs, dict):
        raise UserError(f"{where}: chat_template_kwargs is {shown(kwargs)}: expected an object")
    return kwargs
