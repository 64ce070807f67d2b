"""What answers look like: /openapi.json is made from these, and tests hold the answers against them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Reason = Literal["stop", "length", "tool_calls"]


class _Said(BaseModel):
    """An object of an answer; nothing is in it that is not named."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_serialization_defaults_required=False)


class Failure(_Said):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Said):
    """An answer that is an error."""

    error: Failure


class Cached(_Said):
    """Tokens of the prompts that an earlier request had left."""

    cached_tokens: int


class Usage(_Said):
    """Tokens; those that end a text do not count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached


class TopToken(_Said):
    """A token that could have stood here."""

    token: str
    logprob: float
    bytes: list[int] | None


class NamedToken(TopToken):
    """A token of the answer; logprob is the model's own, before penalties, bias and temperature."""

    top_logprobs: list[TopToken]


class ChatLogprobs(_Said):
    """The tokens of a message's content."""

    content: list[NamedToken]
    refusal: None


class Called(_Said):
    """A function and its arguments, JSON as text."""

    name: str
    arguments: str


class ToolCall(_Said):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: Called


class AnswerMessage(_Said):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(_Said):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class _Answer(_Said):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Answer):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class DeltaFunction(_Said):
    """A piece of a call."""

    name: str = ""
    arguments: str = ""


class DeltaCall(_Said):
    """A piece of a call; id, type and name in the first alone."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: DeltaFunction


class Delta(_Said):
    """What a chunk adds to a message."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    reasoning_content: str = ""
    tool_calls: list[DeltaCall] = []


class ChunkChoice(_Said):
    """What a chunk adds to an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatCompletionChunk(_Answer):
    """An event of /v1/chat/completions with stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(_Said):
    """The tokens of a text, each with its place; null for the first of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Said):
    """One continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(_Answer):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(TextChoice):
    """What a chunk adds to a continuation."""

    finish_reason: Literal["stop", "length"] | None  # type: ignore[assignment]


class CompletionChunk(_Answer):
    """An event of /v1/completions with stream."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: Usage | None = None


class Model(_Said):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None
    chat: bool


class Models(_Said):
    """All of them, the base first."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(_Said):
    """The tokens of a text."""

    model: str
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] = []


class Detokenized(_Said):
    """The text of tokens; prompt and content are its names in vLLM and llama.cpp."""

    model: str
    text: str
    prompt: str
    content: str


class Health(_Said):
    """The server answers."""

    status: Literal["ok"]


ANSWERS: dict[str, type[BaseModel]] = {
    made.__name__: made
    for made in (
        ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, Models, Model, Tokenized, Detokenized, Health,
        Error,
    )
}  # fmt: skip


def checked(name: str, value: Any) -> BaseModel:
    """A value as the answer of a name.

    Raises:
        ValidationError: it is not.
    """
    return ANSWERS[name].model_validate(value)
