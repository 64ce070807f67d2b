"""How an answer may look, and how it is read: JSON, calls of tools, and reasoning, as the model's template has them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.api.messages import as_read, without_nulls
from mlxgpt.common.serve.api.requests import ChatRequest, TokenizeRequest
from mlxgpt.common.serve.guided.guide import Guide
from mlxgpt.common.serve.tools.format import ToolFormat, check_results
from mlxgpt.common.serve.tools.reasoning import Reasoning
from mlxgpt.common.serve.tools.split import Splitter
from mlxgpt.common.serve.work import Constraint, Served, Work

_SCHEMA = "response_format.json_schema.schema"
_TAIL = 32  # tokens at the end of a prompt that could open a reasoning
_NOT_VALUES = ("generation", "typed", "marks")  # keywords of Template.encode

T = TypeVar("T")


class Skills:
    """What a served model's template can; found out when it is first asked for."""

    def __init__(self, served: Served) -> None:
        self.served = served

    @functools.cached_property
    def reasoning(self) -> Reasoning | None:
        """What encloses an answer's reasoning."""
        return Reasoning.of(self.served.template) if self.served.template else None

    @functools.cached_property
    def _format(self) -> ToolFormat | UserError:
        assert self.served.template is not None
        try:
            return ToolFormat.learn(self.served.template)
        except UserError as error:
            return error

    def tools(self) -> ToolFormat:
        """How the template writes tools.

        Raises:
            ApiError: 400, it writes none.
        """
        if isinstance(self._format, UserError):
            raise ApiError(400, str(self._format), "tools", "unsupported_parameter")
        return self._format

    def render(self, request: ChatRequest | TokenizeRequest, tools: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens of messages, up to where the answer begins.

        Raises:
            ApiError: 400, of the fields.
            UserError: the template refuses the messages, or a character has no token.
        """
        template = self.served.template
        if template is None:
            message = (
                f"model {self.served.name!r} has no chat template: expected /v1/completions, a model that /v1/models "
                "lists with chat, or a server with --template FILE"
            )
            raise ApiError(400, message, "messages", "invalid_value")
        values = dict(request.chat_template_kwargs or {})
        self._check_values(values, "chat_template_kwargs")
        if effort := getattr(request, "reasoning_effort", None):
            self._check_values({"reasoning_effort": effort}, "reasoning_effort")
            values["reasoning_effort"] = effort
        messages = as_read(request.messages or [])
        check_results(messages)
        if tools:
            messages = self.tools().fitted(messages)
        elif any("tool_calls" in message for message in messages) and not isinstance(self._format, UserError):
            messages = self._format.fitted(messages)
        return template.encode(messages, tools, generation=True, typed=True, **values)

    def _check_values(self, values: dict[str, Any], param: str) -> None:
        assert self.served.template is not None
        try:
            self.served.template.check_kwargs(values, param)
            if wrong := next((name for name in values if name in _NOT_VALUES), None):
                raise UserError(f"{param}: {wrong}: it cannot be given")
        except UserError as error:
            said = str(error).removeprefix(f"{param}: ") if param in values else str(error)
            raise ApiError(400, said, param, "unsupported_parameter") from None


@dataclass(frozen=True)
class Manner:
    """How the answers of a chat request are drawn and read."""

    served: Served  # ends where an answer of calls may end, too
    ids: list[int]  # of the prompt
    constrain: Callable[[], Constraint] | None
    splitter: Callable[[Work, int], Splitter] | None  # of a work's choice; None: all text is content


def manner(request: ChatRequest, given: dict[str, Any], skills: Skills) -> Manner:
    """The prompt of a chat request, and how its answers are drawn and read.

    Raises:
        ApiError: 400, of the fields.
        UserError: the template refuses the messages.
    """
    tools = [] if request.tool_choice == "none" else without_nulls(given.get("tools") or [])
    ids, served = skills.render(request, tools), skills.served
    assert served.tokenizer is not None
    reasoning = skills.reasoning
    opened = bool(reasoning and reasoning.opened(served.tokenizer.decode(ids[-_TAIL:])))
    behind = reasoning if opened else None
    if not tools:
        constrain = _json(request, Guide(served), behind) if _wants_json(request) else None
        if reasoning is None:
            return Manner(served, ids, constrain, None)
        return Manner(served, ids, constrain, lambda work, choice: Splitter(None, reasoning, opened))
    form = skills.tools()
    served = replace(served, ends=served.ends | set(form.ends))
    parallel = request.parallel_tool_calls is not False
    constrain = _calls(request, tools, form, Guide(served), reasoning, behind)

    def splitter(work: Work, choice: int) -> Splitter:
        id_of = form.id_of(work.sample.seed, ids, work.copies[choice])
        return Splitter(form.shape, reasoning, opened, id_of, tools, parallel)

    return Manner(served, ids, constrain, splitter)


def _calls(
    request: ChatRequest,
    tools: list[dict[str, Any]],
    form: ToolFormat,
    guide: Guide,
    reasoning: Reasoning | None,
    behind: Reasoning | None,
) -> Callable[[], Constraint] | None:
    """What allows the calls that are asked for; or, where the model may choose, calls or JSON; None: anything."""
    parallel, choice = request.parallel_tool_calls is not False, request.tool_choice
    if choice not in (None, "auto"):
        named = choice[0] if isinstance(choice, tuple) else None
        return _parsed(lambda: guide.grammar(form.grammar(tools, named, parallel, behind)), "tools")
    if _wants_json(request):
        first, rest = _parsed(lambda: form.grammar(tools, None, parallel, behind), "tools").split("\n", 1)
        either = f"{first.replace('calls', '(calls | answer)')}\n{rest}"
        return _parsed(lambda: guide.grammar(either, _schema(request)), _SCHEMA)
    if any(tool["function"].get("strict") for tool in tools):
        return _parsed(lambda: guide.grammar(form.strict_grammar(tools, parallel, reasoning)), "tools")
    return None


def _wants_json(request: ChatRequest) -> bool:
    return request.response_format is not None and request.response_format.type != "text"


def _json(request: ChatRequest, guide: Guide, behind: Reasoning | None) -> Callable[[], Constraint]:
    """What allows JSON alone, behind the reasoning that the prompt has opened."""
    return _parsed(lambda: guide.schema(_schema(request), behind.closes if behind else ""), _SCHEMA)


def _schema(request: ChatRequest) -> dict[str, Any]:
    """What the answer must be; any object where nothing is said."""
    kind = request.response_format
    given = kind.json_schema.schema_ if kind and kind.json_schema else None
    return {"type": "object"} if given is None else given


def _parsed(make: Callable[[], T], param: str) -> T:
    """What is made of a grammar.

    Raises:
        ApiError: 400, nothing is.
    """
    try:
        return make()
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param, "invalid_value") from None
