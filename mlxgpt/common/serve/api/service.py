"""What each endpoint does with a body that was JSON: plain values in, an Answer or an ApiError out."""

import asyncio
import contextlib
import itertools
import json
import logging
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.api import asked
from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.api.forms import ChatForm, Form, TextForm, dumps
from mlxgpt.common.serve.api.manner import Skills, manner
from mlxgpt.common.serve.api.messages import without_nulls
from mlxgpt.common.serve.api.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
    parse,
)  # fmt: skip
from mlxgpt.common.serve.api.run import Bridge, Disconnected, Run
from mlxgpt.common.serve.api.values import Body
from mlxgpt.common.serve.work import Constraint, Served, Work, Worker

LOG = logging.getLogger("mlxgpt.serve")
KEEP_ALIVE = b": keep-alive\n\n"
CHOICES = 128  # of a request, over all its prompts
_COSTLY = ("tools", "response_format")  # have grammars, which are compiled
_LARGE = 1 << 14  # characters: what is longer is made into tokens beside the event loop
_NAMES = 1000  # unknown fields that are remembered as logged

T = TypeVar("T")


@dataclass
class Answer:
    """What is sent: JSON, or the events of a stream; ``cancel`` ends a stream that nobody reads."""

    body: bytes | AsyncIterator[bytes]
    headers: dict[str, str] = field(default_factory=dict)
    cancel: Callable[[], None] = lambda: None
    tokens: Callable[[], tuple[int, int] | None] = lambda: None  # so far, of prompts and of choices; for the log

    @property
    def streams(self) -> bool:
        """Whether the body is a stream of events."""
        return not isinstance(self.body, bytes)


class Service:
    """The endpoints.

    Args:
        worker: the engine.
        max_prompts: of one request to /v1/completions.
        keep_alive: seconds of silence after which a stream says a comment.
    """

    def __init__(self, worker: Worker, max_prompts: int = 64, keep_alive: float = 5.0) -> None:
        self.worker = worker
        self._max_prompts, self._keep_alive = max_prompts, keep_alive
        self._bridge, self._aside = Bridge(), ThreadPoolExecutor(1, "mlxgpt-tokens")
        self._logged: set[str] = set()
        self._known: dict[str, Skills] = {}
        self._created = int(time.time())

    async def chat(self, given: dict[str, Any], disconnected: Disconnected | None = None) -> Answer:
        """POST /v1/chat/completions.

        Raises:
            ApiError: 400, 404, 429, 500 or 503.
            Gone: the client has left.
        """
        request, unknown = await _parsed(ChatRequest, given)
        served = asked.find(self.worker, request.model)
        found = await self._beside(given, lambda: manner(request, given, self._skills(served)))
        asked.check_prompt(served, found.ids, "messages")
        form = ChatForm(served, found.splitter, _usage(request))
        prompts = [asked.Prompt(found.ids)]
        return await self._answer(request, found.served, prompts, form, unknown, disconnected, found.constrain)

    async def completions(self, given: dict[str, Any], disconnected: Disconnected | None = None) -> Answer:
        """POST /v1/completions; raises what ``chat`` raises."""
        request, unknown = await _parsed(CompletionRequest, given)
        served = asked.find(self.worker, request.model)
        count, n = len(request.prompt), request.n or 1
        if count > self._max_prompts or count * n > CHOICES:
            most = min(self._max_prompts, CHOICES // n)
            raise ApiError(
                400, f"prompt: {count} prompts with n = {n}: expected at most {most}", "prompt", "invalid_value"
            )
        echo = bool(request.echo)
        prompts = await self._beside(given, lambda: _prompts(request, served, echo))
        form = TextForm(served, prompts, count * n, echo, _usage(request))
        return await self._answer(request, served, prompts, form, unknown, disconnected)

    async def tokenize(self, given: dict[str, Any]) -> Answer:
        """POST /tokenize."""
        request, unknown = await _parsed(TokenizeRequest, given)
        served = asked.find(self.worker, request.model)
        ids = await self._beside(given, lambda: _tokenized(request, given, self._skills(served)))
        made: dict[str, Any] = {"model": served.name, "count": len(ids), "max_model_len": served.context, "tokens": ids}
        if request.return_token_strs:
            made["token_strs"] = [served.tokenizer.token_of(i) if served.tokenizer else None for i in ids]
        return Answer(dumps(made).encode(), self._ignored(unknown))

    async def detokenize(self, given: dict[str, Any]) -> Answer:
        """POST /detokenize."""
        request, unknown = await _parsed(DetokenizeRequest, given)
        served = asked.find(self.worker, request.model)
        if served.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer", "model", "invalid_value")
        if request.tokens:
            asked.check_ids(served, request.tokens, "tokens")
        text = await self._beside(given, lambda: asked.text_behind(served, request.tokens, request.add_special_tokens))
        return Answer(
            dumps({"model": served.name, "text": text, "prompt": text, "content": text}).encode(),
            self._ignored(unknown),
        )

    def _skills(self, served: Served) -> Skills:
        return self._known.setdefault(served.name, Skills(served))

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self._model(served) for served in self.worker.served.values()]}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/{id}.

        Raises:
            ApiError: 404.
        """
        return self._model(asked.find(self.worker, name))

    def _model(self, served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "mlxgpt",
            "max_model_len": served.context,
            "parent": served.parent,
            "chat": served.template is not None,
        }

    async def _beside(self, given: dict[str, Any], make: Callable[[], T]) -> T:
        """What ``make`` makes of a request; of a long one beside the event loop, which others need.

        Raises:
            ApiError: 400 for what is wrong for the model's template or tokenizer.
        """
        param = next((name for name in ("messages", "tokens", "text", "content") if name in given), "prompt")
        try:
            if not _is_long(given.get(param)) and not any(given.get(name) for name in _COSTLY):
                return make()
            return await asyncio.get_running_loop().run_in_executor(self._aside, make)
        except UserError as error:
            raise ApiError(400, str(error), param, "invalid_value") from None

    async def _answer(
        self,
        request: Any,
        served: Served,
        prompts: list[asked.Prompt],
        form: Form,
        unknown: list[str],
        disconnected: Disconnected | None,
        constrain: Callable[[], Constraint] | None = None,
    ) -> Answer:
        seed = asked.seed_of(request.seed)

        def works(listener: Callable[[int], Any]) -> list[Work]:
            return asked.works(request, served, prompts, seed, listener, constrain)

        run = Run(self.worker, self._bridge, works)
        headers = {"X-Seed": str(seed), **self._ignored(unknown)}
        if request.stream:
            return Answer(self._events(run, form, _usage(request)), headers, run.cancel, lambda: run.tokens)
        watch = asyncio.ensure_future(disconnected()) if disconnected else None
        try:
            if watch:
                watch.add_done_callback(run.leave)
            async with contextlib.aclosing(run.steps()) as every:
                async for steps in every:
                    for step in steps:
                        form.add(step)
        finally:
            run.cancel()
            if watch:
                watch.cancel()
        return Answer(dumps(form.whole(run)).encode(), headers, tokens=lambda: run.tokens)

    async def _events(self, run: Run, form: Form, usage: bool) -> AsyncIterator[bytes]:
        """The events of a stream; an error is the last."""
        try:
            async with contextlib.aclosing(run.steps(self._keep_alive)) as every:
                async for steps in every:
                    if said := "".join(map(form.chunks, steps)):
                        yield said.encode()
                    elif not steps:
                        yield KEEP_ALIVE
            last = form.usage(run) if usage else ""
            yield f"{last}data: [DONE]\n\n".encode()
        except ApiError as error:
            yield b"data: " + dumps(error.content).encode() + b"\n\n"
        except Exception:  # a fault of ours: the client is told, as it is without a stream
            LOG.exception("a stream broke")
            error = ApiError(500, "the server has a fault; its log says which", code="internal_error")
            yield b"data: " + dumps(error.content).encode() + b"\n\n"

    def _ignored(self, names: list[str]) -> dict[str, str]:
        """The header that names fields that nobody read; each is logged once, those of a request in one line."""
        shown = [name[:80] for name in names[:50]]
        new = [name for name in shown if name not in self._logged][: _NAMES - len(self._logged)]
        if new:
            self._logged.update(new)
            LOG.info("ignored: fields that are not known here: %s", ", ".join(map(json.dumps, new)))
        shown = ", ".join(urllib.parse.quote(name, safe="[]{}$@.:/+*!'()=?&") for name in shown)
        return {"X-Ignored-Fields": shown} if names else {}


M = TypeVar("M", bound=Body)


async def _parsed(model: type[M], given: dict[str, Any]) -> tuple[M, list[str]]:
    """parse(), of a long request beside the event loop."""
    return await asyncio.to_thread(parse, model, given) if _is_long(given) else parse(model, given)


def _is_long(value: Any) -> bool:
    """Whether it has as many characters and values as are not read in the event loop; looks at no more of them."""
    size, left = 0, [value]
    while left and size < _LARGE:
        one = left.pop()
        size += len(one) if isinstance(one, str | list | dict) else 1
        if isinstance(one, dict):
            left += itertools.islice(one.values(), _LARGE)
        elif isinstance(one, list):
            left += one[:_LARGE]
    return size >= _LARGE


def _usage(request: Sampling) -> bool:
    return bool(request.stream_options and request.stream_options.include_usage)


def _prompts(request: CompletionRequest, served: Served, echo: bool) -> list[asked.Prompt]:
    """The prompts in tokens, each of a length that the model reads."""
    made = []
    for number, one in enumerate(request.prompt):
        prompt = asked.text_prompt(served, one) if isinstance(one, str) else asked.ids_prompt(served, one, echo)
        asked.check_prompt(served, prompt.ids, "prompt" if len(request.prompt) == 1 else f"prompt[{number}]")
        made.append(prompt)
    return made


def _tokenized(request: TokenizeRequest, given: dict[str, Any], skills: Skills) -> list[int]:
    """The tokens of a text or of messages."""
    if request.messages is not None:
        return skills.render(request, without_nulls(given.get("tools") or []))
    text = next(one for one in (request.text, request.prompt, request.content) if one is not None)
    prompt = asked.text_prompt(skills.served, text)
    return prompt.ids[prompt.added :] if request.add_special_tokens is False else prompt.ids
