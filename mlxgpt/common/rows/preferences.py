"""Reads preference data: a prompt with a better and a worse answer, or with one answer that is good or bad.

prompt, chosen, rejected             texts or lists of messages; the prompt under tune.prompt_key
chosen, rejected                     whole texts or conversations: what both begin with is the prompt, as in trl
instruction, input, chosen, rejected Alpaca's columns
prompt, completion, label            kto: label is true or false
"""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxgpt.common.config import TuneConfig
from mlxgpt.common.data.corpus import parse_json
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.files import SPLITS
from mlxgpt.common.rows.formats import alpaca_row, completion_row, hold_out, prompt_and_completion, read_splits
from mlxgpt.common.rows.messages import read_messages
from mlxgpt.common.rows.row import Row
from mlxgpt.common.rows.values import shown, string_at, value_at

ANSWERS = ("chosen", "rejected")
_TALKS = ("messages", "conversations")  # the prompt as messages, as LLaMA-Factory has it


@dataclass(frozen=True)
class Judged:
    """The rows of a pair, the better one first; or a single row that is good or bad.

    A row is a prompt with one answer, and nothing of the prompt is trained on.
    """

    where: str  # file and row
    rows: tuple[Row, ...]
    good: bool = True  # of a single row
    margin: float = 0.0  # of a pair: by how much the better one is ahead

    @property
    def hash(self) -> int:
        """64 bits of a hash of the content."""
        parts = b"".join(row.hash.to_bytes(8, "little") for row in self.rows) + bytes([self.good])
        return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "little")

    @property
    def words(self) -> str:
        """All text, for comparing."""
        return "\n".join(row.words for row in self.rows)


@dataclass
class Preferences:
    """The judged answers of each split, and the sha256 of each file by its name.

    ``format`` is that of the rows: text (no template), completion or chat.
    """

    format: str
    splits: dict[str, list[Judged]]
    digest: dict[str, str]
    notes: list[str]


def open_preferences(tune: TuneConfig, single: bool = False) -> Preferences:
    """All judged answers of ``tune.source``; ``single``: one row each, so that a pair makes two.

    Raises:
        UserError: no file, a damaged file, or a row that is no preference; names file and row.
    """
    if tune.format != "auto":
        raise UserError(f"tune.format = {tune.format!r}: expected auto: preference data are known by their keys")
    raw, digest = read_splits(tune)
    splits: dict[str, list[Judged]] = {split: [] for split in SPLITS}
    kinds: dict[str, str] = {}
    equal: list[str] = []
    for split, rows in raw.items():
        for where, row in rows:
            kind, found = _read(row, where, tune, single)
            if found:
                kinds.setdefault(kind, where)
                splits[split].append(found)
            else:
                equal.append(where)
    notes = equal_pairs(equal, sum(map(len, raw.values())))
    if not splits["train"]:
        raise UserError(f"{equal[0]}: chosen equals rejected, as in all training rows: expected two different answers")
    if "text" in kinds and len(kinds) > 1:
        other = next(where for kind, where in kinds.items() if kind != "text")
        raise UserError(
            f"{kinds['text']}: chosen and rejected are whole texts, and {other} has a prompt: expected one form"
        )
    notes += hold_out(splits, tune)
    if single:
        splits = {split: [each for item in held for each in _apart(item)] for split, held in splits.items()}
    return Preferences("chat" if "chat" in kinds else next(iter(kinds)), splits, digest, notes)


def equal_pairs(rows: list[str], count: int, how: str = "") -> list[str]:
    """A line about the pairs whose answers are equal, of which nothing can be learned: they are left out.

    Raises:
        UserError: they are more than a tenth of the rows, so that something else is wrong.
    """
    if 10 * len(rows) > count:
        also = f", as in {len(rows) - 1:,} other rows of {count:,}" if len(rows) > 1 else ""
        raise UserError(f"{rows[0]}: chosen equals rejected{how}{also}: expected two different answers")
    return [f"{rows[0]}: chosen equals rejected{how}, in {len(rows):,} of {count:,} rows: left out"] if rows else []


def _apart(item: Judged) -> list[Judged]:
    """A pair as a good and a bad answer."""
    if len(item.rows) == 1:
        return [item]
    return [Judged(row.where, (row,), good) for row, good in zip(item.rows, (True, False), strict=True)]


def _read(row: dict[str, Any], where: str, tune: TuneConfig, single: bool) -> tuple[str, Judged | None]:
    """(format, what the row says); None of a pair whose answers are equal."""
    if any(key in row for key in ANSWERS):
        return read_pair(row, where, tune)
    if tune.label_key in row:
        if not single:
            raise UserError(f"{where}: one answer with a label: expected --set prefer.loss=kto, or chosen and rejected")
        return _labeled(row, where, tune)
    found = ", ".join(map(repr, list(row)[:8]))
    raise UserError(
        f"{where}: keys {found}: expected chosen and rejected, with {tune.prompt_key} or without, or for "
        f"prefer.loss = kto {tune.prompt_key}, {tune.completion_key} and {tune.label_key}; --task lm trains on answers"
    )


def _labeled(row: dict[str, Any], where: str, tune: TuneConfig) -> tuple[str, Judged]:
    """An answer and whether it is good."""
    label = row[tune.label_key]
    text = label.strip().lower() if isinstance(label, str) else label
    if text not in (True, False, "true", "false", "1", "0"):
        raise UserError(f"{where}: {tune.label_key} is {shown(label)}: expected true or false")
    plain = {key: value for key, value in row.items() if key != tune.label_key}
    if tune.prompt_key not in row and "instruction" in row:
        made = _alpaca(plain, where, tune)
    else:
        made = completion_row(plain, where, tune)
    good = text in (True, "true", "1")
    named = dataclasses.replace(made, where=f"{where} {'good' if good else 'bad'}")
    return "chat" if made.messages else "completion", Judged(where, (named,), good)


def read_pair(row: dict[str, Any], where: str, tune: TuneConfig) -> tuple[str, Judged | None]:
    """(format, a better and a worse answer to one prompt); None if they are equal.

    Raises:
        UserError: the row is no pair.
    """
    row = {key: value for key, value in row.items() if key != tune.label_key}
    answers = [_answer(row, key, where) for key in ANSWERS]
    talks = [isinstance(answer, list) for answer in answers]
    if talks[0] != talks[1]:
        raise UserError(f"{where}: chosen is {shown(answers[0])}, and rejected {shown(answers[1])}: expected one form")
    if answers[0] == answers[1]:
        return "", None
    row |= dict(zip(ANSWERS, answers, strict=True))
    key = next((name for name in (tune.prompt_key, *_TALKS) if row.get(name) is not None), "")
    if talks[0]:
        kind, made = "chat", _talks(row, key, where, tune)
    elif key and isinstance(prompt := _parsed(row[key], where, key), list):
        said = {name: [{"role": "assistant", "content": string_at(row, name, where)}] for name in ANSWERS}
        kind, made = "chat", _rows(row | said | {tune.prompt_key: prompt}, where, tune, prompt_and_completion)
    elif not key and "instruction" in row:
        texts = [string_at(row, name, where) for name in ANSWERS]
        kind, made = "chat", tuple(_alpaca(row | {"output": text, "response": None}, where, tune) for text in texts)
    elif key == tune.prompt_key:
        kind, made = "completion", _rows(row, where, tune, completion_row)
    else:
        kind, made = "text", _texts(row, where)
    named = tuple(dataclasses.replace(each, where=f"{where} {name}") for each, name in zip(made, ANSWERS, strict=True))
    return kind, Judged(where, named, margin=_margin(row, where))


def _alpaca(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    """Alpaca's columns, of whose answers the last one alone is judged."""
    made = alpaca_row(row, where, tune)
    return dataclasses.replace(made, train=(*[False] * (len(made.messages) - 1), True))


def _rows(
    row: dict[str, Any], where: str, tune: TuneConfig, read: Callable[[dict[str, Any], str, TuneConfig], Row]
) -> tuple[Row, ...]:
    """The prompt with each answer, read as instruction tuning reads them."""
    return tuple(read(row, where, dataclasses.replace(tune, completion_key=name)) for name in ANSWERS)


def _answer(row: dict[str, Any], key: str, where: str) -> Any:
    """A text, or a list of messages."""
    value = _parsed(value_at(row, key, where), where, key)
    if isinstance(value, dict):  # a single message
        return [value]
    if not isinstance(value, (str, list)):
        raise UserError(f"{where}: {key} is {shown(value)}: expected text, or a list of messages")
    if not value or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where}: {key} is empty: expected an answer")
    return value


def _parsed(value: Any, where: str, key: str) -> Any:
    """Messages that a table's cell holds as JSON, or the value itself."""
    cell = isinstance(value, str) and value.lstrip().startswith(('[{"role"', '[{"from"', '[{"content"'))
    return parse_json(value, f"{where}: {key}") if cell else value


def _talks(row: dict[str, Any], key: str, where: str, tune: TuneConfig) -> tuple[Row, ...]:
    """Answers that are messages: behind a prompt, or whole conversations, whose prompt is what both begin with."""
    talks = [list(read_messages(row, name, where)[0]) for name in ANSWERS]
    if talks[0][0]["role"] == "assistant":
        if not key:
            raise UserError(f"{where}: no prompt: expected {tune.prompt_key}, or conversations from their beginning")
        prompt = _parsed(row[key], where, key)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": string_at(row, key, where)}]
        return _rows(row | {tune.prompt_key: prompt}, where, tune, prompt_and_completion)
    at = _shared(*talks)
    for name, talk in zip(ANSWERS, talks, strict=True):
        if talk[at]["role"] != "assistant":
            raise UserError(
                f"{where}: chosen and rejected part in message {at + 1}, where {name} has a {talk[at]['role']}'s: "
                "expected one conversation up to the answer"
            )
    rest = {name: row[name][at:] for name in ANSWERS}
    return _rows(row | rest | {tune.prompt_key: row[ANSWERS[0]][:at]}, where, tune, prompt_and_completion)


def _texts(row: dict[str, Any], where: str) -> tuple[Row, ...]:
    """Whole texts, whose prompt is what both begin with; a space before the answers belongs to them."""
    texts = [string_at(row, name, where) for name in ANSWERS]
    at = _shared(*texts)
    at -= at > 0 and texts[0][at - 1] == " "
    for name, text in zip(ANSWERS, texts, strict=True):
        if not text[at:].strip():
            raise UserError(f"{where}: {name} ends where the other goes on: expected an answer of its own")
    return tuple(Row(where, text=text[:at], answer=text[at:]) for text in texts)


def _shared(one: Any, other: Any) -> int:
    """How much two texts or lists begin with in common; something is left of both."""
    most = min(len(one), len(other)) - 1
    return next((k for k in range(most) if one[k] != other[k]), most)


def _margin(row: dict[str, Any], where: str) -> float:
    """By how much the better answer is ahead, 0 where nobody says."""
    value = row.get("margin")
    if value is None:
        return 0.0
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if isinstance(value, bool) or not abs(found) < float("inf"):
        raise UserError(f"{where}: margin is {shown(value)}: expected a finite number")
    return found
