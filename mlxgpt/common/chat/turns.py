"""Where the assistant's turns lie in a rendered conversation, and which part of them is trained.

Positions are characters of the rendered text. A turn begins behind the generation prompt, which the model sees before
it answers, and ends with the template's end of a turn: one control token (<|im_end|>), several (cohere2's
<|END_RESPONSE|><|END_OF_TURN_TOKEN|>), or, where the template writes none (GLM-4), the token that begins the next turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlxgpt.common.rows.messages import reasoning_of, text_of

# what encloses an answer's reasoning: Qwen3 and R1, Cohere, Mistral, Seed, gpt-oss
THOUGHTS = (
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)


@dataclass(frozen=True)
class Form:
    """How a template writes an assistant's turn."""

    ends: tuple[int, ...]  # the tokens that end it
    end: str  # their text
    rest: str  # what follows them at the end of a conversation: a newline, Phi-3's eos token
    bare: bool  # the template writes no end: ``end`` begins the next turn
    opening: str  # how the generation prompt goes on behind what a past turn begins with: R1's <think>
    lead: str  # between the generation prompt and an answer's content: Mistral's space


class Span(NamedTuple):
    """A turn: from ``start`` to ``stop``; its reasoning, if any, ends at ``split``."""

    start: int
    split: int
    stop: int
    empty: bool = False  # the reasoning holds no text


class Plan(NamedTuple):
    """A conversation's text and the turns to train on."""

    text: str
    spans: list[Span]
    unopened: bool = False  # the prompts lack the generation prompt's opening


def common(one: str, two: str) -> int:
    """How many characters two texts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def span(text: str, start: int, stop: int) -> Span:
    """The turn from ``start`` to ``stop``, its reasoning found by the tags that enclose it."""
    before, turn = text[:start].rstrip(), text[start:stop]
    for opens, closes in THOUGHTS:
        begins = len(turn) - len(turn.lstrip())
        if turn.startswith(opens, begins):
            begins += len(opens)
        elif before.endswith(opens):
            begins = 0
        else:
            continue
        ends = turn.find(closes, begins)
        if ends < 0:
            continue
        split = ends + len(closes)
        split += len(turn[split:]) - len(turn[split:].lstrip())
        return Span(start, start + split, stop, not turn[begins:ends].strip())
    return Span(start, start, stop)


def chosen(spans: Sequence[Span], part: str) -> list[tuple[int, int]]:
    """What is trained of the turns: ``both``, the ``answer`` behind the reasoning, or the ``thinking`` itself."""
    if part == "both":
        return [(one.start, one.stop) for one in spans]
    if part == "answer":
        return [(one.split, one.stop) for one in spans]
    return [(one.start, one.split) for one in spans if one.split > one.start and not one.empty]


def reasoning(message: dict[str, Any]) -> str:
    """The reasoning of an assistant's message: of its own key, or between tags at the content's beginning."""
    content = text_of(message.get("content"))
    inside = content.split("</think>")[0].split("<think>")[-1] if "</think>" in content else ""
    return (reasoning_of(message) or inside).strip()


def unrolled(
    before: str, upto: str, form: Form, message: dict[str, Any], content: Callable[[], int | None]
) -> str | None:
    """The text of one answer behind its generation prompt ``before``; ``upto`` is what the template makes of both.

    Args:
        before: the messages before the answer, with the generation prompt.
        upto: the messages with the answer.
        form: of the template.
        message: the answer.
        content: gives the place of the answer's content in ``upto``, or None.

    Returns:
        None where the answer cannot be told apart.
    """
    if upto.startswith(before):
        return upto
    base = before.removesuffix(form.opening)
    if form.opening and base != before and upto.startswith(base):
        return _closed(before, message, upto[len(base) :])
    place = content()
    return None if place is None else _closed(before, message, upto[place - len(form.lead) :])


def _closed(before: str, message: dict[str, Any], answer: str) -> str:
    """Prompt and answer, between them the reasoning that the prompt opens, and its end."""
    bare = before.rstrip()
    closes = next((closes for opens, closes in THOUGHTS if bare.endswith(opens)), None)
    if closes is None:
        return before + answer
    if bare == before:
        return f"{before}{reasoning(message)}{closes}{answer}"
    return f"{before}{reasoning(message)}\n{closes}\n\n{answer.lstrip()}"
