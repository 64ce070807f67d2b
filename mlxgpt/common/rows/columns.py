"""Columns by other names than ours: the settings that read them."""

import shlex
from typing import Any

_ASKED = (
    "prompt", "question", "query", "instruction", "problem", "input", "inputs", "request", "source", "user", "human",
    "q",
)  # fmt: skip
_ANSWERED = (
    "completion", "answer", "response", "output", "outputs", "solution", "reply", "target", "targets", "assistant",
    "gpt", "a",
)  # fmt: skip
_MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_TEXT = ("text", "content", "body", "sentence", "document", "article", "story", "review", "comment", "message")
_LABEL = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "target", "tag")


def cure(row: dict[str, Any], task: str) -> str:
    """The settings that read a row's keys, ready to paste after ``expected ...``; "" where none are known."""
    texts = {key.strip().lower(): key for key, value in row.items() if isinstance(value, str)}
    labels = {key.strip().lower(): key for key, value in row.items() if isinstance(value, (str, int))}
    talks = {key.strip().lower(): key for key, value in row.items() if _is_talk(value)}
    ways = [(("tune.prompt_key", _ASKED, texts), ("tune.completion_key", _ANSWERED, texts))]
    ways += [(("tune.messages_key", _MESSAGES, talks),), (("tune.text_key", _TEXT, texts),)]
    if task == "classify":
        ways = [(("tune.text_key", (*_TEXT, *_ASKED), texts), ("tune.label_key", _LABEL, labels))]
    for way in ways:
        found = [(setting, next((held[name] for name in names if name in held), None)) for setting, names, held in way]
        if all(key is not None for _, key in found):
            return "; " + " ".join(f"--set {shlex.quote(f'{setting}={key}')}" for setting, key in found) + " reads them"
    return ""


def _is_talk(value: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)
