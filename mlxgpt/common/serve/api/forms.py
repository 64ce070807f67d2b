"""Answers as JSON: whole, and as chunks of a stream. What does not change from chunk to chunk is written once."""

import json
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mlxgpt.common.serve.api.asked import Prompt
from mlxgpt.common.serve.api.run import Choice, Run, Step
from mlxgpt.common.serve.api.tokens import Placed, chat_logprobs, placed_prompt, text_logprobs
from mlxgpt.common.serve.tools.shape import Call
from mlxgpt.common.serve.tools.split import Delta, Splitter
from mlxgpt.common.serve.work import Served, Work

text_of = json.encoder.encode_basestring_ascii  # lines of a stream end at \n alone, whatever a client takes for an end


def dumps(value: Any) -> str:
    """JSON in one line, without spaces."""
    return json.dumps(value, separators=(",", ":"))


class Form(Protocol):
    """How an endpoint writes its answers."""

    def chunks(self, step: Step) -> str:
        """A step as events of a stream; '' if there is nothing to say."""
        ...

    def usage(self, run: Run) -> str:
        """The event without choices that has the usage."""
        ...

    def add(self, step: Step) -> None:
        """Takes a step of an answer that is sent whole."""
        ...

    def whole(self, run: Run) -> dict[str, Any]:
        """The answer, when every choice has ended."""
        ...


class _Heads:
    """The parts of an answer that all chunks share."""

    def __init__(self, served: Served, prefix: str, kind: str, chunk: str, usage: bool) -> None:
        self._kind = kind
        self.fixed = {
            "id": f"{prefix}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"fp_{served.digest[:12]}",
        }
        self.head = f'data: {dumps({"object": chunk} | self.fixed)[:-1]},"choices":['
        self.tail = '],"usage":null}\n\n' if usage else "]}\n\n"

    def whole(self, choices: list[dict[str, Any]], run: Run) -> dict[str, Any]:
        return {"object": self._kind, **self.fixed, "choices": choices, "usage": run.usage}

    def usage(self, run: Run) -> str:
        return f'{self.head}],"usage":{dumps(run.usage)}}}\n\n'


class ChatForm:
    """chat.completion, and chat.completion.chunk.

    ``splitter`` makes what takes reasoning and tool calls out of the text of a work's choice; None: all is content.
    """

    def __init__(self, served: Served, splitter: Callable[[Work, int], Splitter] | None, usage: bool) -> None:
        self._served, self._make = served, splitter
        self._heads = _Heads(served, "chatcmpl", "chat.completion", "chat.completion.chunk", usage)
        self._splitters: dict[int, Splitter] = {}
        self._begun: set[int] = set()
        self._said: dict[int, list[Delta]] = defaultdict(list)
        self._placed: dict[int, list[Placed]] = defaultdict(list)

    def _split(self, step: Step) -> list[Delta]:
        """The text in its parts."""
        if self._make is None:
            return [Delta(step.text)] if step.text else []
        if (found := self._splitters.get(step.choice.index)) is None:
            found = self._splitters[step.choice.index] = self._make(step.choice.work, step.choice.index)
        made = found.feed(step.text) if step.text else []
        return [*made, *found.end(step.cut)] if step.reason else made

    def _reason(self, choice: Choice) -> str:
        """Why the answer ended: calls, unless it was cut."""
        found = self._splitters.get(choice.index)
        return "tool_calls" if found and found.calls and choice.reason == "stop" else choice.reason

    def _chunk(self, index: int, delta: str, logprobs: str = "null", reason: str = "null") -> str:
        choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}}}'
        return f"{self._heads.head}{choice}{self._heads.tail}"

    def chunks(self, step: Step) -> str:
        """The role before the first text, the text in its parts, and the reason in a chunk of its own."""
        index, made = step.choice.index, ""
        if step.scores is not None:
            return ""
        if index not in self._begun:
            self._begun.add(index)
            made = self._chunk(index, '{"role":"assistant","content":"","refusal":null}')
        logprobs = dumps(self._logprobs(step.placed)) if step.placed else "null"
        for delta in self._split(step) or [Delta()] * bool(step.placed):
            made += self._chunk(index, _delta(delta), logprobs)
            logprobs = "null"
        if step.reason:
            made += self._chunk(index, "{}", reason=f'"{self._reason(step.choice)}"')
        return made

    def _logprobs(self, placed: Sequence[Placed]) -> dict[str, Any]:
        return {"content": chat_logprobs(self._served.tokenizer, placed), "refusal": None}

    def usage(self, run: Run) -> str:
        """The usage alone."""
        return self._heads.usage(run)

    def add(self, step: Step) -> None:
        """Keeps text and tokens."""
        if step.scores is None:
            self._said[step.choice.index] += self._split(step)
            self._placed[step.choice.index] += step.placed

    def whole(self, run: Run) -> dict[str, Any]:
        """The chat.completion."""
        return self._heads.whole([self._answer(choice) for choice in run.choices], run)

    def _answer(self, choice: Choice) -> dict[str, Any]:
        said = self._said[choice.index]
        content, reasoning = ("".join(getattr(one, name) for one in said) for name in ("content", "reasoning"))
        calls = [_called(one.call) for one in said if one.call]
        message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None if choice.work.logprobs is None else self._logprobs(self._placed[choice.index]),
            "finish_reason": self._reason(choice),
        }


def _called(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta(delta: Delta) -> str:
    """A part of an answer as the delta of a chunk."""
    if delta.call:
        return dumps({"tool_calls": [{"index": delta.index, **_called(delta.call)}]})
    if delta.reasoning:
        return f'{{"reasoning_content":{text_of(delta.reasoning)}}}'
    return f'{{"content":{text_of(delta.content)}}}'


class TextForm:
    """text_completion, whole and in chunks."""

    def __init__(self, served: Served, prompts: Sequence[Prompt], count: int, echo: bool, usage: bool) -> None:
        self._served, self._prompts, self._echo = served, prompts, echo
        self._heads = _Heads(served, "cmpl", "text_completion", "text_completion", usage)
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._logprobs: list[dict[str, list[Any]]] = [
            {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []} for _ in range(count)
        ]

    def _said(self, step: Step) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of a step."""
        choice, tokenizer, text = step.choice, self._served.tokenizer, step.text
        prompt = self._prompts[choice.number]
        if step.scores is not None:
            text = prompt.text if self._echo else ""
            placed, base = placed_prompt(tokenizer, step.scores, prompt.text, prompt.added), 0
        else:
            base = len(prompt.text) if self._echo else 0
            placed = list(step.placed)
            if self._echo and step.end:  # so that the tokens behind the prompt's are as many as were drawn
                placed.append(Placed(step.end, "", choice.size))
        logprobs = None if choice.work.logprobs is None else text_logprobs(tokenizer, placed, base)
        return text, logprobs

    def chunks(self, step: Step) -> str:
        """The echoed prompt, then text; the reason with the last text."""
        text, logprobs = self._said(step)
        if not (text or step.reason or (logprobs and logprobs["tokens"])):
            return ""
        reason = f'"{step.reason}"' if step.reason else "null"
        body = f'"index":{step.choice.index},"text":{text_of(text)},"logprobs":{dumps(logprobs)}'
        return f'{self._heads.head}{{{body},"finish_reason":{reason}}}{self._heads.tail}'

    def usage(self, run: Run) -> str:
        """The usage alone."""
        return self._heads.usage(run)

    def add(self, step: Step) -> None:
        """Keeps text and log-probabilities."""
        text, logprobs = self._said(step)
        self._texts[step.choice.index].append(text)
        for name, values in (logprobs or {}).items():
            self._logprobs[step.choice.index][name] += values

    def whole(self, run: Run) -> dict[str, Any]:
        """The text_completion."""
        choices = [
            {
                "index": choice.index,
                "text": "".join(self._texts[choice.index]),
                "logprobs": None if choice.work.logprobs is None else self._logprobs[choice.index],
                "finish_reason": choice.reason,
            }
            for choice in run.choices
        ]
        return self._heads.whole(choices, run)
