"""A row of fine-tuning data, whatever its file and format."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from mlxgpt.common.rows.messages import text_of


@dataclass(frozen=True)
class Row:
    """One row: ``text``, ``text`` with the ``answer`` that follows it, ``messages``, or ``text`` and ``label``."""

    where: str  # file and row
    text: str = ""
    answer: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    label: str | None = None
    train: tuple[bool, ...] = ()  # of each message, whether it is trained on; empty: every assistant's is
    kwargs: dict[str, Any] = field(default_factory=dict)  # chat_template_kwargs

    @property
    def hash(self) -> int:
        """64 bits of a hash of the content."""
        parts: list[Any] = [self.text, self.answer, self.messages, self.tools, self.label]
        parts += [[self.train, self.kwargs]] * bool(self.train or self.kwargs)
        content = json.dumps(parts, sort_keys=True)
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")

    @property
    def words(self) -> str:
        """All text of the row, for comparing rows."""
        turns = [text_of(message.get("content")) for message in self.messages]
        return "\n".join([self.text, self.answer or "", *turns])


def as_messages(row: Row) -> Row:
    """A prompt and its answer as a user's and an assistant's turn, as mlx-lm renders them; others as they are."""
    if row.answer is None:
        return row
    turns = ({"role": "user", "content": row.text}, {"role": "assistant", "content": row.answer})
    return replace(row, text="", answer=None, messages=turns)


class Hashed(Protocol):
    """What is split by its content."""

    @property
    def hash(self) -> int:
        """64 bits of a hash of the content."""
        ...


R = TypeVar("R", bound=Hashed)


def split_rows(rows: list[R], fraction: float) -> tuple[list[R], list[R]]:
    """(train, valid): a row is in the validation split if its hash is below ``fraction`` of the hash range.

    If that selects none or all, the rows with the smallest hash are; rows with equal hashes stay together.
    """
    hashes = [row.hash for row in rows]
    smallest, largest = min(hashes), max(hashes)
    if smallest == largest:
        return rows, []
    limit = int(fraction * (1 << 64))
    if smallest >= limit or largest < limit:
        limit = smallest + 1
    train = [row for row, found in zip(rows, hashes, strict=True) if found >= limit]
    return train, [row for row, found in zip(rows, hashes, strict=True) if found < limit]
