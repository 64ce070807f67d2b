"""Requests of every kind with what must come back: of each seeded one what `generate` gives to it alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.serving.load import body_of, events_of
from benchmarks.serving.model import question

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["sea", "hill", "house"]},
                   "marks": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99},
                             "minItems": 1, "maxItems": 4}},
    "required": ["name", "kind", "marks"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name, "description": name, "parameters": SCHEMA}} for name in
         ("measure", "report")]  # fmt: skip


@dataclass
class Choice:
    """What an answer says in one choice."""

    text: str = ""
    reason: str | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)  # names and arguments


@dataclass
class Case:
    """A request, and its answer alone; ``expected`` None: the first answer, that nobody else disturbed, is it."""

    path: str
    body: dict[str, Any]
    expected: list[Choice] | None = None


def choices_of(arrived: Sequence[tuple[float, bytes]]) -> tuple[int, list[Choice], str]:
    """The status, the choices, and what is wrong: an error's text, a stream that does not end as it must."""
    status, pieces = body_of(arrived)
    body = b"".join(piece for _, piece in pieces)
    if status != 200:
        return status, [], body.decode("utf-8", "replace")
    found: dict[int, Choice] = {}
    if not body.startswith((b"data:", b":")):
        for one in json.loads(body)["choices"]:
            message = one.get("message") or one
            made = found.setdefault(one["index"], Choice(message.get("content") or one.get("text") or ""))
            made.reason = one["finish_reason"]
            made.calls = [(call["function"]["name"], call["function"]["arguments"])
                          for call in message.get("tool_calls") or ()]  # fmt: skip
        return status, [found[index] for index in sorted(found)], ""
    events = [event for _, event in events_of(pieces)]
    if not events or events[-1] != b"[DONE]":
        return status, [], f"the stream ended with {events[-1:]}"
    for event in events[:-1]:
        for one in json.loads(event)["choices"]:
            made, delta = found.setdefault(one["index"], Choice()), one.get("delta") or one
            if made.reason is not None:
                return status, [], f"something follows finish_reason: {event[:200]}"
            made.text += delta.get("content") or delta.get("text") or ""
            made.reason = one["finish_reason"]
            for call in delta.get("tool_calls") or ():
                function = call["function"]
                if function.get("name"):
                    made.calls.append((function["name"], ""))
                name, said = made.calls[call["index"]]
                made.calls[call["index"]] = name, said + (function.get("arguments") or "")
    return status, [found[index] for index in sorted(found)], ""


def make(served: Mapping[str, Any], generate: ModuleType, count: int, seed: int = 0) -> list[Case]:
    """Cases of every kind.

    Args:
        served: common.serve.work.Served by name, loaded in this thread.
        generate: the backend's module.
        count: of cases.
        seed: of their choice.
    """
    rng, made = np.random.default_rng(seed), []
    while len(made) < count:
        name = str(rng.choice(list(served)))
        kind = str(rng.choice(["chat", "chat", "text", "ids", "schema", "tools"]))
        made.append(
            _forced(rng, name, kind) if kind in ("schema", "tools") else _free(rng, served[name], generate, kind)
        )
    return made


def _forced(rng: np.random.Generator, name: str, kind: str) -> Case:
    """An answer that a grammar forms."""
    body = {"model": name, "seed": int(rng.integers(2**40)), "temperature": float(rng.choice([0.0, 1.0]))}
    body["messages"] = [{"role": "user", "content": question(int(rng.integers(1000)), int(rng.integers(1, 20)))}]
    if kind == "schema":
        schema = {"name": "place", "schema": SCHEMA, "strict": True}
        return Case(CHAT, body | {"response_format": {"type": "json_schema", "json_schema": schema}})
    return Case(CHAT, body | {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False})


def _free(rng: np.random.Generator, served: Any, generate: ModuleType, kind: str) -> Case:
    """An answer that `generate` can give as well."""
    from mlxgpt.common.config import SampleConfig

    settings: dict[str, Any] = {"temperature": float(rng.choice([0.0, 0.7, 1.2])), "seed": int(rng.integers(2**40))}
    for key, values in (("top_k", [0, 5]), ("top_p", [1.0, 0.9]), ("min_p", [0.0, 0.05]),
                        ("repetition_penalty", [1.0, 1.2]), ("presence_penalty", [0.0, 0.5]),
                        ("frequency_penalty", [0.0, -0.3])):  # fmt: skip
        if rng.random() < 0.4:
            settings[key] = type(values[0])(rng.choice(values))
    tokens, n = int(rng.integers(1, 48)), int(rng.choice([1, 1, 1, 2, 3]))
    stop = [str(one) for one in rng.choice(["e", " in", "the", "\n", "()"], int(rng.integers(0, 3)), replace=False)]
    bias = {
        int(token): float(rng.choice([-4, 3])) for token in rng.integers(2, served.n_vocab, int(rng.integers(0, 3)))
    }
    text = question(int(rng.integers(1000)), int(rng.choice([1, 5, 20, 60])))
    body = {"model": served.name, "max_tokens": tokens, "n": n, **settings}
    if stop:
        body["stop"] = stop
    if bias:
        body["logit_bias"] = {str(token): value for token, value in bias.items()}
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": text}]
        ids = served.template.encode(body["messages"], [], generation=True, typed=True)
    else:
        ids = text if kind == "text" else served.tokenizer.encode(text)
        body["prompt"] = ids
    if rng.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": 2} if kind == "chat" else {"logprobs": 2}
    found = generate.generate(
        served.model, served.tokenizer, [ids] * n, SampleConfig(max_tokens=tokens, **settings), stop, None,
        sorted(served.ends), bias,
    )  # fmt: skip
    reason = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
    expected = [Choice(one.text, reason[one.finish_reason]) for one in found]
    return Case(CHAT if kind == "chat" else TEXT, body, expected)
