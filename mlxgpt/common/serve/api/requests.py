"""What requests may say: the models that check them, and that /openapi.json is made from.

A field that nobody knows is kept aside and named to the client; a field of OpenAI's or vLLM's API that would change the
answer and is not honored here is refused (known.py).
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator

from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.api.known import check_known
from mlxgpt.common.serve.api.messages import Message, Tool
from mlxgpt.common.serve.api.values import (
    CHOICES,
    NAME,
    SEEDS,
    TOP,
    Bias,
    Body,
    Float,
    Ids,
    Prompts,
    Stop,
    Whole,
    wrong,
)  # fmt: skip

_REST = "default: what the context leaves"


class StreamOptions(Body):
    """What a stream says besides."""

    include_usage: bool | None = Field(None, description="a last chunk without choices has the usage")


class JsonSchema(Body):
    """The schema of an answer."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="default: any object")
    strict: bool | None = Field(None, description="answers always follow the schema here")


class ResponseFormat(Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise wrong('{"name": ..., "schema": ...} with type json_schema; found none', "json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise wrong(f"it only with type json_schema; found type {self.type}", "json_schema")
        return self


def _choice(value: Any) -> str | tuple[str]:
    """none, auto, required, or the name of a function, in a tuple."""
    if value in ("none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return (function["name"],)
    raise wrong('none, auto, required, or {"type": "function", "function": {"name": ...}}')


_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
ToolChoice = Annotated[
    Any,
    BeforeValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED]}),
]


class Sampling(Body):
    """What chat and completions have in common."""

    model: str | None = Field(None, description="a name of /v1/models; default: the base")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    temperature: Float | None = Field(None, ge=0, le=2, description="default 1; 0: always the likeliest token")
    top_p: Float | None = Field(None, gt=0, le=1, description="default 1")
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), Whole] | None = Field(
        None, description="default 0; 0 and -1: all"
    )
    min_p: Float | None = Field(None, ge=0, le=1, description="default 0")
    repetition_penalty: Float | None = Field(None, ge=0.01, le=100, description="default 1, which is none")
    presence_penalty: Float | None = Field(None, ge=-2, le=2, description="default 0")
    frequency_penalty: Float | None = Field(None, ge=-2, le=2, description="default 0")
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES), Whole] | None = Field(None, description="default 1")
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1]), Whole] | None = Field(
        None, description="default: drawn, see X-Seed; below 0: that much below 2^64"
    )
    logit_bias: Bias | None = None
    user: str | None = Field(None, description="read by nobody")

    @model_validator(mode="after")
    def _streams(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise wrong("it only with stream = true; found it without", "stream_options")
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=1), Whole] | None = Field(None, description=f"of the answer; {_REST}")
    max_completion_tokens: Annotated[int, Field(ge=1), Whole] | None = Field(
        None, description="the same under its newer name"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP), Whole] | None = Field(None, description="only with logprobs")
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = Field(None, description="default auto with tools, else none")
    parallel_tool_calls: bool | None = Field(None, description="default true; false: at most one call")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="values that the model's template reads")
    reasoning_effort: str | None = Field(None, description="where the model's template reads it; else refused")

    @model_validator(mode="after")
    def _whole(self) -> "ChatRequest":
        if None not in (both := {self.max_tokens, self.max_completion_tokens}) and len(both) > 1:
            raise wrong(f"max_completion_tokens to be the same, or one of them; found {both}", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("it only with logprobs = true; found it without", "top_logprobs")
        names = [tool.function.name for tool in self.tools or []]
        if len(names) > len(set(names)):
            raise wrong(f"names of their own; found {', '.join(names)}", "tools")
        asks = isinstance(self.tool_choice, tuple) or self.tool_choice == "required"
        if asks and not names:
            raise wrong("tools beside it; found none", "tool_choice")
        if isinstance(self.tool_choice, tuple) and self.tool_choice[0] not in names:
            raise wrong(f"one of {', '.join(names)}; found {self.tool_choice[0]}", "tool_choice")
        return self

    @property
    def limit(self) -> int | None:
        """The tokens that an answer may have."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to name; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0), Whole] | None = Field(
        None, description=f"of a choice; {_REST}; 0: nothing is drawn"
    )
    echo: bool | None = Field(None, description="the prompt before the text, and in logprobs")
    logprobs: Annotated[int, Field(ge=0, le=TOP), Whole] | None = Field(
        None, description="the likeliest tokens to name at each place"
    )
    best_of: Annotated[int, Field(ge=1, le=CHOICES), Whole] | None = Field(
        None, description="only as n: nothing is drawn to be thrown away"
    )

    @model_validator(mode="after")
    def _whole(self) -> "CompletionRequest":
        if self.best_of not in (None, 1, self.n):
            raise wrong(
                f"n, which is {self.n or 1}; found {self.best_of}: nothing is drawn to be thrown away", "best_of"
            )
        return self

    @property
    def limit(self) -> int | None:
        """The tokens that a choice may have."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to name; None: no log-probabilities."""
        return self.logprobs


class TokenizeRequest(Body):
    """POST /tokenize."""

    model: str | None = None
    text: str | None = Field(None, description="read as /v1/completions reads a prompt")
    prompt: str | None = Field(None, description="the same, as vLLM calls it")
    content: str | None = Field(None, description="the same, as llama.cpp calls it")
    messages: list[Message] | None = Field(None, min_length=1, description="read as /v1/chat/completions reads them")
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = Field(None, description="default true: what begins a text, such as <s>")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _whole(self) -> "TokenizeRequest":
        given = [name for name in ("text", "prompt", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise wrong(f"text or messages, one of them; found {' and '.join(given) or 'neither'}")
        if self.messages is None and (self.tools or self.chat_template_kwargs):
            raise wrong("messages beside it; found none", "tools" if self.tools else "chat_template_kwargs")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids
    add_special_tokens: bool | None = Field(None, description="default true: what begins a text is left out again")


M = TypeVar("M", bound=Body)


def parse(model: type[M], given: dict[str, Any]) -> tuple[M, list[str]]:
    """The request, and the names of fields that nobody here knows.

    Raises:
        ApiError: 400, names the field.
    """
    try:
        made = model.model_validate(check_known(model.__name__, given))
    except ValidationError as error:
        raise _as_api(error) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    return made, sorted(set(_unknown(made)))


def _as_api(error: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in (*first["loc"], *filter(None, [first.get("ctx", {}).get("param")])):
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    found, said = repr(first["input"]), first["msg"][:1].lower() + first["msg"][1:]
    said = f"{path}: {said}" if path else said
    message = said
    if first["type"] != "missing" and "found" not in said:
        message += f", found {found if len(found) < 60 else found[:57] + '...'}"
    return ApiError(400, message, path or None, "invalid_value", logged=said)


def _unknown(model: BaseModel, path: str = "") -> Iterator[str]:
    """Names of the fields that were not read, those of objects inside behind a dot."""
    yield from (path + name for name in model.model_extra or ())
    for name in model.model_fields_set & type(model).model_fields.keys():
        value = getattr(model, name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, BaseModel):
                yield from _unknown(each, f"{path}{name}.")
