"""Messages and tools of a chat request, and the form of them that templates read."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.messages import REASONING, read_calls
from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.api.values import NAME, Body, wrong

_MEDIA = ("image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "file")


def _content(value: Any) -> str | list[dict[str, str]]:
    """Text, or a list of text parts, with nothing else in them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong('a text, or a list of parts {"type": "text", "text": ...}')
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _MEDIA:
            raise wrong(f"parts of type text: models here read text, and {kind} is none")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise wrong('parts {"type": "text", "text": ...}')
    return [{"type": "text", "text": part["text"]} for part in value]


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
Content = Annotated[
    Any,
    BeforeValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]}),
]


class CalledFunction(Body):
    """The function of a tool call."""

    name: str
    arguments: str | dict[str, Any] = Field("{}", description="a JSON object, as text")


class Call(Body):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(None, description="null only beside an assistant's tool_calls")
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(
        None, description="an assistant's reasoning; templates decide whether to show it"
    )

    @model_validator(mode="after")
    def _whole(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise wrong(f"text in a message of role {self.role}; found none", "content")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            name = "tool_calls" if self.tool_calls else "reasoning_content"
            raise wrong(f"it in an assistant's message; found role {self.role}", name)
        return self


class Function(Body):
    """A function that the model may call."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON Schema of an object; null: no parameters")
    strict: bool | None = Field(None, description="arguments always follow the schema here")


class Tool(Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


# fields of messages in OpenAI's API that are not honored, and what is wrong with them
_REFUSED = {
    "function_call": "use tool_calls",
    "audio": "models here read text",
    "refusal": "nothing here refuses: give it as content",
}


def as_read(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as templates get them: tool calls with objects as arguments, nothing that is not given.

    Raises:
        ApiError: 400, a call whose arguments are no JSON object, or a field that is not honored.
    """
    made = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        extra = message.model_extra or {}
        for name, cure in _REFUSED.items():
            if extra.get(name):
                raise ApiError(
                    400, f"{where}.{name} is not honored: {cure}", f"{where}.{name}", "unsupported_parameter"
                )
        one: dict[str, Any] = {"role": message.role, "content": "" if message.content is None else message.content}
        one |= {key: extra[key] for key in REASONING if isinstance(extra.get(key), str) and message.role == "assistant"}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                one[name] = value
        if message.tool_calls:
            calls = [call.model_dump(exclude_none=True) for call in message.tool_calls]
            try:
                one["tool_calls"] = read_calls(calls, where)
            except UserError as error:
                raise ApiError(400, str(error), f"{where}.tool_calls", "invalid_value") from None
        made.append(one)
    return made


def without_nulls(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools as they were given, in their order of keys, without what is null."""
    made = []
    for tool in tools:
        function = {key: value for key, value in tool["function"].items() if value is not None}
        made.append({key: value for key, value in tool.items() if value is not None} | {"function": function})
    return made
