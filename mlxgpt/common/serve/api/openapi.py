"""/openapi.json: what the server takes and gives, from the models that check it."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import mlxgpt
from mlxgpt.common.serve.api.answers import ANSWERS
from mlxgpt.common.serve.api.known import HARMLESS, NOT_HERE
from mlxgpt.common.serve.api.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mlxgpt.common.serve.api.values import ID

_REQUESTS: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_SAID = {
    400: "the request is wrong; param names the field",
    401: "no key, or a wrong one",
    403: "a Host or an Origin that is not of this server",
    404: "no such model, or nothing at this path",
    405: "another method",
    408: "the request came too slowly",
    413: "the body is too long",
    415: "the body is not application/json",
    421: "a Host that is not of this server",
    429: "the queue is full; Retry-After says when to come again",
    431: "the headers are too long",
    500: "the model broke: its logits are not finite, or a fault of the server",
    503: "the server is ending, or its engine died",
}
_EVERY = (400, 401, 403, 404, 405, 408, 421, 431, 500, 503)
_BODY = (413, 415)
_TEXT = {"type": "string"}
_HEADERS = {
    "X-Seed": "the seed that was used; with it, mlxgpt generate writes the same text",
    "X-Ignored-Fields": "fields of the request that nobody read, if there are any",
}

# what requests.py checks over several fields, as JSON Schema; what it cannot say (equal numbers) is said in words
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


def openapi(models: Sequence[str], vocabulary: int = 2**31) -> dict[str, Any]:
    """The document; ``models``: names that requests may give; ``vocabulary``: of all of them."""
    every = [(one, "validation") for one in (*_REQUESTS, *ANSWERS.values())]
    _, made = models_json_schema(every, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = made["$defs"]
    for name, conditions in TOGETHER.items():
        schemas[name]["allOf"] = conditions
    for one in _REQUESTS:
        fields = schemas[one.__name__]["properties"]
        fields["model"] = {"enum": [*models, None], "description": "default: the base, which is the first"}
        for name, (nothing, why) in NOT_HERE.get(one.__name__, {}).items():
            fields.setdefault(name, {"enum": [None, *nothing], "description": f"not honored: {why}"})
        for name in HARMLESS if one.__name__ in NOT_HERE else ():
            fields.setdefault(name, {"description": "read by nobody"})
    chat, text = ("ChatCompletion", "ChatCompletionChunk"), ("Completion", "CompletionChunk")
    named = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    paths = {
        "/v1/chat/completions": {"post": _post("ChatRequest", "chat", "An answer to messages.", *chat)},
        "/v1/completions": {"post": _post("CompletionRequest", "completions", "What follows a text.", *text)},
        "/v1/models": {"get": _get("models", "The base and each adapter.", "Models")},
        "/v1/models/{model}": {"get": _get("model", "One of them.", "Model") | {"parameters": [named]}},
        "/tokenize": {"post": _post("TokenizeRequest", "tokenize", "The tokens of a text or messages.", "Tokenized")},
        "/detokenize": {"post": _post("DetokenizeRequest", "detokenize", "The text of tokens.", "Detokenized")},
        "/health": {"get": _get("health", "Whether the engine lives.", "Health", open=True)},
        "/metrics": {"get": _get("metrics", "Counters, in Prometheus' text form.", "text/plain")},
        "/openapi.json": {"get": _get("openapi", "This document.", "object")},
        "/": {"get": _get("page", "The page to chat with.", "text/html", open=True)},
    }
    schemas = _with_vocabulary(schemas, vocabulary)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlxgpt serve", "version": mlxgpt.__version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "where --api-key-file was given"}
            },
        },
        "security": [{"key": []}, {}],
    }


def _with_vocabulary(schema: Any, vocabulary: int) -> Any:
    """The same with the token ids that there are."""
    if isinstance(schema, dict):
        if schema == ID:
            return schema | {"maximum": vocabulary - 1}
        return {key: _with_vocabulary(value, vocabulary) for key, value in schema.items()}
    return [_with_vocabulary(one, vocabulary) for one in schema] if isinstance(schema, list) else schema


def _ref(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


def _errors(statuses: Sequence[int]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for status in sorted(statuses):
        one: dict[str, Any] = {"description": _SAID[status], "content": {"application/json": _ref("Error")}}
        if status == 429:
            one["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
        made[str(status)] = one
    return made


def _get(name: str, what: str, answer: str, open: bool = False) -> dict[str, Any]:
    """An operation without a body; ``open``: also without a key."""
    content: dict[str, Any] = {"application/json": _ref(answer)} if answer in ANSWERS else {answer: {"schema": _TEXT}}
    if answer == "object":
        content = {"application/json": {"schema": {"type": "object"}}}
    responses = {"200": {"description": what, "content": content}} | _errors(_EVERY)
    return {"operationId": name, "summary": what, "responses": responses} | ({"security": [{}]} if open else {})


def _post(request: str, name: str, what: str, answer: str, chunk: str = "") -> dict[str, Any]:
    """An operation with a body, and a stream of ``chunk`` if it has one."""
    content: dict[str, Any] = {"application/json": _ref(answer)}
    given: dict[str, Any] = {"description": what, "content": content}
    errors = [*_EVERY, *_BODY]
    if chunk:
        about = (
            f"events whose data are {chunk}, or Error as the last, then [DONE]; lines that begin with : are comments"
        )
        content["text/event-stream"] = {"schema": {"description": about}}
        given["headers"] = {key: {"description": why, "schema": _TEXT} for key, why in _HEADERS.items()}
        errors.append(429)
    return {
        "operationId": name,
        "summary": what,
        "requestBody": {"required": True, "content": {"application/json": _ref(request)}},
        "responses": {"200": given} | _errors(errors),
    }
