"""What requests.py checks over several fields, as JSON Schema; what it cannot say (equal numbers) is said in words."""

from typing import Any

_NULL: dict[str, Any] = {"type": "null"}
_TRUE: dict[str, Any] = {"const": True}
_SOME: dict[str, Any] = {"type": "array", "minItems": 1}
_NONE: dict[str, Any] = {"anyOf": [_NULL, {"type": "array", "maxItems": 0}]}
_GIVEN: dict[str, Any] = {"not": _NULL}


def _has(**fields: Any) -> dict[str, Any]:
    """Fields that are there, and what they are."""
    return {"properties": fields, "required": list(fields)}


def _may(**fields: Any) -> dict[str, Any]:
    """Fields that are absent or this."""
    return {"properties": fields}


def _only_with(field: str, **others: Any) -> dict[str, Any]:
    return {"anyOf": [_may(**{field: _NULL}), _has(**others)]}


_PROMPTS = ("text", "prompt", "content", "messages")
_STREAMS = _only_with("stream_options", stream=_TRUE)
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "Message": [
        {"anyOf": [_has(content=_GIVEN), _has(role={"const": "assistant"}, tool_calls=_SOME)]},
        {"anyOf": [_has(role={"const": "assistant"}), _may(tool_calls=_NONE, reasoning_content=_NULL)]},
    ],
    "ResponseFormat": [
        {
            "anyOf": [
                _has(type={"const": "json_schema"}, json_schema=_GIVEN),
                _may(type={"enum": ["text", "json_object"]}, json_schema=_NULL),
            ]
        }
    ],
    "ChatRequest": [
        _STREAMS,
        _only_with("top_logprobs", logprobs=_TRUE),
        # both may also be the same number
        {"anyOf": [_may(max_tokens=_NULL), _may(max_completion_tokens=_NULL)]},
        {"anyOf": [_may(tool_choice={"enum": [None, "none", "auto"]}), _has(tools=_SOME)]},
    ],
    "CompletionRequest": [
        _STREAMS,
        # it may also be the same number as n
        {"anyOf": [_may(best_of=_NULL), _may(best_of={"const": 1}, n={"enum": [None, 1]})]},
    ],
    "TokenizeRequest": [
        {"oneOf": [_has(**{one: _GIVEN}) for one in _PROMPTS]},
        {"anyOf": [_has(messages=_GIVEN), _may(tools=_NONE, chat_template_kwargs={"enum": [None, {}]})]},
    ],
}
