"""Makes a conversation shorter and keeps its form: what is left is rendered anew, so every turn has header and end.

Given up in this order: what follows the last trained answer; the oldest exchanges, whole; the middle of long questions
and tool results in the last exchange; the end of the last answer. The system prompt stays, and of the last question at
least a quarter of the window's tokens; where that leaves the answer less than such a quarter, nothing is left.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mlxgpt.common.chat.locate import Talk
from mlxgpt.common.rows.messages import text_of

GAP = " ... "  # where the middle of a text was
_TRIES = 12
Pair = tuple[np.ndarray, np.ndarray]
"""Tokens and mask."""


def fit_talk(
    talk: Talk, most: int, encode: Callable[[Talk], Pair], count: Callable[[str], int]
) -> tuple[Pair, bool, bool] | None:
    """A conversation of at most ``most`` tokens.

    Args:
        talk: one that is longer.
        most: its tokens, the last one, which is only a target, among them.
        encode: tokens and mask of a conversation.
        count: tokens of a text.

    Returns:
        Tokens and mask, whether something before the last answer was given up, and whether the answer's end was; None
        if the answer would lose its question.
    """
    talk = _until(talk, (talk.turns or talk.answers)[-1] + 1)
    first = next((k for k, message in enumerate(talk.messages) if message["role"] not in ("system", "developer")), 0)
    starts = [k for k in range(first, len(talk.messages)) if k == first or _begins(talk.messages, k)]
    starts = [k for k in starts if k <= talk.answers[-1]]
    low, high = 0, len(starts) - 1  # how many of the oldest exchanges go: the fewest that suffice, or all but one
    while low < high:
        middle = (low + high) // 2
        if len(encode(_without(talk, first, starts[middle]))[0]) <= most:
            high = middle
        else:
            low = middle + 1
    rest = _without(talk, first, starts[low])
    found = encode(rest)
    if len(found[0]) <= most:
        return found, True, False
    return _cut(rest, first, most, found, encode, count)


def fit_prompt(before: int, start: int, length: int, most: int) -> np.ndarray | None:
    """Which of ``length`` tokens stay: what precedes the text, beginning and end of its prompt, the answer's beginning.

    Args:
        before: tokens before the text, such as <s>.
        start: where the answer begins.
        length: of the whole.
        most: tokens that may stay.

    Returns:
        Their places, or None if prompt and answer would not keep a quarter of them each.
    """
    least, room, prompt, answer = most // 4, most - before, start - before, length - start
    kept = max(min(prompt, least), room - answer)
    if room - kept < max(1, min(answer, least)):
        return None
    head = before + (kept + 1) // 2
    return np.concatenate([np.arange(head), np.arange(start - kept // 2, start + min(answer, room - kept))])


def _until(talk: Talk, stop: int) -> Talk:
    return talk._replace(messages=talk.messages[:stop], train=talk.train[:stop])


def _begins(messages: Any, k: int) -> bool:
    """Whether an exchange begins at ``k``: a user's message behind another's."""
    return messages[k]["role"] == "user" and messages[k - 1]["role"] != "user"


def _without(talk: Talk, first: int, start: int) -> Talk:
    """The conversation without its messages from ``first`` to ``start``."""
    train = [*talk.train[:first], *talk.train[start:]] if talk.train else ()
    return talk._replace(messages=[*talk.messages[:first], *talk.messages[start:]], train=train)


def _cut(
    talk: Talk, first: int, most: int, found: Pair, encode: Callable[[Talk], Pair], count: Callable[[str], int]
) -> tuple[Pair, bool, bool] | None:
    """The last exchange with the middle of its questions and tool results cut, then the end of its answer."""
    least = most // 4
    ids, mask = found
    starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
    answer = (
        len(ids) - int(starts[-1]) if len(starts) and starts[-1] else count(text_of(talk.messages[-1].get("content")))
    )
    long = {
        k: count(text_of(talk.messages[k].get("content")))
        for k in range(first, talk.answers[-1])
        if talk.messages[k]["role"] in ("user", "tool")
    }
    kept = {k: min(size, least if talk.messages[k]["role"] == "user" else 16) for k, size in long.items()}
    room = most - (len(ids) - answer - sum(long.values()))  # for these texts and the answer
    for _ in range(_TRIES):
        wanted = max(room - answer, sum(kept.values()))
        if room - wanted < min(answer, least) or room - wanted < 1:
            return None
        limits = _limits(long, kept, wanted)
        messages = [
            {**message, "content": _middle(text_of(message.get("content")), limits[k] / long[k])}
            if k in long and limits[k] < long[k]
            else message
            for k, message in enumerate(talk.messages)
        ]
        ids, mask = encode(talk._replace(messages=messages))
        begun = len(ids) - answer
        if len(ids) <= most:
            return (ids, mask), True, False
        if wanted == sum(kept.values()) and most - begun >= min(answer, least):
            return (ids[:most], mask[:most]), any(limits[k] < long[k] for k in long), True
        room -= len(ids) - most + 1 if wanted > sum(kept.values()) else begun + least - most
    return None


def _limits(long: dict[int, int], kept: dict[int, int], wanted: int) -> dict[int, int]:
    """Tokens of each text, ``wanted`` together: the longest are cut to one length, none below ``kept``."""
    low, high = 0, max(long.values(), default=0)
    while low < high:
        cap = (low + high + 1) // 2
        if sum(max(kept[k], min(size, cap)) for k, size in long.items()) <= wanted:
            low = cap
        else:
            high = cap - 1
    return {k: max(kept[k], min(size, low)) for k, size in long.items()}


def _middle(text: str, share: float) -> str:
    """``share`` of a text: its beginning and its end, cut between words where that costs little."""
    size = max(0, int(len(text) * share) - len(GAP))
    head, tail = text[: (size + 1) // 2], text[len(text) - size // 2 :]
    cut, begin = head.rstrip().rfind(" "), tail.find(" ")
    head = head[:cut] if cut > len(head) * 3 // 4 else head
    tail = tail[begin + 1 :] if 0 <= begin < len(tail) // 4 else tail
    return head.rstrip() + GAP + tail.lstrip()
